"""The one format at every border: images as uint8 (N, C, H, W) or as file paths that decode to it, with int64 labels.

Features, float32 (N, D), are the other kind of samples that a replay source may make.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, groupby
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from tqdm import tqdm

from utils.run.errors import DataError

if TYPE_CHECKING:
    from typing_extensions import Self

Store = TypeVar("Store", bound=Sized)  # of samples


def decode_image(path: str | Path) -> Tensor:
    """Read one file as uint8 (C, H, W): C is 1 for grey files and 3 for all others.

    Grey of 16 bits keeps its upper 8. In grey of 32 bits, integers are levels from 0 to 255 and floats lie in [0, 1].
    The rest is as torchvision's ImageFolder has it, with which PyCIL reads: palettes and CMYK become RGB, alpha is
    dropped, of several frames the first is read, and EXIF's orientation is not followed.

    Raises:
        DataError: if the file cannot be decoded, or has 32 bits beyond these ranges; the message names it.
    """
    with _readable(path), Image.open(path) as image:
        if image.mode.startswith(("I", "F")):
            image = Image.fromarray(_to_levels(np.asarray(image), image))
        return pil_to_tensor(image.convert("L" if image.mode in ("1", "L") else "RGB"))


def _to_levels(values: np.ndarray, image: Image.Image) -> np.ndarray:
    """Bring grey of 16 or 32 bits, which convert() would clip, to uint8."""
    if image.mode.startswith("I;16") or image.format == "PNG":  # whose 16 bits are mode "I" in an older PIL
        return (values >> 8).astype(np.uint8)
    most = 1 if image.mode == "F" else 255
    if not ((values >= 0) & (values <= most)).all():  # nor if some are not numbers
        raise ValueError(f"its 32 bits hold more than 0 to {most}, on a scale of their own; save it with 8 or 16 bits")
    return (values * (255 // most)).round().astype(np.uint8)


def read_header(path: str) -> tuple[int, int, bool]:
    """Return height, width and whether the image has one channel, as its file says; only 32 bits are decoded.

    Raises:
        DataError: if it is no image, or has 32 bits beyond the ranges of `decode_image`; the message names it.
    """
    with _readable(path), Image.open(path) as image:
        if image.mode in ("I", "F"):
            decode_image(path)
        return image.height, image.width, image.mode in ("1", "L")


@contextmanager
def _readable(path: str | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read the image {path}: {error}; replace or delete the file") from error


def encode_image(image: Tensor, suffix: str) -> bytes:
    """Turn one uint8 (C, H, W) image into the bytes of a PNG, or of a JPEG of quality 95."""
    buffer = io.BytesIO()
    to_pil_image(image).save(buffer, "PNG" if suffix == ".png" else "JPEG", quality=95)
    return buffer.getvalue()


def map_in_threads(function: Callable[[str], Any], paths: Sequence[str], description: str) -> list[Any]:
    """Apply a function to every path, in order; the first error ends the work."""
    with ThreadPool(min(32, (os.cpu_count() or 1) + 4)) as pool:  # more than cores: reading waits for the disk
        # 256 files per job: a job for each file would cost more than reading its header.
        return list(tqdm(pool.imap(function, paths, 256), description, len(paths), delay=2, leave=False))


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

    def __len__(self) -> int:
        return len(self.labels)

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


def _joined(parts: list[Part]) -> Part:
    """Join parts of one kind that have the same columns."""
    images = [part.images for part in parts]
    joined = torch.cat(images) if isinstance(images[0], Tensor) else tuple(chain(*images))
    columns = {name: torch.cat([part.columns[name] for part in parts]) for name in parts[0].columns}
    return Part(joined, torch.cat([part.labels for part in parts]), columns)


def _in_one_row(pieces: Iterable[Tensor]) -> Tensor:
    """Join int64 (n,) tensors; of none, it is empty."""
    return torch.cat([torch.empty(0, dtype=torch.int64), *pieces])


def located(positions: Tensor, stores: Iterable[Store]) -> Iterator[tuple[Store, Tensor, Tensor]]:
    """Find positions, int64 (n,), in stores that stand behind each other.

    Yields:
        every store that holds some of them, their places in ``positions``, and their rows in the store.
    """
    start = 0
    for store in stores:
        places = ((positions >= start) & (positions < start + len(store))).nonzero().flatten()
        if len(places):
            yield store, places, positions[places] - start
        start += len(store)


class Samples:
    """Labelled samples as a list of parts. Immutable; ``+`` concatenates."""

    def __init__(self, parts: Iterable[Part] = ()):
        self.parts = tuple(part for part in parts if len(part))
        self.labels = _in_one_row(part.labels for part in self.parts)  # (N,)

    @classmethod
    def of(cls, images: Tensor | Sequence[str], labels: Tensor, **columns: Tensor) -> Self:
        """Make one part; see `Part`."""
        return cls([Part(images if isinstance(images, Tensor) else tuple(images), labels, columns)])

    def __len__(self) -> int:
        return len(self.labels)

    def __add__(self, other: Self) -> Self:
        return type(self)(self.parts + other.parts)

    @property
    def nbytes(self) -> int:
        """Bytes as stored: values of tensors, sizes of files."""
        return sum(part.nbytes for part in self.parts)

    @property
    def classes(self) -> list[int]:
        """The labels that occur, ascending."""
        return self.labels.unique().tolist()

    def take(self, positions: Sequence[int] | Tensor) -> Self:
        """Return the samples at these positions, in this order where they lie in one part, else part by part."""
        positions = torch.as_tensor(positions, dtype=torch.int64)
        return type(self)(part.take(inside) for part, _, inside in located(positions, self.parts))

    def select(self, classes: Iterable[int]) -> Self:
        """Return the samples of these classes, in their stored order."""
        return self.take(torch.isin(self.labels, torch.tensor(list(classes), dtype=torch.int64)).nonzero().flatten())

    def first_of_each(self, per_class: int) -> Self:
        """Return the first samples of every class, as they are stored."""
        kept = _in_one_row((self.labels == label).nonzero().flatten()[:per_class] for label in self.classes)
        return self.take(kept.sort().values)

    def relabelled(self, labels: Tensor) -> Self:
        """Return the same samples with other labels, int64 (N,)."""
        pieces = labels.split(list(map(len, self.parts)))
        return type(self)(replace(part, labels=piece) for part, piece in zip(self.parts, pieces))

    def counts(self, num_classes: int) -> Tensor:
        """Count the samples of each class, int64 (num_classes,)."""
        return torch.bincount(self.labels, minlength=num_classes)

    def items(self) -> Tensor:
        """Return the exemplar that each sample is made of, int64 (N,); -1 for none."""
        return _in_one_row(part.columns.get("items", torch.full_like(part.labels, -1)) for part in self.parts)

    def soft_targets(self) -> Tensor | None:
        """Return a distribution over classes per sample, (N, K): its own, else its label's; None if none has one.

        Samples kept from an earlier task know fewer classes than K: later ones have probability 0 there.
        """
        widths = [part.columns["soft_targets"].shape[1] for part in self.parts if "soft_targets" in part.columns]
        if not widths:
            return None
        width = max(*widths, int(self.labels.max()) + 1)
        targets = (part.columns.get("soft_targets", F.one_hot(part.labels, width).float()) for part in self.parts)
        return torch.cat([F.pad(rows, (0, width - rows.shape[1])) for rows in targets])


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

        return ImageSet(_joined(list(parts)) for _, parts in groupby(self.parts, kind))

    def contents_hash(self, root: str | None) -> str:
        """Hash all images in their order: labels and pixels, or labels, paths below ``root`` and sizes of files."""
        digest = hashlib.sha256(self.labels.numpy())
        for part in self.parts:
            if isinstance(part.images, Tensor):
                digest.update(f"{tuple(part.images.shape)}".encode())
                digest.update(part.images.contiguous().numpy())
            else:
                # Sizes instead of bytes: reading every photograph would take minutes. Paths begin below the data set's
                # own folder, which may be moved.
                folder = f"{root}{os.sep}"
                files = [f"{path.removeprefix(folder)}\t{os.path.getsize(path)}" for path in part.images]
                digest.update("\n".join(files).encode())
        return digest.hexdigest()

    def image(self, position: int) -> Tensor:
        """Return one image, uint8 (C, H, W)."""
        for part in self.parts:
            if position < len(part):
                item = part.images[position]
                return item if isinstance(item, Tensor) else decode_image(item)
            position -= len(part)
        raise IndexError(position)
