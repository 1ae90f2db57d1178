"""The one image format at every border: uint8 (N, C, H, W) or file paths that decode to it, with int64 labels."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.run.errors import DataError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")


def decode_image(path: str | Path) -> Tensor:
    """Read one file as uint8 (C, H, W): C is 1 for grey files and 3 for all others (alpha is dropped).

    Raises:
        DataError: if the file cannot be decoded; the message names it.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16 bits per pixel, which convert() would clip
                pixels = (np.array(image) >> 8).astype(np.uint8)
            else:
                pixels = np.array(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"cannot read the image {path}: {error}; replace or delete the file") from error
    return torch.from_numpy(pixels).unsqueeze(0) if pixels.ndim == 2 else torch.from_numpy(pixels).permute(2, 0, 1)


def encode_image(image: Tensor, suffix: str) -> bytes:
    """One uint8 (C, H, W) image as the bytes of a PNG, or a JPEG of quality 95."""
    array = image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG" if suffix == ".png" else "JPEG", quality=95)
    return buffer.getvalue()


def image_sizes(images: ImageSet) -> Counter[tuple[int, int]]:
    """(height, width) of all images and how many have it; of files only the header is read."""
    sizes: Counter[tuple[int, int]] = Counter()
    for part in images.parts:
        if isinstance(part.images, Tensor):
            sizes[tuple(part.images.shape[-2:])] += len(part.images)
        else:
            with ThreadPoolExecutor() as pool:
                sizes.update(pool.map(_file_size, part.images))
    return sizes


def _file_size(path: str) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"cannot read the image {path}: {error}; replace or delete the file") from error


@dataclass(frozen=True)
class Part:
    """Images of one kind: a uint8 tensor (N, C, H, W), or N file paths; labels are int64 (N,)."""

    images: Tensor | tuple[str, ...]
    labels: Tensor

    def __post_init__(self):
        assert len(self.images) == len(self.labels), f"{len(self.images)} images, {len(self.labels)} labels"
        assert self.labels.dtype == torch.int64
        if isinstance(self.images, Tensor):
            assert self.images.dtype == torch.uint8 and self.images.ndim == 4

    @property
    def nbytes(self) -> int:
        if isinstance(self.images, Tensor):
            return self.images.numel()
        return sum(Path(path).stat().st_size for path in self.images)

    def take(self, positions: Tensor) -> Part:
        if isinstance(self.images, Tensor):
            return Part(self.images[positions], self.labels[positions])
        return Part(tuple(self.images[i] for i in positions.tolist()), self.labels[positions])

    def decoded(self) -> Part:
        """The same images in memory; all files of the part must have one size."""
        if isinstance(self.images, Tensor):
            return self
        with ThreadPoolExecutor() as pool:
            images = list(pool.map(decode_image, self.images))
        for path, image in zip(self.images, images):
            if image.shape != images[0].shape:
                raise DataError(
                    f"{path} has shape {tuple(image.shape)}, but {self.images[0]} has {tuple(images[0].shape)}: "
                    "images that are kept in memory must have one size"
                )
        return Part(torch.stack(images), self.labels)


def _joined(parts: list[Part]) -> Part:
    """Parts of one kind as one."""
    labels = torch.cat([part.labels for part in parts])
    if isinstance(parts[0].images, Tensor):
        return Part(torch.cat([part.images for part in parts]), labels)
    return Part(tuple(path for part in parts for path in part.images), labels)


class ImageSet:
    """Labelled images as a list of parts, each of one image size. Immutable; ``+`` concatenates."""

    def __init__(self, parts: Iterable[Part] = ()):
        self.parts = tuple(part for part in parts if len(part.labels))
        labels = [part.labels for part in self.parts]
        self.labels = torch.cat(labels) if labels else torch.empty(0, dtype=torch.int64)  # (N,)

    @classmethod
    def of(cls, images: Tensor | Sequence[str], labels: Tensor) -> ImageSet:
        """One part: uint8 (N, C, H, W) or N paths, with int64 labels (N,)."""
        return cls([Part(images if isinstance(images, Tensor) else tuple(images), labels)])

    def __len__(self) -> int:
        return len(self.labels)

    def __add__(self, other: ImageSet) -> ImageSet:
        return ImageSet(self.parts + other.parts)

    @property
    def nbytes(self) -> int:
        """Bytes as stored: pixels of tensors, sizes of files."""
        return sum(part.nbytes for part in self.parts)

    @property
    def classes(self) -> list[int]:
        """The labels that occur, ascending."""
        return self.labels.unique().tolist()

    def take(self, positions: Sequence[int] | Tensor) -> ImageSet:
        """The images at these positions, in this order where they lie in one part, else part by part."""
        positions = torch.as_tensor(positions, dtype=torch.int64)
        parts, start = [], 0
        for part in self.parts:
            inside = (positions >= start) & (positions < start + len(part.labels))
            parts.append(part.take(positions[inside] - start))
            start += len(part.labels)
        return ImageSet(parts)

    def select(self, classes: Iterable[int]) -> ImageSet:
        """Only the images of these classes, in their stored order."""
        wanted = torch.isin(self.labels, torch.tensor(list(classes), dtype=torch.int64))
        return self.take(wanted.nonzero().flatten())

    def relabelled(self, labels: Tensor) -> ImageSet:
        """The same images with other labels, int64 (N,)."""
        pieces = labels.split([len(part.labels) for part in self.parts]) if self.parts else ()
        return ImageSet(Part(part.images, piece) for part, piece in zip(self.parts, pieces))

    def counts(self, num_classes: int) -> Tensor:
        """Images per class, int64 (num_classes,)."""
        return torch.bincount(self.labels, minlength=num_classes)

    def merged(self) -> ImageSet:
        """The same images in as few parts as their order allows: neighbours of one shape, and of files, are one."""
        stretches = groupby(
            self.parts, key=lambda part: part.images.shape[1:] if isinstance(part.images, Tensor) else None
        )
        return ImageSet(_joined(list(parts)) for _, parts in stretches)

    def decoded(self) -> ImageSet:
        """The same images with every part in memory."""
        return ImageSet(part.decoded() for part in self.parts)

    def image(self, position: int) -> Tensor:
        """One image, uint8 (C, H, W)."""
        for part in self.parts:
            if position < len(part.labels):
                item = part.images[position]
                return item if isinstance(item, Tensor) else decode_image(item)
            position -= len(part.labels)
        raise IndexError(position)
