"""Features of a frozen network, computed once for every image of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from utils.data.images import ImageSet


def remembered(rows: dict[Hashable, Tensor], images: ImageSet, compute: Callable[[ImageSet], Tensor]) -> Tensor:
    """Return one row per image, float32 (N, D) on the CPU, and compute those alone that are not known yet.

    Missing rows are computed class by class, so that the batches they are computed in, and with them the last bits,
    do not depend on what was asked for before.

    Args:
        rows: what is known by `image_keys`; it takes the new rows up.
        images: at least one.
        compute: images to their rows, for those that are missing.
    """
    keys = image_keys(images)
    missing = torch.tensor([key not in rows for key in keys])
    for label in images.labels[missing].unique().tolist():
        positions = (missing & (images.labels == label)).nonzero().flatten()
        rows.update(zip([keys[position] for position in positions.tolist()], compute(images.take(positions))))
    return torch.stack([rows[key] for key in keys])


def image_keys(images: ImageSet) -> list[Hashable]:
    """Return what tells each image from all others: its shape and bytes, or its path if it stays on disk."""
    keys: list[Hashable] = []
    for part in images.parts:
        if isinstance(part.images, Tensor):
            shape = part.images.shape[1:]  # belongs to it: the same bytes may be a wide or a tall image
            keys += [(shape, hashlib.blake2b(row.tobytes(), digest_size=16).digest()) for row in part.images.numpy()]
        else:
            keys += part.images
    return keys
