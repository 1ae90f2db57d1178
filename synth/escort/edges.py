"""Edge maps: what an exemplar is compressed to, at one bit per pixel, and the sizes that they are drawn at.

Duan et al., "Prompt-Based Exemplar Super-Compression and Regeneration for Class-Incremental Learning", BMVC 2025,
arXiv:2311.18266, by the words and numbers of its code.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

MOST_PIXELS = 786_432  # of an image that is drawn; larger ones are halved


def canny(image: Tensor, low: int = 100, high: int = 200) -> Tensor:
    """Edges as ControlNet was trained on them (Canny 1986; OpenCV's, 3x3 Sobel, L1 gradient).

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
    """The short side at which an image of this size is drawn: 512, at low resolution 256 unless it has 512."""
    return 512 if resolution == "high" or min(height, width) >= 512 else 256


def drawing_size(height: int, width: int, side: int, grid: int = 64) -> tuple[int, int]:
    """Height and width at which an image of this size is drawn.

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
    """An image, uint8 (C, H, W), at another size: by Lanczos' kernel where that enlarges it, else by area."""
    import cv2

    if image.shape[-2:] == (height, width):
        return image
    method = cv2.INTER_LANCZOS4 if enlarges else cv2.INTER_AREA
    resized = torch.from_numpy(cv2.resize(_array(image), (width, height), interpolation=method))
    return resized.unsqueeze(0) if resized.ndim == 2 else resized.permute(2, 0, 1)


def restore(image: Tensor, size: tuple[int, int]) -> Tensor:
    """A drawn image, uint8 (C, H, W), at the (height, width) of the one that its map was made of."""
    return resize(image, *size, enlarges=min(image.shape[-2:]) <= min(size))


def resize_edges(edges: Tensor, height: int, width: int) -> Tensor:
    """A map, bool (H, W), at another size by the nearest pixel, as OpenCV counts them; Pillow takes others."""
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
        """The map, bool (H, W)."""
        flat = np.unpackbits(np.frombuffer(self.bits, np.uint8), count=self.shape[0] * self.shape[1])
        return torch.from_numpy(flat.astype(bool)).view(self.shape)

    @property
    def is_empty(self) -> bool:
        """Whether no pixel is an edge."""
        return not any(self.bits)

    @cached_property
    def item(self) -> int:
        """A number of 48 bits that names what is drawn from this map: equal maps make equal images."""
        words = repr((self.shape, self.size)).encode()
        return int.from_bytes(hashlib.sha256(words + self.bits).digest()[:6], "big")


def map_bytes(height: int, width: int) -> int:
    """Bytes of a packed map."""
    return -(-height * width // 8)


def pack(maps: dict[int, list[EdgeMap]]) -> dict[str, Tensor]:
    """Maps class by class as a few tensors, with hardly a byte beside their bits."""
    every = [one for label in sorted(maps) for one in maps[label]]
    sizes = torch.tensor([[*one.shape, *one.size] for one in every], dtype=torch.int16)
    return {
        "labels": torch.tensor(sorted(maps), dtype=torch.int32),
        "counts": torch.tensor([len(maps[label]) for label in sorted(maps)], dtype=torch.int32),
        "sizes": sizes[:1] if len(sizes) and (sizes == sizes[0]).all() else sizes,  # of one size: said once
        "bits": torch.from_numpy(np.frombuffer(b"".join(one.bits for one in every), np.uint8).copy()),
    }


def unpack(stored: dict[str, Tensor]) -> dict[int, list[EdgeMap]]:
    """What ``pack`` took."""
    counts, bits = stored["counts"].tolist(), stored["bits"].numpy().tobytes()
    sizes = stored["sizes"].expand(sum(counts), 4).tolist() if sum(counts) else []
    maps: dict[int, list[EdgeMap]] = {label: [] for label in stored["labels"].tolist()}
    start = 0
    for label, (tall, wide, *size) in zip(np.repeat(list(maps), counts).tolist(), sizes):
        stop = start + map_bytes(tall, wide)
        maps[label].append(EdgeMap(bits[start:stop], (tall, wide), tuple(size)))
        start = stop
    return maps
