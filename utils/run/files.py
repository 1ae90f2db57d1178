"""Files that survive a crash: written under a temporary name, flushed and renamed; safetensors and JSON."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from utils.run.errors import CheckpointError, RepriseError


def atomic_write(path: str | Path, content: bytes | str, sync: bool = True) -> None:
    """Write a file under a temporary name, flush it and rename it.

    Args:
        path: its folder is made if need be.
        content: text is written as UTF-8.
        sync: wait until the disk has it, so that it outlives a power cut; needless for what can be made again.

    Raises:
        RepriseError: if the disk is full; nothing half-written stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with explained_full_disk(path):
            with open(temporary, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                if sync:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # there only if something failed


@contextmanager
def explained_full_disk(path: Path | None = None) -> Iterator[None]:
    """Say what to do about a full disk.

    Args:
        path: what is written inside; None: as the system names it.

    Raises:
        RepriseError: in place of the system's error.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        place = path or error.filename or "a file"
        raise RepriseError(f"the disk is full: cannot write {place}; make room and give the command again") from error


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
        RepriseError: if the disk is full; nothing half-written stays.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with explained_full_disk(path):
            temporary.mkdir(parents=True)
            yield temporary
            shutil.rmtree(path, ignore_errors=True)
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # there only if something failed


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
