"""Replay images on disk: a folder per task and class, a preview to look at, a manifest that says whose they are."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from synth.base import ReplaySource
from synth.drawing import ImageFolder, found_images, identify, name_classes
from synth.requests import Requests
from utils.data.images import ImageSet
from utils.data.manager import DataManager
from utils.run.errors import BankError
from utils.run.folder import replay_manifest
from utils.run.log import log
from utils.run.manifest import shorten

LABEL_FIELDS = ("dataset", "class_order", "classes")  # what must fit of images that this run does not draw itself
REMEDY = "Give another --name or syn_image_path, or delete the folder"


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
        # class -> the task that brought it
        self.task_of = dict(enumerate(np.repeat(range(data.num_tasks), data.task_sizes).tolist()))

    # ------------------------------------------------------------------ drawing and reading

    def fill(self, index: int, later: int | None = None) -> ImageFolder:
        """Bring a folder of a task to its full count: draw what is missing, or see that given images are enough.

        Args:
            index: of the task; the folder is `task_<t>`.
            later: a task that asks for images of its own, in `task_<t>/redraw_<later>`.

        Raises:
            BankError: if the folder holds images of another run, or given ones are too few or of unknown classes.
        """
        folder = self._folder(index) if later is None else self._folder(index) / f"redraw_{later}"
        if folder in self.folders:
            return self.folders[folder]
        self.claim_root()
        classes, key = self.classes_of(index), (self.run.seed, self.config.name, index if later is None else later)
        per_class = self.per_class(classes[0])
        place = self.place(folder, index, key, per_class=per_class)
        adopted = self._adopt(place)
        place.claim(LABEL_FIELDS if adopted else None)
        drew = not adopted and place.draw(self.source, [Requests.of_classes(classes, per_class, key)])
        if drew or not (adopted or place.preview.exists()):  # a kill may have come between images and preview
            place.write_preview([self._read(place, label) for label in classes])
        self.folders[folder] = place
        return place

    def redraw(self, index: int) -> ImageSet:
        """Draw all classes before a task anew from the source as it is."""
        images = ImageSet()
        for earlier in range(index):
            place = self.fill(earlier, index)
            images += sum((self._read(place, label) for label in self.classes_of(earlier)), ImageSet()).merged()
        return images

    def stored(self, classes: Iterable[int]) -> ImageSet:
        """Return the images of classes that were drawn before, as file paths.

        Raises:
            BankError: if a class has none, or images are missing or damaged.
        """
        return sum((self._read(self._open(self.task_of[label]), label) for label in classes), ImageSet())

    def holds(self, index: int) -> bool:
        """Whether there are images of a task."""
        return bool(found_images(self._folder(index)))

    def newest(self, label: int) -> list[str]:
        """Return paths of the last images drawn of a class; empty if none were."""
        drawn = (place.of_class(label) for place in reversed(self.folders.values()))
        return next((list(map(str, images)) for images in drawn if images), [])

    def _adopt(self, place: ImageFolder) -> bool:
        """Take over images that another run or program left, where they are to be used; whether they are such."""
        manifest, given, may_adopt = place.manifest, not self.config.need_syn_imgs, self.config.adopt_syn_images
        if (known := manifest.exists) and not given:
            return bool(manifest.read().get("adopted"))
        found = list(manifest.files()) or found_images(place.folder)
        if not given and not (may_adopt and found):
            return False
        wanted = manifest.identity["per_class"]
        counts = {label: sum(name.startswith(f"{label}/") for name in found) for label in manifest.identity["classes"]}
        if min(counts.values()) < wanted:
            key = "need_syn_imgs=false" if given else "adopt_syn_images=true"
            remedy = f"name another folder with syn_image_path, lower syn_per_class, or leave {key} out"
            there = f"{place.folder} has {shorten(counts)} images per class"
            raise BankError(f"{key}, but {there}, {wanted} are wanted: {remedy}")
        if not known and not may_adopt:
            remedy = "name another folder, or set synth.adopt_syn_images=true if they are of this data set and order"
            raise BankError(f"{place.folder} holds images, but no manifest.json says of which classes: {remedy}")
        if not known:
            log.info("Adopted %d images in %s, taken to be in this run's class order", len(found), place.folder)
            with self.run.runtime.accelerator.main_process_first():
                if self.run.runtime.is_main:
                    manifest.seal(found, weights=None, adopted=True)
        return True

    def _folder(self, index: int) -> Path:
        return self.root / f"task_{index}"

    def _open(self, index: int) -> ImageFolder:
        """Return the folder of a task, empty if nothing was drawn; one that an earlier process filled must be whole."""
        folder = self._folder(index)
        if folder in self.folders:
            return self.folders[folder]
        if not self.config.need_syn_imgs and self.holds(index):
            return self.fill(index)
        # Whose it is was seen when it was filled; saying it again would hash a generator for every class.
        place = ImageFolder(folder, self.run, {}, REMEDY)
        if place.manifest.files():
            place.files = place.manifest.verify()["files"]
            self.folders[folder] = place
        return place

    def _read(self, place: ImageFolder, label: int) -> ImageSet:
        """Return the first images of a class, as many as are wanted; a folder of another run may hold more."""
        wanted = self.kept.get(label, self.per_class(label))
        found = place.images(label, wanted)
        if len(found) < wanted:
            why = "a later checkpoint gave the others up, or they are of another run; begin anew with --overwrite"
            raise BankError(f"{place.folder} has {len(found)} of {wanted} replay images of class {label}: {why}")
        return found

    # ------------------------------------------------------------------ whose they are

    def place(self, folder: Path, index: int, key: tuple[int | str, ...], **also: Any) -> ImageFolder:
        """Return a folder of a task's images, neither claimed nor looked at yet.

        Args:
            folder: of the images.
            index: of the task.
            key: random key of the images.
            also: JSON that must be equal too for images to belong to this run.
        """
        order = self.data.class_order
        classes = name_classes(self.source, order, self.classes_of(index))
        identity = {**identify(self.source, order), "sample_key": list(key), "classes": classes, **also}
        return ImageFolder(folder, self.run, identity, REMEDY)

    def claim_root(self) -> None:
        """Make the folder of all images this project's, so that --overwrite may delete it; not one the user named."""
        if self.config.need_syn_imgs and self.config.syn_image_path is None and self.run.runtime.is_main:
            replay_manifest(self.root).claim()

    def classes_of(self, index: int) -> list[int]:
        return [label for label, task in self.task_of.items() if task == index]

    def per_class(self, label: int) -> int:
        """Return how many images of a class are wanted."""
        if self.config.syn_per_class is not None:
            return self.config.syn_per_class
        own = [self.data.class_counts[other] for other in self.classes_of(self.task_of[label])]
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

    def drop_last(self, label: int, count: int = 1) -> int:
        """Give up the last images of a class, whose files go with the next `prune`; return their bytes."""
        images = self._images(label)
        self.kept[label] = len(images) - count
        return sum(path.stat().st_size for path in images[-count:])

    def prune(self) -> None:
        """Delete what was given up, once a checkpoint knows it: until then, a killed run repeats its task with all."""
        for label, count in self.kept.items():
            place = self._open(self.task_of[label])
            place.forget(place.of_class(label)[count:])

    def _images(self, label: int) -> list[Path]:
        return self._open(self.task_of[label]).of_class(label)[: self.kept.get(label)]
