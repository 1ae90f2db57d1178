"""Replay images on disk: a folder per task and class, a preview to look at, a manifest that says whose they are."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from synth.base import ReplaySource, Requests
from utils.checkpoint import atomic_write, file_hash, write_json
from utils.config import SourceConfig
from utils.data_manager import DataManager, Task
from utils.errors import BankError
from utils.images import IMAGE_SUFFIXES, ImageSet
from utils.run import Run

log = logging.getLogger("reprise")
LARGEST_PNG = 64  # pixels; larger images are stored as JPEG
PREVIEW_COLUMNS = 10
ADOPTED_FIELDS = ("dataset", "class_order", "classes")  # what is known of images that another program drew
# Keys that say where images lie or how much is asked for, not what they look like.
NOT_SETTINGS = {"syn_image_path", "adopt_syn_images", "syn_per_class", "fit_after_last_task"}


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
        self._verified: set[Path] = set()
        self.task_of: dict[int, int] = {}  # class -> the task that brought it
        for index, size in enumerate(data.task_sizes):
            self.task_of |= dict.fromkeys(range(len(self.task_of), len(self.task_of) + size), index)

    def draw(self, source: ReplaySource, task: Task, classes: Iterable[int]) -> None:
        """Draw a task's classes once, into `task_<t>`."""
        key = (self.run.seed, self.config.name, task.index)
        self._fill(source, self.root / f"task_{task.index}", list(classes), key)

    def redraw(self, source: ReplaySource, task: Task) -> ImageSet:
        """Draw all old classes anew from the newest source, into `task_<t of the class>/redraw_<u>`."""
        key = (self.run.seed, self.config.name, task.index)
        images = ImageSet()
        for index in range(task.index):
            classes = [label for label in range(task.num_old) if self.task_of[label] == index]
            folder = self.root / f"task_{index}" / f"redraw_{task.index}"
            self._fill(source, folder, classes, key)
            images = images + self._read(folder, classes)
        return images

    def stored(self, classes: Iterable[int]) -> ImageSet:
        """The images of classes that were drawn before, as file paths.

        Raises:
            BankError: if a class has none.
        """
        images = ImageSet()
        for label in classes:
            folder = self.root / f"task_{self.task_of[label]}"
            self._verify(folder)
            images = images + self._read(folder, [label])
        return images

    def _verify(self, folder: Path) -> None:
        """Compare a finished folder's files with their hashes, once per process."""
        if folder in self._verified:
            return
        self._verified.add(folder)
        path = folder / "manifest.json"
        files = json.loads(path.read_text())["files"] if path.exists() else {}
        damaged = [name for name, digest in files.items() if _damaged(folder / name, digest)]
        if damaged or not files:
            what = (
                f"{len(damaged)} images of {folder} have" if files else f"{folder} has no finished manifest: its images"
            )
            raise BankError(f"{what} changed since they were drawn ({', '.join(damaged[:3])}); --overwrite draws anew")

    def newest(self, label: int) -> list[str]:
        """Paths of the last images drawn of a class; empty if none were."""
        folder = self.root / f"task_{self.task_of[label]}"
        redraws = sorted(folder.glob("redraw_*"), key=lambda path: int(path.name.rpartition("_")[2]))
        return [str(path) for path in _images_in((redraws or [folder])[-1] / str(label))]

    def memory_bytes(self) -> int:
        """Bytes of the stored images; 0 where images are redrawn, since they need not be carried from task to task."""
        if self.config.replay == "redraw":
            return 0
        files = (path for path in self.root.glob("task_*/*/*") if path.suffix in IMAGE_SUFFIXES)
        return sum(path.stat().st_size for path in files if path.parent.name.isdigit())

    def _per_class(self, classes: list[int]) -> int:
        if self.config.syn_per_class is not None:
            return self.config.syn_per_class
        counts = [self.data.class_counts[label] for label in classes]
        return max(1, round(sum(counts) / len(counts)))

    def _read(self, folder: Path, classes: list[int]) -> ImageSet:
        paths: list[str] = []
        labels: list[int] = []
        for label in classes:
            found = _images_in(folder / str(label))
            if not found:
                raise BankError(
                    f"no replay images of class {label} in {folder / str(label)}: delete {folder} to redraw"
                )
            paths += map(str, found)
            labels += [label] * len(found)
        return ImageSet.of(paths, torch.tensor(labels, dtype=torch.int64))

    def _fill(self, source: ReplaySource, folder: Path, classes: list[int], key: tuple[int | str, ...]) -> None:
        """Bring a folder to its full count; chunks that are there already are left alone."""
        requests = Requests.of_classes(classes, self._per_class(classes), key)
        manifest = self._manifest(source, classes, requests)
        with self.run.runtime.accelerator.main_process_first():  # the main process lays the manifest, others find it
            complete = self._check(folder, manifest, classes)
        if complete:
            return
        chunks = list(requests.chunks(self.config.sample_batch))
        rank, world = self.run.runtime.shard
        bar = self.run.bar(len(requests), f"drawing {folder.name}")
        for chunk in chunks[rank::world]:
            paths = [self._path(folder, label, copy) for label, copy in zip(chunk.labels.tolist(), chunk.copy.tolist())]
            # A chunk is redone as a whole: its images depend on each other in the last bit of the arithmetic.
            if not all(path.exists() for path in paths):
                for path, image in zip(paths, source.generate(chunk).decoded().parts[0].images):
                    atomic_write(path, encode_image(image, path.suffix), sync=False)
            bar.update(len(chunk))
        bar.close()
        self.run.runtime.accelerator.wait_for_everyone()
        if self.run.runtime.is_main:
            manifest["files"] = {
                str(path.relative_to(folder)): file_hash(path)
                for label in classes
                for path in _images_in(folder / str(label))
            }
            images = {label: self._read(folder, [label]) for label in classes}
            atomic_write(folder / "preview.png", encode_image(preview(list(images.values())), ".png"))
            write_json(folder / "manifest.json", manifest)

    def _path(self, folder: Path, label: int, copy: int) -> Path:
        suffix = self.config.image_format
        if suffix == "auto":
            suffix = "png" if self.data.dataset.image_size <= LARGEST_PNG else "jpg"
        return folder / str(label) / f"{label}-{copy}.{suffix}"

    def _manifest(self, source: ReplaySource, classes: list[int], requests: Requests) -> dict[str, Any]:
        """What must be equal for images to belong to this run, and what tells a reader what they are."""
        names, order = self.data.class_names, self.data.class_order
        return {
            "dataset": self.data.dataset.name,
            "class_order": order,
            "source": self.config.name,
            "settings": self.config.model_dump(mode="json", exclude=NOT_SETTINGS),
            "run_seed": self.run.seed,
            "weights": source.fingerprint(),
            "per_class": len(requests) // len(classes),
            "sample_key": list(requests.key),
            "classes": {str(label): {"name": names[label], "original_id": order[label]} for label in classes},
            "files": {},
        }

    def _check(self, folder: Path, manifest: dict[str, Any], classes: list[int]) -> bool:
        """Whether the folder is complete; an empty one gets a manifest to be filled.

        Raises:
            BankError: if the folder's images belong to another run; the first difference is named.
        """
        path = folder / "manifest.json"
        if not path.exists():
            if any(_images_in(folder / str(label)) for label in classes):
                self._adopt(folder, manifest, classes)
                return True
            if self.run.runtime.is_main:
                write_json(path, manifest)
            return False
        stored = json.loads(path.read_text())
        for field in ADOPTED_FIELDS if stored.get("adopted") else manifest.keys() - {"files"}:
            if stored.get(field) != manifest[field]:
                raise BankError(
                    f"the replay images in {folder} are of another run: {field} is {_short(stored.get(field))} there, "
                    f"{_short(manifest[field])} here. Give another --name or syn_image_path, or delete the folder"
                )
        damaged = [name for name, digest in stored["files"].items() if _damaged(folder / name, digest)]
        for name in damaged:
            log.warning("%s is missing or damaged: its chunk is drawn again", folder / name)
            (folder / name).unlink(missing_ok=True)
        return bool(stored["files"]) and not damaged

    def _adopt(self, folder: Path, manifest: dict[str, Any], classes: list[int]) -> None:
        """Take over images that another program left without a manifest."""
        counts = {label: len(_images_in(folder / str(label))) for label in classes}
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
        files = [path for label in classes for path in _images_in(folder / str(label))]
        hashes = {str(path.relative_to(folder)): file_hash(path) for path in files}
        write_json(folder / "manifest.json", {**manifest, "weights": None, "adopted": True, "files": hashes})


