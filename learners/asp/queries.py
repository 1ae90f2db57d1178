"""Features of a frozen network, computed once for every image of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from utils.data.images import ImageSet


class QueryCache:
    """Remembers one row per image. An image is known by its bytes, or by its path if it stays on disk.

    Missing rows are computed class by class, so that the batches they are computed in, and with them the last bits,
    do not depend on what was asked for before.
    """

    def __init__(self):
        self.rows: dict[bytes | str, Tensor] = {}

    def get(self, images: ImageSet, compute: Callable[[ImageSet], Tensor]) -> Tensor:
        """The rows of N images, float32 (N, D) on the CPU.

        Args:
            images: at least one.
            compute: images to their rows, for those that are missing.
        """
        keys = image_keys(images)
        missing = torch.tensor([key not in self.rows for key in keys])
        for label in images.labels[missing].unique().tolist():
            positions = (missing & (images.labels == label)).nonzero().flatten()
            rows = compute(images.take(positions))
            self.rows |= {keys[position]: row for position, row in zip(positions.tolist(), rows)}
        return torch.stack([self.rows[key] for key in keys])


def image_keys(images: ImageSet) -> list[bytes | str]:
    """What tells each image from all others."""
    keys: list[bytes | str] = []
    for part in images.parts:
        if isinstance(part.images, Tensor):
            # The shape belongs to it: the same bytes may be a wide or a tall image.
            shape = str(tuple(part.images.shape[1:])).encode()
            rows = part.images.flatten(1).numpy()
            keys += [hashlib.blake2b(row.tobytes() + shape, digest_size=16).digest() for row in rows]
        else:
            keys += part.images
    return keys
