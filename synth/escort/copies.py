"""Copies of exemplars and of new images on disk: drawn when they are first wanted, found ever after."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from synth.bank import REMEDY, Bank
from synth.drawing import MANIFEST, damaged_files, draw_missing, find_image, image_paths, preview, require_same
from synth.escort.source import ExemplarCompression
from synth.requests import Requests
from utils.data.images import ImageSet, encode_image
from utils.data.manager import DataManager, Task
from utils.results.panels import Cell, Panel, PanelRow
from utils.run.config import SourceConfig
from utils.training.checkpoint import atomic_write, file_hash, write_json
from utils.training.run import Run

log = logging.getLogger("reprise")
PICTURED = 6  # exemplars of a task that the report shows
NOTE = (
    "Exemplars as they were, the edge maps that are kept of them, and copies that were drawn from these maps. Nothing "
    "but the maps is carried to later tasks."
)


class CopyBank(Bank):
    """`task_<t>/<class>/<class>-<item>_seed<copy>.png`: copies of the images of a task's classes.

    What a copy is called and shows depends on its class, its edge map, its number and the run's seed alone, so one that
    was drawn for a new image serves again when this image has become an exemplar; in another chunk a pixel may move by
    a grey level. The manifest's ``files`` grow with every drawing.

    Args:
        root, config, data, run: see `Bank`.
        source: draws what is missing.
    """

    def __init__(self, root: Path, config: SourceConfig, data: DataManager, run: Run, source: ExemplarCompression):
        super().__init__(root, config, data, run)
        self.source = source

    def draw(self, source: ExemplarCompression, task: Task, classes: Iterable[int]) -> None:
        """Copies of the compressed exemplars of a task's classes: the first, or with ``prepare: all`` every one."""
        classes = list(classes)
        every = source.config.augmentations_per_image if source.config.prepare == "all" else 1
        images = self.copies(source.requests(classes, every))
        if not len(images):
            return
        self._show(task, classes)
        if self.run.runtime.is_main:
            rows = [images.select([label]) for label in classes]
            atomic_write(self._folder(task.index) / "preview.png", encode_image(preview(rows), ".png"))

    def stored(self, classes: Iterable[int]) -> ImageSet:
        """The first copy of every compressed exemplar of these classes."""
        return self.copies(self.source.requests(list(classes)))

    def copies(self, requests: Requests) -> ImageSet:
        """The images asked for, as files, in the order of ``requests``; those that are not there are drawn.

        Raises:
            BankError: if a folder holds images of another run.
        """
        tasks = torch.tensor([self.task_of[label] for label in requests.labels.tolist()], dtype=torch.int64)
        paths: list[str] = [""] * len(requests)
        for index in tasks.unique().tolist():
            places = (tasks == index).nonzero().flatten()
            for place, path in zip(places.tolist(), self._bring(self._folder(index), requests.take(places))):
                paths[place] = str(path)
        return ImageSet.of(paths, requests.labels)

    def _bring(self, folder: Path, requests: Requests) -> list[Path]:
        """The files of these requests. The manifest names those of earlier calls; only the others are drawn.

        It is written at the end, so that after a kill the same ones are missing, and fall into the same chunks.
        """
        manifest = self._open(folder)
        paths = image_paths(folder, requests)
        there = {name.rpartition(".")[0] for name in manifest["files"]}
        names = [path.relative_to(folder).as_posix() for path in paths]
        first = {name: position for position, name in reversed(list(enumerate(names))) if name not in there}
        if first:
            wanted = self.source.in_drawing_order(requests.take(torch.tensor(sorted(first.values()))))
            draw_missing(self.source, folder, [wanted])
            new = {path.relative_to(folder).as_posix(): path for name in first if (path := find_image(folder / name))}
            manifest["files"] |= {name: file_hash(path) for name, path in sorted(new.items())}
            if self.run.runtime.is_main:
                write_json(folder / MANIFEST, manifest)
            self.run.runtime.accelerator.wait_for_everyone()  # others would read the manifest of before
        return [find_image(path) for path in paths]

    def _open(self, folder: Path) -> dict[str, Any]:
        """The folder's manifest, new where there is none; without images that were damaged since they were drawn."""
        if folder not in self._verified:
            self._verified.add(folder)
            with self.run.runtime.accelerator.main_process_first():
                if self.run.runtime.is_main:
                    write_json(folder / MANIFEST, self._verified_manifest(folder))
        return json.loads((folder / MANIFEST).read_text())

    def _verified_manifest(self, folder: Path) -> dict[str, Any]:
        classes = self._classes(int(folder.name.rpartition("_")[2]))
        manifest = self._manifest(self.source, classes, (self.run.seed, self.config.name))
        del manifest["per_class"]
        if not (folder / MANIFEST).exists():
            return manifest
        stored = json.loads((folder / MANIFEST).read_text())
        require_same(folder, stored, manifest, [field for field in manifest if field != "files"], REMEDY)
        for name in damaged_files(folder, stored["files"]):
            log.warning("%s is missing or damaged: it is drawn again when it is wanted", folder / name)
            (folder / name).unlink(missing_ok=True)
            del stored["files"][name]
        return stored

    def newest(self, label: int) -> list[str]:
        """Paths of one copy of each image of a class, the first that was drawn."""
        paths = sorted((self._folder(self.task_of[label]) / str(label)).glob(f"{label}-*_seed*.*"))
        return list({path.name.partition("_seed")[0]: str(path) for path in reversed(paths)}.values())[::-1]

    def memory_bytes(self) -> int:
        """0: all of them can be drawn again from the edge maps."""
        return 0

    def _show(self, task: Task, classes: list[int]) -> None:
        """Originals, maps and copies of some of the task's exemplars, for the report."""
        chosen = self.source.requests(classes)
        best = [int((chosen.labels == label).nonzero()[0]) for label in classes if (chosen.labels == label).any()]
        picks = chosen.take(torch.tensor(best[:PICTURED]))
        number = min(3, self.config.augmentations_per_image)
        columns = [
            self.copies(self.source.ask(picks.labels, picks.item, torch.full_like(picks.item, copy)))
            for copy in range(number)
        ]
        rows = []
        for position, (label, item) in enumerate(zip(picks.labels.tolist(), picks.item.tolist())):
            edges = next(one for one in self.source.maps[label] if one.item == item).edges()
            cells = [Cell(self.source.originals[item]) if item in self.source.originals else None]
            cells.append(Cell(edges.to(torch.uint8)[None] * 255, f"{-(-edges.numel() // 8)} bytes"))
            cells += [Cell(column.image(position)) for column in columns]
            rows.append(PanelRow(self.data.class_names[label], cells))
        names = ["original", "edge map", *(f"copy {copy}" for copy in range(number))]
        panel = Panel("Compressed exemplars", NOTE, names, rows, f"Task {task.index}")
        self.run.panels.write(f"compressed_{task.index}", panel)


