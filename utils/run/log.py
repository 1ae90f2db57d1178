"""The log: PyCIL's lines on the console and in a file."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger("reprise")
TOLD = logging.INFO + 5  # of a task's one line, which is shown of every seed that is learned beside others
LOG_FORMAT = "%(asctime)s [%(filename)s] => %(message)s"  # PyCIL's


class Console(logging.StreamHandler):
    """Standard output; where it is closed or its disk is full, the program ends as it would at a print."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise  # what logging would print for every line and go on


def log_to_console(is_main: bool = True, seed: str = "") -> None:
    """Send messages to standard output; of several processes only the main one tells what is not a warning.

    Of a seed that is learned beside others, each of its lines names it, and there is one for every task.
    """
    log.setLevel(logging.INFO if is_main else logging.WARNING)
    log.propagate = False
    if not log.handlers:
        handler = Console(sys.stdout)
        handler.setFormatter(logging.Formatter(f"{seed} {LOG_FORMAT}" if seed else LOG_FORMAT))
        handler.setLevel(TOLD if seed else logging.INFO)
        log.addHandler(handler)


@contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """Append messages to this file too, which belongs to one seed alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter(LOG_FORMAT))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()
