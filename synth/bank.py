"""Replay images on disk: a folder per task and class, a preview to look at, a manifest that says whose they are."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from synth.base import ReplaySource
from synth.drawing import (
    MANIFEST,
    damaged_files,
    delete_images,
    draw_missing,
    file_hashes,
    images_in,
    preview,
    require_same,
    save_image,
    short,
)  # fmt: skip
from synth.requests import Requests
from utils.data.images import IMAGE_SUFFIXES, ImageSet, encode_image
from utils.data.manager import DataManager, Task
from utils.run.config import SourceConfig
from utils.run.errors import BankError
from utils.training.checkpoint import atomic_write, write_json
from utils.training.run import Run

log = logging.getLogger("reprise")
LABEL_FIELDS = ("dataset", "class_order", "classes")  # what must fit of images that this run does not draw itself
# Keys that say where images lie or how much is asked for, not what they look like.
NOT_SETTINGS = {
    "need_syn_imgs", "syn_image_path", "adopt_syn_images", "syn_per_class", "fit_after_last_task", "keep_sources",
    "source_dir", "real_per_class", "augmentation_prob", "augmentations_per_image", "prepare",
}  # fmt: skip
DRAWN = "drawn"  # folder of what a learner drew in its training
REMEDY = "Give another --name or syn_image_path, or delete the folder"


class Bank:
    """`outputs/syn_image_<run>_seed<s>`: draws what is missing, hands out what is there, refuses what is foreign.

    Args:
        root: folder of the images.
        config: of the source.
        data: class order, names, counts.
        run: random keys, log.
    """

    def __init__(self, root: Path, config: SourceConfig, data: DataManager, run: Run):
        self.root, self.config, self.data, self.run = Path(root), config, data, run
        self._verified: set[Path] = set()  # folders whose files have the hashes that they were drawn with
        self._required: set[Path] = set()  # folders that hold what ``need_syn_imgs: false`` relies on
        self.kept: dict[int, int] = {}  # class -> its first images that are left, where a budget took the others
        self.task_of: dict[int, int] = {}  # class -> the task that brought it
        for index, size in enumerate(data.task_sizes):
            self.task_of |= dict.fromkeys(range(len(self.task_of), len(self.task_of) + size), index)

    def draw(self, source: ReplaySource, task: Task, classes: Iterable[int]) -> None:
        """Draw a task's classes once, into `task_<t>`; with ``need_syn_imgs`` false see that they are there.

        Raises:
            BankError: if the folder holds images of another run, or too few that nobody is to draw.
        """
        key = (self.run.seed, self.config.name, task.index)
        self._fill(source, self._folder(task.index), list(classes), key)

    def redraw(self, source: ReplaySource, task: Task) -> ImageSet:
        """Draw all old classes anew from the newest source, into `task_<t of the class>/redraw_<u>`."""
        key = (self.run.seed, self.config.name, task.index)
        images = ImageSet()
        for index in range(task.index):
            folder = self._folder(index) / f"redraw_{task.index}"
            self._fill(source, folder, self._classes(index), key)
            images = images + self._read(folder, self._classes(index))
        return images

    def stored(self, classes: Iterable[int]) -> ImageSet:
        """The images of classes that were drawn before, as file paths.

        Raises:
            BankError: if a class has none, or too few that nobody is to draw.
        """
        images = ImageSet()
        for label in classes:
            if self.kept.get(label) == 0:
                continue
            folder = self._folder(self.task_of[label])
            if not self.config.need_syn_imgs:
                self.require(self.task_of[label])
            self._verify(folder)
            images = images + self._read(folder, [label])
        return images

    def show(self, task: Task, images: ImageSet) -> None:
        """Lay images that a learner drew for itself while it learned a task into `task_<t>/drawn`, to be looked at."""
        folder = self._folder(task.index) / DRAWN
        if not self.run.runtime.is_main:
            return
        shutil.rmtree(folder, ignore_errors=True)
        rows = {label: images.select([label]) for label in images.classes}
        for label, row in rows.items():
            for copy in range(len(row)):
                save_image(folder / str(label) / f"{label}-{copy}", row.image(copy), self.config)
        atomic_write(folder / "preview.png", encode_image(preview(list(rows.values())), ".png"))

    def require(self, index: int) -> None:
        """See that a task's images, which nobody is to draw, are there, enough, and of this run's classes.

        Raises:
            BankError: if they are not.
        """
        self._require(self._folder(index), self._classes(index))

    def _folder(self, index: int) -> Path:
        return self.root / f"task_{index}"

    def _require(self, folder: Path, classes: list[int]) -> None:
        if folder in self._required:
            return
        counts, wanted = _counts(folder, classes), self._per_class(classes[0])
        if min(counts.values()) < wanted:
            raise BankError(
                f"need_syn_imgs=false, but {folder} has {short(counts)} images per class, {wanted} are wanted: name "
                "another folder with syn_image_path, lower syn_per_class, or set need_syn_imgs=true"
            )
        manifest = self._manifest(None, classes, (self.run.seed, self.config.name, self.task_of[classes[0]]))
        with self.run.runtime.accelerator.main_process_first():
            if (folder / MANIFEST).exists():
                require_same(folder, json.loads((folder / MANIFEST).read_text()), manifest, LABEL_FIELDS, REMEDY)
            else:
                self._adopt(folder, manifest, classes)
        self._required.add(folder)

    def _verify(self, folder: Path) -> None:
        """Compare a finished folder's files with their hashes, once per process."""
        if folder in self._verified:
            return
        self._verified.add(folder)
        path = folder / MANIFEST
        files = json.loads(path.read_text())["files"] if path.exists() else {}
        damaged = damaged_files(folder, files)
        if damaged or not files:
            what = f"{len(damaged)} images of {folder} have" if files else f"{folder} was never finished: its images"
            raise BankError(f"{what} changed since they were drawn ({', '.join(damaged[:3])}); --overwrite draws anew")

    def newest(self, label: int) -> list[str]:
        """Paths of the last images drawn of a class; empty if none were."""
        own = self._folder(self.task_of[label])
        dated = [(-1, own)] + [(_number(path), path) for path in own.glob("redraw_*")]
        dated += [(_number(path.parent), path) for path in self.root.glob(f"task_*/{DRAWN}")]
        for _, folder in sorted(dated, reverse=True):
            if images := images_in(folder / str(label)):
                return list(map(str, images))
        return []

    def memory_bytes(self) -> int:
        """Bytes of the stored images; 0 where images are redrawn, since they need not be carried from task to task."""
        if self.config.replay == "redraw":
            return 0
        files = (path for path in self.root.glob("task_*/*/*") if path.suffix in IMAGE_SUFFIXES)
        stored = sum(path.stat().st_size for path in files if path.parent.name.isdigit())
        return stored - sum(path.stat().st_size for label in self.kept for path in self._images_of(label, False))

    def counts(self) -> dict[int, int]:
        """Images that `drop_last` may take, by class; none of a folder that the user named, which others may share."""
        if self.config.syn_image_path is not None or not self.config.need_syn_imgs or not self.memory_bytes():
            return {}
        return {label: count for label in self.task_of if (count := len(self._images_of(label)))}

    def drop_last(self, label: int) -> int:
        """Give up the last image of a class, whose file goes with the next `prune`; returns its bytes."""
        *rest, last = self._images_of(label)
        self.kept[label] = len(rest)
        return last.stat().st_size

    def prune(self) -> None:
        """Delete what was given up, once a checkpoint knows it: until then, a killed run repeats its task with all."""
        for label in self.kept:
            delete_images(self._folder(self.task_of[label]), self._images_of(label, False))

    def _images_of(self, label: int, kept: bool = True) -> list[Path]:
        """The stored images of a class that are kept, or those that are given up."""
        found, count = images_in(self._folder(self.task_of[label]) / str(label)), self.kept.get(label)
        return found[:count] if kept else found[count:]

    def _classes(self, index: int) -> list[int]:
        return [label for label, task in self.task_of.items() if task == index]

    def _per_class(self, label: int) -> int:
        if self.config.syn_per_class is not None:
            return self.config.syn_per_class
        counts = self.data.class_counts
        own = [counts[other] for other in self._classes(self.task_of[label])]
        return max(1, round(sum(own) / len(own)))

    def _read(self, folder: Path, classes: list[int]) -> ImageSet:
        """The first images of every class, as many as are wanted; a folder of another run may hold more."""
        paths: list[str] = []
        labels: list[int] = []
        for label in classes:
            found = images_in(folder / str(label))[: self.kept.get(label, self._per_class(label))]
            if not found:
                raise BankError(
                    f"no replay images of class {label} in {folder / str(label)}: delete {folder} to redraw"
                )
            paths += map(str, found)
            labels += [label] * len(found)
        return ImageSet.of(paths, torch.tensor(labels, dtype=torch.int64))

    def _fill(self, source: ReplaySource, folder: Path, classes: list[int], key: tuple[int | str, ...]) -> None:
        """Bring a folder to its full count; chunks that are there already are left alone."""
        if not self.config.need_syn_imgs:
            self._require(folder, classes)
            return
        requests = Requests.of_classes(classes, self._per_class(classes[0]), key)
        manifest = self._manifest(source, classes, key)
        with self.run.runtime.accelerator.main_process_first():  # the main process lays the manifest, others find it
            complete = self._check(folder, manifest, classes)
        if complete:
            return
        draw_missing(source, folder, [requests])
        if self.run.runtime.is_main:
            manifest["files"] = file_hashes(folder, classes)
            images = {label: self._read(folder, [label]) for label in classes}
            atomic_write(folder / "preview.png", encode_image(preview(list(images.values())), ".png"))
            write_json(folder / MANIFEST, manifest)

    def _manifest(self, source: ReplaySource | None, classes: list[int], key: tuple[int | str, ...]) -> dict[str, Any]:
        """What must be equal for images to belong to this run, and what tells a reader what they are."""
        names, order = self.data.class_names, self.data.class_order
        return {
            "dataset": self.data.dataset.name,
            "class_order": order,
            "source": self.config.name,
            "settings": self.config.model_dump(mode="json", exclude=NOT_SETTINGS),
            "run_seed": self.run.seed,
            "weights": None if source is None else source.fingerprint(),
            "per_class": self._per_class(classes[0]),
            "sample_key": list(key),
            "classes": {str(label): {"name": names[label], "original_id": order[label]} for label in classes},
            "files": {},
        }

    def _check(self, folder: Path, manifest: dict[str, Any], classes: list[int]) -> bool:
        """Whether the folder is complete; an empty one gets a manifest to be filled.

        Raises:
            BankError: if the folder's images belong to another run; the first difference is named.
        """
        path = folder / MANIFEST
        if not path.exists():
            if any(images_in(folder / str(label)) for label in classes):
                self._adopt(folder, manifest, classes)
                return True
            if self.run.runtime.is_main:
                write_json(path, manifest)
            return False
        stored = json.loads(path.read_text())
        fields = LABEL_FIELDS if stored.get("adopted") else [field for field in manifest if field != "files"]
        require_same(folder, stored, manifest, fields, REMEDY)
        damaged = damaged_files(folder, stored["files"])
        for name in damaged:
            log.warning("%s is missing or damaged: its chunk is drawn again", folder / name)
            (folder / name).unlink(missing_ok=True)
        return bool(stored["files"]) and not damaged

    def _adopt(self, folder: Path, manifest: dict[str, Any], classes: list[int]) -> None:
        """Take over images that another program left without a manifest."""
        counts = _counts(folder, classes)
        if not self.config.adopt_syn_images:
            raise BankError(
                f"{folder} holds images but no manifest.json, so nobody knows whose classes they are: set "
                "synth.adopt_syn_images=true if they are of this data set, in this class order, or name another folder"
            )
        if min(counts.values()) < manifest["per_class"]:
            raise BankError(
                f"cannot adopt {folder}: it has {counts} images, {manifest['per_class']} per class are wanted"
            )
        log.info("Adopted %d images in %s, taken to be in this run's class order", sum(counts.values()), folder)
        hashes = file_hashes(folder, classes)
        write_json(folder / MANIFEST, {**manifest, "weights": None, "adopted": True, "files": hashes})


def _number(folder: Path) -> int:
    return int(folder.name.rpartition("_")[2])


def _counts(folder: Path, classes: list[int]) -> dict[int, int]:
    return {label: len(images_in(folder / str(label))) for label in classes}