def _images_in(folder: Path) -> list[Path]:
    """Image files `<class>-<i>.*` in the order of i."""
    files = (path for path in folder.glob("*-*") if path.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(files, key=lambda path: int(path.stem.rpartition("-")[2]))


def _damaged(path: Path, digest: str) -> bool:
    return not path.exists() or file_hash(path) != digest


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def encode_image(image: Tensor, suffix: str) -> bytes:
    """One uint8 (C, H, W) image as the bytes of a PNG, or a JPEG of quality 95."""
    array = image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG" if suffix == ".png" else "JPEG", quality=95)
    return buffer.getvalue()


def preview(rows: list[ImageSet]) -> Tensor:
    """The first images of every class, one class a row, uint8 (C, H, W); small images are enlarged."""
    lines = []
    for images in rows:
        picked = images.take(range(min(PREVIEW_COLUMNS, len(images)))).decoded().parts[0].images
        blank = torch.zeros(PREVIEW_COLUMNS - len(picked), *picked.shape[1:], dtype=torch.uint8)
        lines.append(torch.cat([picked, blank]))
    scale = max(1, 64 // lines[0].shape[-1])
    tiles = torch.stack(lines).repeat_interleave(scale, -1).repeat_interleave(scale, -2)  # (R, K, C, H, W)
    tiles = torch.nn.functional.pad(tiles, (2, 2, 2, 2), value=255)
    return tiles.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
