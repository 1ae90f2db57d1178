"""What every command does: its promise to fetch nothing, and its exit code."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable

from utils.run.errors import RepriseError


def promised_offline() -> bool:
    """Whether the environment promises that nothing is fetched, in the hub's own word."""
    return os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")


def exit_code(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """What ``run`` returns, or 2 after one message about a mistake that the user can repair."""
    if promised_offline() or getattr(args, "offline", False):
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
