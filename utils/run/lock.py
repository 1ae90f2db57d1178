"""Who owns a run's folder. It needs no package that takes seconds to load."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from utils.run.errors import ConfigError


@contextmanager
def locked(folder: Path, is_main: bool = True) -> Iterator[None]:
    """Own a run's folder as long as this lasts; a killed process owns it no longer.

    The lock lies beside the folder, which may be deleted and made anew.

    Raises:
        ConfigError: if another process owns it.
    """
    if not is_main:
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = _lock_of(folder)
    try:
        with FileLock(lock, timeout=0):
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)  # a kill leaves it, which does no harm
    except Timeout as error:
        raise ConfigError(f"{folder} belongs to a process that is running now: wait, or give another --name") from error


def require_free(folder: Path) -> None:
    """See that no other process owns a run's folder, without making anything.

    Raises:
        ConfigError: if one does.
    """
    if os.path.exists(_lock_of(folder)):  # a kill may have left it
        with locked(folder):
            pass


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")
