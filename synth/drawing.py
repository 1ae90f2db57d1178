"""A folder of drawn images, `<class>/<class>-<i>.png`, known by its manifest: what is missing is drawn."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import make_grid

from synth.base import ReplaySource
from synth.requests import Requests
from utils.data.images import ImageSet, encode_image
from utils.data.listing import list_images
from utils.data.transforms import stack_images
from utils.run.config import SourceConfig
from utils.run.errors import BankError
from utils.run.files import atomic_write, file_hash, in_numeric_order
from utils.run.log import log
from utils.run.manifest import Manifest
from utils.training.run import Run

# Copies of an item carry its number in hexadecimal and their own behind it.
NAME = re.compile(r"(?P<label>\d+)/(?P=label)-(?P<number>\d+|(?P<item>[0-9a-f]{12})_seed\d+)\.(png|jpe?g)")
LARGEST_PNG = 64  # pixels; larger images are stored as JPEG
PREVIEW_COLUMNS = 10
LARGEST_PREVIEW = 128  # pixels of an image in it


class ImageFolder:
    """Images that were drawn for one purpose; its manifest lists them, and nothing else in the folder is looked at.

    While a folder is drawn, every process notes its finished chunks in a journal, so that a killed run draws none
    twice; the manifest is written at the end.

    Args:
        folder: of the images.
        run: processes, log.
        identity: what must be equal for the images to be ours; JSON.
        remedy: what the user may do about a foreign folder.
    """

    def __init__(self, folder: Path, run: Run, identity: dict[str, Any], remedy: str):
        self.folder, self.run = Path(folder), run
        self.preview = self.folder / "preview.png"
        self.manifest = Manifest(folder, "images", identity, remedy=remedy, error=BankError, names=NAME)
        self.files: dict[str, str] = {}  # of the manifest, once it is claimed

    def claim(self, fields: Iterable[str] | None = None, **notes: Any) -> dict[str, Any]:
        """Make the folder ours and forget images that were damaged since they were drawn.

        Args:
            fields: of the identity that must fit; None: all.
            notes: for readers, where the manifest is new.

        Returns:
            The manifest.

        Raises:
            BankError: if the images are of another run, or lie there without a manifest.
        """
        is_main = self.run.runtime.is_main
        with self.run.runtime.accelerator.main_process_first():  # the main process lays the manifest, others find it
            if not self.manifest.exists and not self._journals() and any(found_images(self.folder)):
                raise BankError(f"{self.folder} holds images, but no manifest.json says whose: {self.manifest.remedy}")
            content = self.manifest.claim(fields, write=is_main, **notes)
            self.files, damaged = dict(content["files"]), self.manifest.damaged()
            for name in damaged:
                log.warning("%s is missing or damaged: its chunk is drawn again", self.folder / name)
                del self.files[name]
            if damaged and is_main:
                self.manifest.store(self.files)
        return content

    def draw(self, source: ReplaySource, requests: list[Requests], **notes: Any) -> bool:
        """Draw every chunk of which an image is missing; several processes share the chunks of each of ``requests``.

        Args:
            source: draws them.
            requests: each is cut into chunks of its own.
            notes: for readers of the manifest.

        Returns:
            Whether an image was missing in the manifest.
        """
        if all(self.by_stem.keys() >= set(stems_of(asked)) for asked in requests):
            return False
        self.files |= self._noted()
        runtime, there = self.run.runtime, self.by_stem.keys()
        rank, world = runtime.shard
        with self.run.bar(sum(map(len, requests)), f"drawing {self.folder.name}") as bar:
            for asked in requests:
                for chunk in list(asked.chunks(source.config.sample_batch))[rank::world]:
                    # A chunk is redone as a whole: its images depend on each other in the last bit of the arithmetic.
                    if not there >= set(stems := stems_of(chunk)):
                        with self.run.ledger.drawing(f"{self.folder}/{stems[0]}"):
                            drawn = source.generate(chunk)
                        self._save(drawn, stems, source.config)
                    bar.update(len(chunk))
        runtime.accelerator.wait_for_everyone()
        self.files |= self._noted()
        runtime.accelerator.wait_for_everyone()  # all have read the journals
        if runtime.is_main:
            self.manifest.store(self.files, **notes)
            for journal in self._journals():
                journal.unlink()
        runtime.accelerator.wait_for_everyone()
        return True

    @property
    def by_stem(self) -> dict[str, str]:
        """The listed images by their names without suffixes."""
        return {name.rpartition(".")[0]: name for name in self.files}

    def of_class(self, label: int) -> list[Path]:
        """Return the listed images of a class, in the order of their numbers."""
        return in_numeric_order(self.folder / name for name in self.files if name.startswith(f"{label}/"))

    def images(self, label: int, most: int | None = None) -> ImageSet:
        """Return the first listed images of a class, as files; ``most`` of them, or all."""
        paths = list(map(str, self.of_class(label)[:most]))
        return ImageSet.of(paths, torch.full((len(paths),), label))

    def paths(self, requests: Requests) -> list[str]:
        """Return the listed images that are asked for, in the order of the requests."""
        by_stem = self.by_stem
        return [str(self.folder / by_stem[stem]) for stem in stems_of(requests)]

    def forget(self, paths: list[Path]) -> None:
        """Delete listed images; the folder stays as whole as it was."""
        for path in paths:
            del self.files[path.relative_to(self.folder).as_posix()]
        if paths:
            self.manifest.store(self.files)  # first: a file that nobody knows does less harm than one that is missed
        for path in paths:
            path.unlink(missing_ok=True)

    def write_preview(self, rows: list[ImageSet]) -> None:
        """Lay a picture of the first images of every class beside them."""
        if self.run.runtime.is_main and any(map(len, rows)):
            atomic_write(self.preview, encode_image(preview([row for row in rows if len(row)]), ".png"))

    def _save(self, drawn: ImageSet, stems: list[str], config: SourceConfig) -> None:
        """Write images and note them in this process's journal."""
        paths = [save_image(self.folder / stem, drawn.image(i), config) for i, stem in enumerate(stems)]
        hashes = {path.relative_to(self.folder).as_posix(): file_hash(path) for path in paths}
        with open(self.folder / f".drawn_{self.run.runtime.shard[0]}.jsonl", "a") as file:
            file.write("\n" + json.dumps(hashes))  # a new line first: the last one may have been cut off by a kill

    def _journals(self) -> list[Path]:
        return sorted(self.folder.glob(".drawn_*.jsonl"))

    def _noted(self) -> dict[str, str]:
        """Return the images of all journals that are whole; a line that a kill cut off counts nothing."""
        noted: dict[str, str] = {}
        for journal in self._journals():
            for line in journal.read_bytes().decode(errors="replace").splitlines():
                with suppress(ValueError, TypeError):
                    noted |= json.loads(line)
        return {name: noted[name] for name in filter(NAME.fullmatch, noted) if self.manifest.holds(name, noted[name])}


