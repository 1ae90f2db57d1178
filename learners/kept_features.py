"""What a frozen network says of images, computed once: for a run in memory, for other runs in a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from utils.data.images import ImageSet
from utils.run.errors import CheckpointError
from utils.run.files import load_tensors, save_tensors


class KeptFeatures:
    """Rows by image, which are computed when an image is first asked for.

    Missing rows are computed class by class, so that the batches they are computed in, and with them the last bits,
    do not depend on what was asked for before.

    Args:
        folder: also keeps the rows of every class that was computed, in a file of its own; None: memory alone.
        identity: returns what made the rows, beside the images: weights, transform, precision. Asked when rows of a
            folder are.
    """

    def __init__(self, folder: Path | None = None, identity: Callable[[], str] = lambda: ""):
        self.folder, self.identity = folder, identity
        self.rows: dict[Hashable, Tensor] = {}

    def of(self, images: ImageSet, compute: Callable[[ImageSet], Tensor]) -> Tensor:
        """Return one row per image, float32 (N, D) on the CPU.

        Args:
            images: at least one.
            compute: images to their rows, for those that are missing.
        """
        keys = image_keys(images)
        missing = torch.tensor([key not in self.rows for key in keys])
        made_by = self.identity() if self.folder is not None and bool(missing.any()) else ""
        for label in images.labels[missing].unique().tolist():
            positions = (missing & (images.labels == label)).nonzero().flatten()
            new = [keys[position] for position in positions.tolist()]
            self.rows.update(zip(new, self._kept(made_by, new, lambda at=positions: compute(images.take(at)))))
        return torch.stack([self.rows[key] for key in keys])

    def _kept(self, made_by: str, keys: list[Hashable], compute: Callable[[], Tensor]) -> Tensor:
        if self.folder is None:
            return compute()
        of_what = repr([made_by, [_with_content(key) for key in keys]])
        path = self.folder / f"{hashlib.sha256(of_what.encode()).hexdigest()}.safetensors"
        with suppress(CheckpointError):  # absent, or cut off by a full disk
            return load_tensors(path)["features"]
        features = compute()
        save_tensors(path, {"features": features})
        return features


def image_keys(images: ImageSet) -> list[Hashable]:
    """Return what tells each image from all others: its shape and bytes, or its path if it stays on disk."""
    keys: list[Hashable] = []
    for part in images.parts:
        if isinstance(part.images, Tensor):
            shape = tuple(part.images.shape[1:])  # belongs to it: the same bytes may be a wide or a tall image
            keys += [(shape, hashlib.blake2b(row.tobytes(), digest_size=16).digest()) for row in part.images.numpy()]
        else:
            keys += part.images
    return keys


def _with_content(key: Hashable) -> Hashable:
    """Return a key that holds beyond this run: a file is then known by its bytes and not by its path."""
    return hashlib.blake2b(Path(key).read_bytes(), digest_size=16).digest() if isinstance(key, str) else key
