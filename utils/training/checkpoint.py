"""Checkpoints: a folder each, written under a temporary name and renamed, so it is there whole or not at all.

Its name ends in a number, the newest one counts, and the one before it is kept in case the newest is damaged.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from utils.run.errors import CheckpointError
from utils.run.files import load_tensors, read_json, save_tensors, whole_folder, write_json
from utils.run.manifest import Manifest

STATE = "state.json"
Tensors = dict[str, dict[str, Tensor]]  # file stem -> named tensors
REMEDY = "delete the folder, and the same command goes on from the checkpoint before it"


class Checkpoints:
    """Numbered checkpoints in one folder: `<name>_<number>/`, the two newest kept.

    Args:
        folder: where they lie.
        name: what they are of: "task", "fit_3_train", ...
    """

    def __init__(self, folder: str | Path, name: str):
        self.folder, self.name = Path(folder), name

    def numbers(self) -> list[int]:
        """List the numbers that are there, newest first."""
        ends = (path.name.removeprefix(f"{self.name}_") for path in self.folder.glob(f"{self.name}_*") if path.is_dir())
        return sorted((int(end) for end in ends if re.fullmatch(r"0|[1-9]\d*", end)), reverse=True)

    def path(self, number: int) -> Path:
        return self.folder / f"{self.name}_{number}"

    def manifest(self, number: int, folder: Path | None = None) -> Manifest:
        """Return the manifest of one checkpoint, in ``folder`` while it is written."""
        return Manifest(folder or self.path(number), "checkpoint", {"name": self.name, "number": number}, remedy=REMEDY)

    def save(self, number: int, tensors: Tensors, state: dict, fill: Callable[[Path], None] | None = None) -> None:
        """Write one checkpoint and forget all but the two newest.

        Args:
            number: larger than the ones before.
            tensors: of each file.
            state: JSON.
            fill: called with the new folder to let others add files, such as a replay source.
        """
        with whole_folder(self.path(number)) as temporary:
            for stem, named in tensors.items():
                save_tensors(temporary / f"{stem}.safetensors", named)
            write_json(temporary / STATE, state)
            if fill is not None:
                fill(temporary)
            self.manifest(number, temporary).seal()
        self.forget_old()

    def forget_old(self) -> None:
        """Delete all but the two newest."""
        for old in self.numbers()[2:]:
            shutil.rmtree(self.path(old))

    def load(self, number: int) -> tuple[Tensors, dict]:
        """Return the tensors at the top of the folder and the state.

        Raises:
            CheckpointError: if a file is missing or differs from what was written; the message names it.
        """
        manifest = self.manifest(number)
        manifest.claim(write=False)
        files = [self.path(number) / name for name in manifest.verify()["files"] if "/" not in name]
        tensors = {path.stem: load_tensors(path) for path in files if path.suffix == ".safetensors"}
        return tensors, read_json(self.path(number) / STATE, REMEDY)

    def load_newest(self, log, discard: bool = True) -> tuple[int, Tensors, dict] | None:
        """Load the newest checkpoint that is whole.

        Args:
            log: is told of damaged ones.
            discard: set damaged ones aside, under a hidden name.

        Returns:
            (number, tensors, state), or None if there is none.
        """
        for number in self.numbers():
            try:
                return (number, *self.load(number))
            except CheckpointError as error:
                log.warning("%s. Using the checkpoint before it", error)
                if discard:
                    hidden = self.folder / f".{self.name}_{number}.damaged"
                    shutil.rmtree(hidden, ignore_errors=True)
                    os.replace(self.path(number), hidden)
        return None

    def clear(self) -> None:
        """Delete all of them, half-written ones too."""
        for path in [*self.folder.glob(f"{self.name}_*"), *self.folder.glob(f".{self.name}_*")]:
            shutil.rmtree(path, ignore_errors=True)
