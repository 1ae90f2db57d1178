"""What every command does with its exit code."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable

from utils.errors import RepriseError


def exit_code(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """What ``run`` returns, or 2 after one message about a mistake that the user can repair."""
    if args.offline or os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        os.environ["HF_HUB_OFFLINE"], args.offline = "1", True
    try:
        return run(args)
    except RepriseError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: the disk is full: {error.filename or ''}; make room and give the command again", file=sys.stderr)
    return 2
