"""Edge maps: what an exemplar is compressed to, at one bit per pixel, and the sizes that they are drawn at.

Duan et al., "Prompt-Based Exemplar Super-Compression and Regeneration for Class-Incremental Learning", BMVC 2025,
arXiv:2311.18266, by the words and numbers of its code.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from typing import Literal

import numpy as np
import torch
from torch import Tensor

MOST_PIXELS = 786_432  # of an image that is drawn; larger ones are halved


def canny(image: Tensor, low: int = 100, high: int = 200) -> Tensor:
    """Find edges as ControlNet was trained on them (Canny 1986; OpenCV's, 3x3 Sobel, L1 gradient).

    Of three channels the one with the largest gradient counts at every pixel; a grey copy has other edges.

    Args:
        image: uint8 (C, H, W), C = 1 or 3.
        low, high: thresholds of the gradient.

    Returns:
        bool (H, W).
    """
    import cv2

    return torch.from_numpy(cv2.Canny(_array(image), low, high) > 0)


def short_side(height: int, width: int, resolution: Literal["high", "low"]) -> int:
    """Return the short side at which an image of this size is drawn: 512, at low resolution 256 unless it has 512."""
    return 512 if resolution == "high" or min(height, width) >= 512 else 256


def drawing_size(height: int, width: int, side: int, grid: int = 64) -> tuple[int, int]:
    """Return height and width at which an image of this size is drawn.

    Args:
        height, width: of the image.
        side: to which its short side is brought; then both are halved until they are not too many pixels.
        grid: sides are multiples of it, rounded half to even.
    """
    scale = side / min(height, width)
    tall, wide = scale * height, scale * width
    while tall * wide > MOST_PIXELS:
        tall, wide = tall / 2, wide / 2
    return grid * round(tall / grid), grid * round(wide / grid)


def resize(image: Tensor, height: int, width: int, enlarges: bool) -> Tensor:
    """Bring an image, uint8 (C, H, W), to another size: by Lanczos' kernel where that enlarges it, else by area."""
    import cv2

    if image.shape[-2:] == (height, width):
        return image
    method = cv2.INTER_LANCZOS4 if enlarges else cv2.INTER_AREA
    resized = torch.from_numpy(cv2.resize(_array(image), (width, height), interpolation=method))
    return resized.unsqueeze(0) if resized.ndim == 2 else resized.permute(2, 0, 1)


def resize_edges(edges: Tensor, height: int, width: int) -> Tensor:
    """Bring a map, bool (H, W), to another size by the nearest pixel, as OpenCV counts them; Pillow takes others."""
    import cv2

    array = edges.numpy().astype(np.uint8)
    return torch.from_numpy(cv2.resize(array, (width, height), interpolation=cv2.INTER_NEAREST) > 0)


def _array(image: Tensor) -> np.ndarray:
    """(H, W) of a grey image, (H, W, 3) of a coloured one."""
    return image[0].numpy() if len(image) == 1 else np.ascontiguousarray(image.permute(1, 2, 0).numpy())


@dataclass(frozen=True)
class EdgeMap:
    """A packed edge map and the size of the image that it was made of.

    Attributes:
        bits: ceil(H * W / 8) bytes, row by row, the highest bit first.
        shape: (H, W) of the map.
        size: (h, w) of the image.
    """

    bits: bytes
    shape: tuple[int, int]
    size: tuple[int, int]

    @classmethod
    def of(cls, edges: Tensor, size: tuple[int, int]) -> EdgeMap:
        """Pack a map, bool (H, W)."""
        return cls(np.packbits(edges.numpy()).tobytes(), tuple(edges.shape), tuple(size))

    def edges(self) -> Tensor:
        """Return the map, bool (H, W)."""
        flat = np.unpackbits(np.frombuffer(self.bits, np.uint8), count=math.prod(self.shape))
        return torch.from_numpy(flat.astype(bool)).view(self.shape)

    @cached_property
    def item(self) -> int:
        """A number of 48 bits that names what is drawn from this map: equal maps make equal images."""
        words = repr((self.shape, self.size)).encode()
        return int.from_bytes(hashlib.sha256(words + self.bits).digest()[:6], "big")


def pack(maps: dict[int, list[EdgeMap]]) -> dict[str, Tensor]:
    """Write maps class by class as a few tensors, with hardly a byte beside their bits."""
    every = [one for label in sorted(maps) for one in maps[label]]
    sizes = torch.tensor([[*one.shape, *one.size] for one in every], dtype=torch.int16)
    counts = [len(maps[label]) for label in sorted(maps)]
    return {"labels": torch.tensor(sorted(maps), dtype=torch.int32), "counts": torch.tensor(counts, dtype=torch.int32),
            "sizes": sizes[:1] if (sizes == sizes[:1]).all() else sizes,  # of one size: said once
            "bits": torch.from_numpy(np.frombuffer(b"".join(one.bits for one in every), np.uint8).copy())}  # fmt: skip


def unpack(stored: dict[str, Tensor]) -> dict[int, list[EdgeMap]]:
    """Return what ``pack`` took."""
    bits, counts = BytesIO(stored["bits"].numpy().tobytes()), stored["counts"].tolist()
    sizes = stored["sizes"].expand(sum(counts), 4).tolist()
    maps: dict[int, list[EdgeMap]] = {label: [] for label in stored["labels"].tolist()}
    for label, (tall, wide, *size) in zip(np.repeat(list(maps), counts).tolist(), sizes):
        maps[label].append(EdgeMap(bits.read(math.ceil(tall * wide / 8)), (tall, wide), tuple(size)))
    return maps
