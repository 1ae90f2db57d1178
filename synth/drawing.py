"""A folder of drawn images, `<class>/<class>-<i>.png`: what is missing is drawn, what is there is found and shown."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from synth.base import ReplaySource
from synth.requests import Requests
from utils.data.images import IMAGE_SUFFIXES, ImageSet, encode_image
from utils.data.transforms import stack_images
from utils.run.config import SourceConfig
from utils.run.errors import BankError
from utils.training.checkpoint import atomic_write, file_hash, write_json

MANIFEST = "manifest.json"
LARGEST_PNG = 64  # pixels; larger images are stored as JPEG
PREVIEW_COLUMNS = 10
LARGEST_PREVIEW = 128  # pixels of an image in it


def draw_missing(source: ReplaySource, folder: Path, requests: list[Requests]) -> None:
    """Draw every chunk of which an image is absent; several processes share the chunks of each of ``requests``."""
    run = source.run
    rank, world = run.runtime.shard
    bar = run.bar(sum(map(len, requests)), f"drawing {folder.name}")
    for asked in requests:
        for chunk in list(asked.chunks(source.config.sample_batch))[rank::world]:
            paths = image_paths(folder, chunk)
            # A chunk is redone as a whole: its images depend on each other in the last bit of the arithmetic.
            if not all(map(find_image, paths)):
                drawn = source.generate(chunk)
                for position, path in enumerate(paths):
                    save_image(path, drawn.image(position), source.config)
            bar.update(len(chunk))
    bar.close()
    run.runtime.accelerator.wait_for_everyone()


def save_image(path: Path, image: Tensor, config: SourceConfig) -> None:
    """Write one image, uint8 (C, H, W), in the format that the source asks for, which gives the path its suffix."""
    auto = "png" if max(image.shape[-2:]) <= LARGEST_PNG else "jpg"
    suffix = "." + (auto if config.image_format == "auto" else config.image_format)
    atomic_write(path.with_suffix(suffix), encode_image(image, suffix), sync=False)


def image_paths(folder: Path, requests: Requests) -> list[Path]:
    """Where the images asked for lie, but for their suffixes; copies of an item carry its number in hexadecimal."""
    rows = zip(requests.labels.tolist(), requests.item.tolist(), requests.copy.tolist())
    names = [(label, f"{copy}" if item < 0 else f"{item:012x}_seed{copy:02d}") for label, item, copy in rows]
    return [folder / str(label) / f"{label}-{name}" for label, name in names]


def find_image(path: Path) -> Path | None:
    """The image with one of our suffixes, if it is there."""
    return next((found for suffix in (".png", ".jpg") if (found := path.with_suffix(suffix)).exists()), None)


def images_in(folder: Path) -> list[Path]:
    """Image files `<class>-<i>.*` of one class, in the order of i."""
    files = (path for path in folder.glob("*-*") if path.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(files, key=lambda path: int(path.stem.rpartition("-")[2]))


def file_hashes(folder: Path, classes: Iterable[int]) -> dict[str, str]:
    """The hash of every image of these classes, by its path below the folder."""
    files = [path for label in classes for path in images_in(folder / str(label))]
    return {path.relative_to(folder).as_posix(): file_hash(path) for path in files}


def damaged_files(folder: Path, hashes: dict[str, str]) -> list[str]:
    """Those that are missing or changed since they were hashed."""
    return [
        name for name, digest in hashes.items() if not (folder / name).exists() or file_hash(folder / name) != digest
    ]


def delete_images(folder: Path, paths: list[Path]) -> None:
    """Delete images of a finished folder, which stays as whole as it was: its manifest knows no more of them."""
    if not paths:
        return
    manifest = json.loads((folder / MANIFEST).read_text())
    for path in paths:
        manifest["files"].pop(path.relative_to(folder).as_posix(), None)
    write_json(folder / MANIFEST, manifest)  # first: a file that nobody knows does less harm than one that is missed
    for path in paths:
        path.unlink()


def require_same(
    folder: Path, stored: dict[str, Any], here: dict[str, Any], fields: Iterable[str], remedy: str
) -> None:
    """Raise BankError at the first of these fields in which a folder's manifest differs from what is wanted here."""
    if difference := first_difference(stored, here, fields):
        raise BankError(f"the images in {folder} are of another run: {difference}. {remedy}")


def first_difference(stored: dict[str, Any], here: dict[str, Any], fields: Iterable[str]) -> str:
    """Words for the first of these fields in which two manifests differ; empty if none does."""
    for field in fields:
        there, wanted = stored.get(field), here[field]
        if there != wanted:
            if isinstance(there, dict) and isinstance(wanted, dict):
                inner = next(key for key in {**there, **wanted} if there.get(key) != wanted.get(key))
                field, there, wanted = f"{field}.{inner}", there.get(inner), wanted.get(inner)
            return f"{field} is {short(there)} there, {short(wanted)} here"
    return ""


def short(value: Any) -> str:
    """JSON of at most 80 characters, for a message."""
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def preview(rows: list[ImageSet]) -> Tensor:
    """The first images of every class, one a row, uint8 (C, H, W); small images are enlarged, large ones shrunk."""
    lines, side = [], min(rows[0].image(0).shape[-1], LARGEST_PREVIEW)
    for images in rows:
        picked = stack_images(images.take(range(min(PREVIEW_COLUMNS, len(images)))), side)
        blank = torch.zeros(PREVIEW_COLUMNS - len(picked), *picked.shape[1:], dtype=torch.uint8)
        lines.append(torch.cat([picked, blank]))
    scale = max(1, 64 // lines[0].shape[-1])
    tiles = torch.stack(lines).repeat_interleave(scale, -1).repeat_interleave(scale, -2)  # (R, K, C, H, W)
    tiles = torch.nn.functional.pad(tiles, (2, 2, 2, 2), value=255)
    return tiles.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
