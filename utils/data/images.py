"""The one format at every border: images as uint8 (N, C, H, W) or as file paths that decode to it, with int64 labels.

Features, float32 (N, D), are the other kind of samples that a replay source may make.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from utils.run.errors import DataError

S = TypeVar("S", bound="Samples")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")


def decode_image(path: str | Path) -> Tensor:
    """Read one file as uint8 (C, H, W): C is 1 for grey files and 3 for all others (alpha is dropped).

    Raises:
        DataError: if the file cannot be decoded; the message names it.
    """
    with _opened(path) as image:
        if image.mode.startswith("I"):  # 16 bits per pixel, which convert() would clip
            pixels = (np.array(image) >> 8).astype(np.uint8)
        else:
            pixels = np.array(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    return torch.from_numpy(pixels).unsqueeze(0) if pixels.ndim == 2 else torch.from_numpy(pixels).permute(2, 0, 1)


class Header(NamedTuple):
    """Size of an image file in pixels, and whether it has one channel."""

    height: int
    width: int
    grey: bool


def read_header(path: str) -> Header:
    """Read what a file says of its image, without decoding it.

    Raises:
        DataError: if it is no image; the message names it.
    """
    with _opened(path) as image:
        return Header(image.height, image.width, image.mode in ("1", "L"))


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"cannot read the image {path}: {error}; replace or delete the file") from error


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
                sizes.update((header.height, header.width) for header in pool.map(read_header, part.images))
    return sizes


@dataclass(frozen=True)
class Part:
    """Samples of one kind: a uint8 tensor (N, C, H, W), N file paths, or float32 features (N, D).

    Attributes:
        images: the samples.
        labels: int64 (N,).
        columns: what else is known of each sample, a row for each: "items", int64 (N,), numbers of exemplars;
            "soft_targets", float32 (N, K).
    """

    images: Tensor | tuple[str, ...]
    labels: Tensor
    columns: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        lengths = {len(self.images), len(self.labels), *map(len, self.columns.values())}
        assert len(lengths) == 1, f"{len(self.images)} samples, {len(self.labels)} labels, {self.columns.keys()}"
        assert self.labels.dtype == torch.int64
        if isinstance(self.images, Tensor):
            assert (self.images.dtype, self.images.ndim) in ((torch.uint8, 4), (torch.float32, 2))

    @property
    def nbytes(self) -> int:
        if isinstance(self.images, Tensor):
            return self.images.nbytes
        return sum(Path(path).stat().st_size for path in self.images)

    def take(self, positions: Tensor) -> Part:
        images = self.images
        taken = images[positions] if isinstance(images, Tensor) else tuple(images[i] for i in positions.tolist())
        columns = {name: column[positions] for name, column in self.columns.items()}
        return Part(taken, self.labels[positions], columns)

    def decoded(self) -> Part:
        """Read the images into memory; all files of the part must have one size."""
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
        return replace(self, images=torch.stack(images))


def _joined(parts: list[Part]) -> Part:
    """Join parts of one kind that have the same columns."""
    labels = torch.cat([part.labels for part in parts])
    columns = {name: torch.cat([part.columns[name] for part in parts]) for name in parts[0].columns}
    if isinstance(parts[0].images, Tensor):
        return Part(torch.cat([part.images for part in parts]), labels, columns)
    return Part(tuple(path for part in parts for path in part.images), labels, columns)


class Samples:
    """Labelled samples as a list of parts. Immutable; ``+`` concatenates."""

    def __init__(self, parts: Iterable[Part] = ()):
        self.parts = tuple(part for part in parts if len(part.labels))
        labels = [part.labels for part in self.parts]
        self.labels = torch.cat(labels) if labels else torch.empty(0, dtype=torch.int64)  # (N,)

    @classmethod
    def of(cls: type[S], images: Tensor | Sequence[str], labels: Tensor, **columns: Tensor) -> S:
        """Make one part; see `Part`."""
        return cls([Part(images if isinstance(images, Tensor) else tuple(images), labels, columns)])

    def __len__(self) -> int:
        return len(self.labels)

    def __add__(self: S, other: S) -> S:
        return type(self)(self.parts + other.parts)

    @property
    def nbytes(self) -> int:
        """Bytes as stored: values of tensors, sizes of files."""
        return sum(part.nbytes for part in self.parts)

    @property
    def classes(self) -> list[int]:
        """The labels that occur, ascending."""
        return self.labels.unique().tolist()

    def take(self: S, positions: Sequence[int] | Tensor) -> S:
        """Return the samples at these positions, in this order where they lie in one part, else part by part."""
        positions = torch.as_tensor(positions, dtype=torch.int64)
        parts, start = [], 0
        for part in self.parts:
            inside = (positions >= start) & (positions < start + len(part.labels))
            parts.append(part.take(positions[inside] - start))
            start += len(part.labels)
        return type(self)(parts)

    def select(self: S, classes: Iterable[int]) -> S:
        """Return the samples of these classes, in their stored order."""
        wanted = torch.isin(self.labels, torch.tensor(list(classes), dtype=torch.int64))
        return self.take(wanted.nonzero().flatten())

    def first_of_each(self: S, per_class: int) -> S:
        """Return the first samples of every class, as they are stored."""
        kept = [(self.labels == label).nonzero().flatten()[:per_class] for label in self.classes]
        return self.take(torch.cat(kept).sort().values) if kept else self

    def relabelled(self: S, labels: Tensor) -> S:
        """Return the same samples with other labels, int64 (N,)."""
        pieces = labels.split([len(part.labels) for part in self.parts]) if self.parts else ()
        return type(self)(replace(part, labels=piece) for part, piece in zip(self.parts, pieces))

    def counts(self, num_classes: int) -> Tensor:
        """Count the samples of each class, int64 (num_classes,)."""
        return torch.bincount(self.labels, minlength=num_classes)

    def items(self) -> Tensor:
        """Return the exemplar that each sample is made of, int64 (N,); -1 for none."""
        columns = [part.columns.get("items", torch.full_like(part.labels, -1)) for part in self.parts]
        return torch.cat(columns) if columns else torch.empty(0, dtype=torch.int64)

    def soft_targets(self) -> Tensor | None:
        """Return a distribution over classes per sample, (N, K): its own, else its label's; None if none has one.

        Samples kept from an earlier task know fewer classes than K: later ones have probability 0 there.
        """
        own = [part.columns.get("soft_targets") for part in self.parts]
        widths = [targets.shape[1] for targets in own if targets is not None]
        if not widths:
            return None
        width = max([*widths, int(self.labels.max()) + 1])
        hard = F.one_hot(self.labels, width).float().split([len(part.labels) for part in self.parts])
        return torch.cat([
            rows if targets is None else F.pad(targets, (0, width - targets.shape[1]))
            for rows, targets in zip(hard, own)
        ])  # fmt: skip


class FeatureSet(Samples):
    """Features of a backbone, float32 (N, D), with int64 labels: what a source of features makes."""

    def tensor(self) -> Tensor:
        """Return all features, float32 (N, D)."""
        return torch.cat([part.images for part in self.parts]) if self.parts else torch.empty(0, 0)


class ImageSet(Samples):
    """Labelled images; each part has one image size, or lies on disk."""

    def merged(self) -> ImageSet:
        """Return the same images in as few parts as their order allows: neighbours of one shape, and files, are one."""

        def kind(part: Part) -> tuple:
            size = part.images.shape[1:] if isinstance(part.images, Tensor) else None
            return size, {name: column.shape[1:] for name, column in part.columns.items()}

        stretches = groupby(self.parts, key=kind)
        return ImageSet(_joined(list(parts)) for _, parts in stretches)

    def decoded(self) -> ImageSet:
        """Return the same images with every part in memory."""
        return ImageSet(part.decoded() for part in self.parts)

    def image(self, position: int) -> Tensor:
        """Return one image, uint8 (C, H, W)."""
        for part in self.parts:
            if position < len(part.labels):
                item = part.images[position]
                return item if isinstance(item, Tensor) else decode_image(item)
            position -= len(part.labels)
        raise IndexError(position)