def identify(source: ReplaySource, class_order: list[int]) -> dict[str, Any]:
    """Say what must agree between images that lie in one folder, as JSON; ``class_order`` holds original ids."""
    return {"dataset": source.dataset.name, "class_order": class_order, "source": source.config.name,
            "settings": source.config.sample_settings(), "run_seed": source.run.seed,
            "weights": source.fingerprint() if source.config.need_syn_imgs else None}  # fmt: skip


def name_classes(source: ReplaySource, class_order: list[int], labels: Iterable[int]) -> dict[str, Any]:
    """Say what the folders of these classes hold, for whoever finds them."""
    return {str(label): {"name": source.class_names[label], "original_id": class_order[label]} for label in labels}


def stems_of(requests: Requests) -> list[str]:
    """Return what the images that are asked for are called, without suffixes."""
    rows = zip(requests.labels.tolist(), requests.item.tolist(), requests.copy.tolist())
    numbers = [(label, f"{copy}" if item < 0 else f"{item:012x}_seed{copy:02d}") for label, item, copy in rows]
    return [f"{label}/{label}-{number}" for label, number in numbers]


def found_images(folder: Path) -> list[str]:
    """Return the names of all files below a folder that are called as drawn images are; none if it is not there."""
    paths = list_images(folder) if folder.is_dir() else []
    return sorted(filter(NAME.fullmatch, (Path(path).relative_to(folder).as_posix() for path in paths)))


def save_image(path: Path, image: Tensor, config: SourceConfig) -> Path:
    """Write one image, uint8 (C, H, W), in the format that the source asks for, which gives the path its suffix."""
    auto = "png" if max(image.shape[-2:]) <= LARGEST_PNG else "jpg"
    path = path.with_name(f"{path.name}.{auto if config.image_format == 'auto' else config.image_format}")
    atomic_write(path, encode_image(image, path.suffix), sync=False)
    return path


def preview(rows: list[ImageSet]) -> Tensor:
    """Lay the first images of every class in rows, uint8 (C, H, W); small images are enlarged, large ones shrunk."""
    tiles, side = [], min(rows[0].image(0).shape[-1], LARGEST_PREVIEW)
    for images in rows:
        picked = stack_images(images.take(range(min(PREVIEW_COLUMNS, len(images)))), side)
        tiles += [*picked, *picked.new_zeros(PREVIEW_COLUMNS - len(picked), *picked.shape[1:])]
    enlarged = F.interpolate(torch.stack(tiles), scale_factor=max(1, 64 // side))
    return make_grid(enlarged, PREVIEW_COLUMNS, padding=4, pad_value=255)
