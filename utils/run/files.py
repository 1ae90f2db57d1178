"""Files that survive a crash: written under a temporary name, flushed and renamed; safetensors and JSON."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.run.errors import CheckpointError, RepriseError

if TYPE_CHECKING:  # what only reads a file has not to wait for torch
    from torch import Tensor

# What the system refuses to a user, and what can be done about it. Any other error is a mistake of ours.
FULL = "the disk is full, so make room"
NOT_ALLOWED = "allow it, or choose another place"
REMEDIES = {
    errno.ENOSPC: FULL, errno.EDQUOT: FULL, errno.EACCES: NOT_ALLOWED, errno.EPERM: NOT_ALLOWED,
    errno.EROFS: NOT_ALLOWED, errno.EEXIST: "this is a file: choose another place",
    errno.ENOTDIR: "a part of this path is a file: choose another place", errno.EISDIR: "this is a folder: name a file",
    errno.ENAMETOOLONG: "choose shorter names", errno.ELOOP: "these links lead in a circle: choose another place",
    errno.EMFILE: "too many files are open, so raise `ulimit -n` or lower num_workers",
}  # fmt: skip


def atomic_write(path: str | Path, content: bytes | str, sync: bool = True) -> None:
    """Write a file under a temporary name, flush it and rename it.

    Args:
        path: its folder is made if need be.
        content: text is written as UTF-8.
        sync: wait until the disk has it, so that it outlives a power cut; needless for what can be made again.

    Raises:
        RepriseError: if the system refuses it, as a full disk does; nothing half-written stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with explained_refusal(path):
            with open(temporary, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                if sync:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # there only if something failed


@contextmanager
def explained_refusal(what: Path | str | None = None) -> Iterator[None]:
    """Say what to do about what the system refuses: a full disk, a folder that may not be written, a name too long.

    Args:
        what: is written inside; None: as the system names it.

    Raises:
        RepriseError: in place of the system's error.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        place, remedy = what or error.filename or "a file", REMEDIES[error.errno]
        raise RepriseError(f"cannot use {place} ({error.strerror}): {remedy}, and give the command again") from error


def require_writable(folder: Path) -> None:
    """See that a folder is there or can be made; afterwards it is as it was.

    Raises:
        OSError: as the system would refuse to write there.
    """
    try:
        os.stat(folder / "file")  # asks for every part of the path
    except FileNotFoundError:
        above = [folder, *folder.absolute().parents]
        known = next(index for index, place in enumerate(above) if place.exists())
        if not os.access(above[known], os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(above[known])) from None
        if known:
            _try_to_make(above[known - 1])


def _try_to_make(folder: Path) -> None:
    """Make a folder and delete it; /proc and its like allow everything, and keep nothing."""
    try:
        folder.mkdir()
    except FileExistsError:  # by another process, now
        return
    except FileNotFoundError as error:
        raise PermissionError(errno.EACCES, "nothing can be made there", str(folder)) from error
    with suppress(OSError):  # unless another process has begun to use it
        folder.rmdir()


def write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON, atomically."""
    atomic_write(path, json.dumps(value, indent=1) + "\n")


def read_json(path: str | Path, remedy: str, error: type[RepriseError] = CheckpointError) -> dict[str, Any]:
    """Read one JSON object.

    Args:
        path: of the file.
        remedy: what the user may do if it is damaged.
        error: kind of error to raise.

    Raises:
        RepriseError: if the file is absent, cut, not UTF-8, or holds no object; of the kind ``error``.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as cause:
        raise error(f"{path} is missing: {remedy}") from cause
    except (OSError, ValueError, RecursionError) as cause:
        raise error(f"{path} is damaged ({cause}): {remedy}") from cause
    if not isinstance(value, dict):
        raise error(f"{path} is damaged (it holds a {type(value).__name__}, not an object): {remedy}")
    return value


def in_numeric_order(paths: Iterable[Path]) -> list[Path]:
    """Sort paths by their names, in which numbers count as numbers: `seed_9` before `seed_10`."""
    # At every second place of the split is a number.
    return sorted(paths, key=lambda path: [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", path.name)])


def file_hash(path: str | Path) -> str:
    """Compute the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a folder to fill under a temporary name; once all is in it, it takes the place of ``path``.

    Raises:
        RepriseError: if the system refuses it, as a full disk does; nothing half-written stays.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with explained_refusal(path):
            temporary.mkdir(parents=True)
            yield temporary
            shutil.rmtree(path, ignore_errors=True)
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # there only if something failed


def flatten(nested: Mapping[Any, dict[str, Any]]) -> dict[str, Any]:
    """Name what lies in several dictionaries as one file holds it: "<outer name>.<name>"."""
    return {f"{outer}.{name}": own[name] for outer, own in nested.items() for name in sorted(own)}


def nest(flat: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Take apart what ``flatten`` named."""
    nested: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        outer, _, inner = name.partition(".")
        nested.setdefault(outer, {})[inner] = value
    return nested


def save_tensors(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """Write named tensors as one safetensors file, atomically."""
    from safetensors.torch import save

    atomic_write(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, on the CPU.

    Raises:
        CheckpointError: if the file is absent or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