class TrainingCopies:
    """Copies of all samples of a training: see `synth.escort.batches.Copies`.

    Args:
        bank: where they lie.
        images: new images and real exemplars, each shown as a copy with ``augmentation_prob``.
        replay: the first copies of compressed exemplars, of which there is no other image.
    """

    def __init__(self, bank: CopyBank, images: ImageSet, replay: ImageSet):
        config = bank.config
        self.bank, self.num_copies = bank, config.augmentations_per_image
        self.labels = torch.cat([images.labels, replay.labels])
        chance = torch.full((len(images),), config.augmentation_prob)
        self.chances = torch.cat([chance, torch.ones(len(replay))])
        at_hand = bank.source.read(images) if config.augmentation_prob else torch.full((len(images),), -1)
        self.items = torch.cat([at_hand, _items(replay)])
        if config.prepare == "all":
            shown = (self.chances > 0).nonzero().flatten()
            every = torch.arange(self.num_copies).repeat_interleave(len(shown))
            self.draw(shown.repeat(self.num_copies), every)

    def draw(self, samples: Tensor, numbers: Tensor) -> ImageSet:
        with self.bank.run.timed("generate"):
            return self.bank.copies(self.bank.source.ask(self.labels[samples], self.items[samples], numbers))


def _items(copies: ImageSet) -> Tensor:
    """The items that stored copies are of, by their names, int64 (N,)."""
    names = [Path(path).stem for part in copies.parts for path in part.images]
    return torch.tensor([int(name.rpartition("-")[2].partition("_")[0], 16) for name in names], dtype=torch.int64)
