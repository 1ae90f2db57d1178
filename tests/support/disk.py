"""A disk that is full, and what lies on one."""

import errno


def everything_in(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")
