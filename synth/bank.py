"""Replay images on disk: a folder per task and class, a preview to look at, a manifest that says whose they are."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from synth.base import ReplaySource
from synth.drawing import ImageFolder, found_images
from synth.requests import Requests
from utils.data.images import ImageSet
from utils.data.manager import DataManager
from utils.run.errors import BankError
from utils.run.files import file_hash
from utils.run.folder import replay_manifest
from utils.run.manifest import shorten

log = logging.getLogger("reprise")
LABEL_FIELDS = ("dataset", "class_order", "classes")  # what must fit of images that this run does not draw itself
REMEDY = "Give another --name or syn_image_path, or delete the folder"
REDRAW = "redraw_"  # folders of images that were drawn again for a later task


class Bank:
    """`outputs/syn_image_<run>_seed<s>`: draws what is missing, hands out what is there, refuses what is foreign.

    Args:
        root: folder of the images.
        source: draws them; its config says how many.
        data: class order, names, counts.
    """

    def __init__(self, root: Path, source: ReplaySource, data: DataManager):
        self.root, self.source, self.data = Path(root), source, data
        self.config, self.run = source.config, source.run
        self.folders: dict[Path, ImageFolder] = {}  # those that were claimed
        self.kept: dict[int, int] = {}  # class -> its first images that are left, where a budget took the others
        self.task_of: dict[int, int] = {}  # class -> the task that brought it
        for index, size in enumerate(data.task_sizes):
            self.task_of |= dict.fromkeys(range(len(self.task_of), len(self.task_of) + size), index)

    # ------------------------------------------------------------------ drawing and reading

    def draw(self, index: int, classes: Iterable[int]) -> None:
        """Draw classes of a task once, into `task_<t>`.

        Raises:
            BankError: if the folder holds images of another run.
        """
        self._fill(self.root / f"task_{index}", list(classes), index)

    def redraw(self, index: int) -> ImageSet:
        """Draw all classes before a task anew from the source as it is, into `task_<t of the class>/redraw_<index>`."""
        images = ImageSet()
        for earlier in range(index):
            folder = self.root / f"task_{earlier}" / f"{REDRAW}{index}"
            images = images + self._read(self._fill(folder, self.classes_of(earlier), index), self.classes_of(earlier))
        return images

    def stored(self, classes: Iterable[int]) -> ImageSet:
        """Return the images of classes that were drawn before, as file paths.

        Raises:
            BankError: if a class has none, or images are missing or damaged.
        """
        images = ImageSet()
        for label in classes:
            if self.kept.get(label) == 0:
                continue
            folder = self.root / f"task_{self.task_of[label]}"
            if folder not in self.folders:
                self._open(folder, self.task_of[label])
            images = images + self._read(self.folders[folder], [label])
        return images

    def newest(self, label: int) -> list[str]:
        """Return paths of the last images drawn of a class; empty if none were."""
        own = self.root / f"task_{self.task_of[label]}"
        redrawn = [path for path in self.folders if path.parent == own]
        for path in [*sorted(redrawn, key=lambda path: int(path.name.removeprefix(REDRAW)), reverse=True), own]:
            if path in self.folders and (images := self.folders[path].of_class(label)):
                return list(map(str, images))
        return []

    def adopt(self, index: int, may_adopt: bool) -> None:
        """See that a task's images, which nobody is to draw, are there, enough, and of this run's classes.

        Args:
            index: of the task.
            may_adopt: take over a folder that has no manifest.

        Raises:
            BankError: if they are not.
        """
        folder, classes = self.root / f"task_{index}", self.classes_of(index)
        if folder in self.folders:
            return
        place = self._place(folder, classes, index)
        found = list(place.manifest.files()) or found_images(folder)
        counts = {label: sum(name.startswith(f"{label}/") for name in found) for label in classes}
        if min(counts.values()) < (wanted := self.per_class(classes[0])):
            raise BankError(
                f"need_syn_imgs=false, but {folder} has {shorten(counts)} images per class, {wanted} are wanted: name "
                "another folder with syn_image_path, lower syn_per_class, or set need_syn_imgs=true"
            )
        if not place.manifest.exists:
            self._take_over(place, found, may_adopt)
        place.claim(LABEL_FIELDS)
        self.folders[folder] = place

    def _fill(self, folder: Path, classes: list[int], index: int) -> ImageFolder:
        """Bring a folder to its full count."""
        requests = Requests.of_classes(classes, self.per_class(classes[0]), self.key(index))
        place = self._place(folder, classes, index)
        if self.config.syn_image_path is None and self.run.runtime.is_main:
            replay_manifest(self.root).claim()
        if not place.manifest.exists and self.config.adopt_syn_images and (found := found_images(folder)):
            self._take_over(place, found, may_adopt=True)
        adopted = place.manifest.exists and place.manifest.read().get("adopted")
        place.claim(LABEL_FIELDS if adopted else None)
        self.folders[folder] = place
        if not adopted and place.lacks([requests]):
            place.draw(self.source, [requests])
            place.write_preview([self._read(place, [label]) for label in classes])
        return place

    def _open(self, folder: Path, index: int) -> None:
        """Take a folder that was filled in an earlier process, whole."""
        place = self._place(folder, self.classes_of(index), index)
        content = place.manifest.verify()
        place.files = content["files"]
        self.folders[folder] = place

    def _take_over(self, place: ImageFolder, found: list[str], may_adopt: bool) -> None:
        """Write the manifest of images that another program left without one."""
        folder = place.folder
        if not may_adopt:
            raise BankError(
                f"{folder} holds images but no manifest.json, so nobody knows whose classes they are: set "
                "synth.adopt_syn_images=true if they are of this data set, in this class order, or name another folder"
            )
        wanted, own = place.manifest.identity["per_class"], place.manifest.identity["classes"]
        counts = {label: sum(name.startswith(f"{label}/") for name in found) for label in own}
        if min(counts.values()) < wanted:
            raise BankError(f"cannot adopt {folder}: it has {counts} images, {wanted} per class are wanted")
        log.info("Adopted %d images in %s, taken to be in this run's class order", len(found), folder)
        with self.run.runtime.accelerator.main_process_first():
            if self.run.runtime.is_main:
                hashes = {name: file_hash(folder / name) for name in found}
                place.manifest.store(hashes, weights=None, adopted=True)

    def _place(self, folder: Path, classes: list[int], index: int) -> ImageFolder:
        identity = self.identity(classes, self.key(index)) | {"per_class": self.per_class(classes[0])}
        return ImageFolder(folder, self.run, identity, REMEDY)

    def _read(self, place: ImageFolder, classes: list[int]) -> ImageSet:
        """Return the first images of every class, as many as are wanted; a folder of another run may hold more."""
        paths: list[str] = []
        labels: list[int] = []
        for label in classes:
            wanted = self.kept.get(label, self.per_class(label))
            found = place.of_class(label)[:wanted]
            if len(found) < wanted:
                raise BankError(
                    f"{place.folder} has {len(found)} of {wanted} replay images of class {label}: a later "
                    "checkpoint gave the others up, or they were drawn for another run; begin anew with --overwrite"
                )
            paths += map(str, found)
            labels += [label] * len(found)
        return ImageSet.of(paths, torch.tensor(labels, dtype=torch.int64))

    # ------------------------------------------------------------------ whose they are

    def key(self, index: int) -> tuple[int | str, ...]:
        """Return the random key of images that are drawn in the name of a task."""
        return self.run.seed, self.config.name, index

    def identity(self, classes: list[int], key: tuple[int | str, ...]) -> dict[str, Any]:
        """Say what must be equal for images to belong to this run, and what tells a reader what they are."""
        names, order = self.data.class_names, self.data.class_order
        return {
            "dataset": self.data.dataset.name,
            "class_order": order,
            "source": self.config.name,
            "settings": self.config.sample_settings(),
            "run_seed": self.run.seed,
            "weights": self.source.fingerprint() if self.config.need_syn_imgs else None,
            "sample_key": list(key),
            "classes": {str(label): {"name": names[label], "original_id": order[label]} for label in classes},
        }

    def classes_of(self, index: int) -> list[int]:
        return [label for label, task in self.task_of.items() if task == index]

    def per_class(self, label: int) -> int:
        """Return how many images of a class are wanted."""
        if self.config.syn_per_class is not None:
            return self.config.syn_per_class
        counts = self.data.class_counts
        own = [counts[other] for other in self.classes_of(self.task_of[label])]
        return max(1, round(sum(own) / len(own)))

    # ------------------------------------------------------------------ what a budget takes

    def nbytes(self) -> int:
        """Add up the bytes of the stored images that are left."""
        return sum(path.stat().st_size for label in self.task_of for path in self._images(label))

    def counts(self) -> dict[int, int]:
        """Count the images that `drop_last` may take; none of a folder that the user named, which others may share."""
        if self.config.syn_image_path is not None or not self.config.need_syn_imgs:
            return {}
        return {label: count for label in self.task_of if (count := len(self._images(label)))}

    def drop_last(self, label: int) -> int:
        """Give up the last image of a class, whose file goes with the next `prune`; return its bytes."""
        *rest, last = self._images(label)
        self.kept[label] = len(rest)
        return last.stat().st_size

    def prune(self) -> None:
        """Delete what was given up, once a checkpoint knows it: until then, a killed run repeats its task with all."""
        for label, count in self.kept.items():
            if place := self._claimed(label):
                place.forget(place.of_class(label)[count:])

    def _claimed(self, label: int) -> ImageFolder | None:
        folder = self.root / f"task_{self.task_of[label]}"
        if folder not in self.folders and self._place(folder, [label], self.task_of[label]).manifest.files():
            self._open(folder, self.task_of[label])
        return self.folders.get(folder)

    def _images(self, label: int) -> list[Path]:
        place = self._claimed(label)
        return [] if place is None else place.of_class(label)[: self.kept.get(label)]
