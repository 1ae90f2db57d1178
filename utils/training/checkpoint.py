"""Files that survive a crash: tensors as safetensors, state as JSON, every file under its hash.

A checkpoint is a folder. It is written under a temporary name, flushed and renamed, so it is there whole or not at
all; its name ends in a number, the newest one counts, and the one before it is kept in case the newest is damaged.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from utils.run.errors import CheckpointError, RepriseError

INDEX = "index.json"


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
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise disk_error(error, path) from error


def disk_error(error: OSError, path: Path) -> Exception:
    """The error itself, or for a full disk one that says what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RepriseError(f"the disk is full: cannot write {path}; make room and give the same command again")
    return error


def write_json(path: str | Path, value: Any) -> None:
    """Indented JSON, atomically."""
    atomic_write(path, json.dumps(value, indent=1) + "\n")


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def folder_bytes(folder: str | Path) -> int:
    """Bytes of all files below a folder; 0 if it does not exist."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def folder_hashes(folder: Path) -> dict[str, str]:
    """The hash of every file below a folder, by its path there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_hash(path) for path in files}


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill under a temporary name; once all is in it, it takes the place of ``path``.

    Raises:
        RepriseError: if the disk is full; nothing half-written stays.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # there only if something failed


def save_tensors(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """Named tensors as one safetensors file, atomically."""
    from safetensors.torch import save

    atomic_write(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        CheckpointError: if the file is absent or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


class Checkpoints:
    """Numbered checkpoints in one folder: `<name>_<number>/`, the two newest kept.

    Args:
        folder: where they lie.
        name: what they are of: "task", "fit_3_train", ...
    """

    def __init__(self, folder: str | Path, name: str):
        self.folder, self.name = Path(folder), name

    def numbers(self) -> list[int]:
        """The numbers that are there, newest first."""
        pattern = re.compile(re.escape(self.name) + r"_(\d+)")
        found = [pattern.fullmatch(path.name) for path in self.folder.glob(f"{self.name}_*")]
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def path(self, number: int) -> Path:
        return self.folder / f"{self.name}_{number}"

    def save(self, number: int, tensors: dict[str, dict[str, Tensor]], state: dict, fill=None) -> None:
        """Write one checkpoint and forget all but the two newest.

        Args:
            number: larger than the ones before.
            tensors: file stem -> named tensors.
            state: JSON.
            fill: called with the new folder to let others add files, such as a replay source.
        """
        with whole_folder(self.path(number)) as temporary:
            for stem, named in tensors.items():
                save_tensors(temporary / f"{stem}.safetensors", named)
            write_json(temporary / "state.json", state)
            if fill is not None:
                fill(temporary)
            write_json(temporary / INDEX, folder_hashes(temporary))
        for old in self.numbers()[2:]:
            shutil.rmtree(self.path(old))

    def load(self, number: int) -> tuple[dict[str, dict[str, Tensor]], dict]:
        """The tensors at the top of the folder and the state.

        Raises:
            CheckpointError: if a file is missing or differs from what was written; the message names it.
        """
        folder = self.path(number)
        try:
            index = json.loads((folder / INDEX).read_text())
            for name, expected in index.items():
                if file_hash(folder / name) != expected:
                    raise CheckpointError(f"{folder / name} is damaged: its hash differs from what was written")
            state = json.loads((folder / "state.json").read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder} is damaged: {error}") from error
        return {path.stem: load_tensors(path) for path in folder.glob("*.safetensors")}, state

    def load_newest(self, log, discard: bool = True) -> tuple[int, dict[str, dict[str, Tensor]], dict] | None:
        """The newest checkpoint that is whole: (number, tensors, state), or None. A damaged one is named in the log."""
        for number in self.numbers():
            try:
                return (number, *self.load(number))
            except CheckpointError as error:
                log.warning("%s; using the checkpoint before it", error)
                if discard:
                    shutil.rmtree(self.path(number), ignore_errors=True)
        return None

    def clear(self) -> None:
        """Delete all of them, half-written ones too."""
        for path in [*self.folder.glob(f"{self.name}_*"), *self.folder.glob(f".{self.name}_*")]:
            shutil.rmtree(path, ignore_errors=True)
