"""What every command does: its promise to fetch nothing, and its exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from utils.run.errors import RepriseError
from utils.run.files import explained_refusal


def promised_offline() -> bool:
    """Whether the environment promises that nothing is fetched, in the hub's own word."""
    return os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")


def exit_code(run: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Return 0 once ``run`` has done its work, or 2 after one message about a mistake that the user can repair.

    Ctrl-C and a closed pipe end it without a traceback, and with the codes that shells have for them.
    """
    if promised_offline() or getattr(args, "offline", False):
        os.environ["HF_HUB_OFFLINE"], args.offline = "1", True
    try:
        with explained_refusal():
            run(args)
            sys.stdout.flush()  # a closed pipe is noticed here, and not when Python ends
            return 0
    except RepriseError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from what is finished", file=sys.stderr)
        return 130  # as shells have it: 128 and the signal's number
    except BrokenPipeError:  # whoever read the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
