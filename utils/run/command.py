"""What every command does: its promise to fetch nothing, and its exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from utils.run.errors import RepriseError
from utils.run.files import explained_full_disk


def promised_offline() -> bool:
    """Whether the environment promises that nothing is fetched, in the hub's own word."""
    return os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")


def exit_code(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Return what ``run`` returns, or 2 after one message about a mistake that the user can repair."""
    if promised_offline() or getattr(args, "offline", False):
        os.environ["HF_HUB_OFFLINE"], args.offline = "1", True
    try:
        with explained_full_disk():
            return run(args)
    except RepriseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
