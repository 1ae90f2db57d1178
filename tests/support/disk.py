"""A disk that is full, and what lies on one."""

import errno
from pathlib import Path


def everything_in(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def contents(folder, pattern: str = "**/*") -> dict[str, bytes]:
    """All files below a folder whose paths are of this pattern."""
    found = sorted(path for path in Path(folder).glob(pattern) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")
