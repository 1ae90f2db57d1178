"""Random crops and flips, of whole batches of small images and of single large ones.

A batch is cut in one operation on its device; the draws are made on the CPU, so that a seed means the same everywhere.
"""

from __future__ import annotations

import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor

Range = tuple[float, float]


def shift_and_flip(images: Tensor, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Crop a zero-padded batch at random and mirror some of its images, all in one gather.

    Args:
        images: (B, C, H, W), any dtype, on any device.
        padding: up to so many pixels of shift in each direction.
        flip: mirror each image with probability one half.
        generator: on the CPU; draws are made there and moved.

    Returns:
        (B, C, H, W), the same dtype.
    """
    count, _, height, width = images.shape
    rows = torch.arange(height) + torch.randint(2 * padding + 1, (count, 1), generator=generator)  # (B, H)
    columns = torch.arange(width) + torch.randint(2 * padding + 1, (count, 1), generator=generator)  # (B, W)
    if flip:
        columns = columns.where(torch.rand(count, 1, generator=generator) < 0.5, columns.flip(1))
    padded = torch.nn.functional.pad(images, (padding,) * 4) if padding else images
    rows, columns = rows.to(images.device), columns.to(images.device)
    batch = torch.arange(count, device=images.device)
    # Channels move last so that one index fetches a whole pixel; the result is in channels_last order.
    return padded.permute(0, 2, 3, 1)[batch[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def crop_boxes(count: int, height: int, width: int, scale: Range, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Draw boxes as torchvision's RandomResizedCrop does: area in ``scale``, aspect from 3/4 to 4/3.

    Returns:
        top, left, height and width in pixels, int64 (count,) each; where none of ten draws fits, the middle with the
        longest side that the aspects allow.
    """
    # Ten draws at once for every box, of which the first that fits is taken.
    area = height * width * torch.empty(count, 10).uniform_(*scale, generator=generator)
    ratio = torch.empty(count, 10).uniform_(-1, 1, generator=generator).mul(torch.tensor(4 / 3).log()).exp()
    widths, heights = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)  # (count, 10)
    first, found = fits.int().argmax(1, keepdim=True), fits.any(1)
    middle = min(height, round(width / (3 / 4))), min(width, round(height * (4 / 3)))
    h, w = (sides.gather(1, first).flatten().where(found, side) for sides, side in zip((heights, widths), middle))
    top, left = (
        (torch.rand(count, generator=generator) * (room + 1)).long().where(found, room // 2)
        for room in (height - h, width - w)
    )
    return top, left, h, w


def random_resized_crop(image: Tensor, size: int, scale: Range, generator: torch.Generator) -> Tensor:
    """Cut a random box out of one image, uint8 (C, H, W), and resize it to (C, size, size); see ``crop_boxes``."""
    top, left, h, w = (int(number) for number in crop_boxes(1, *image.shape[-2:], scale, generator))
    return F.resized_crop(image, top, left, h, w, [size, size], antialias=True)


def crop_and_flip(images: Tensor, size: int, scale: Range, flip: bool, generator: torch.Generator) -> Tensor:
    """Cut and enlarge random boxes of a batch of small images, and mirror some, in two matrix products.

    It is bilinear and equals ``random_resized_crop`` within rounding. Antialiasing is left out, since it has no effect
    where images are enlarged: keep them no larger than ``size``.

    Args:
        images: float (B, C, H, W), H, W <= size, on any device.
        size: side of the result in pixels.
        scale: range of a crop's share of the area.
        flip: mirror each image with probability one half.
        generator: on the CPU; draws are made there and moved.

    Returns:
        (B, C, size, size) in channels_last order.
    """
    count, channels, height, width = images.shape
    top, left, h, w = crop_boxes(count, height, width, scale, generator)
    rows, columns = _bilinear(top, h, size, height), _bilinear(left, w, size, width)
    if flip:
        mirrored = torch.rand(count, 1, 1, generator=generator) < 0.5
        columns = columns.flip(1).where(mirrored, columns)
    wide = images.flatten(1, 2) @ columns.to(images.device).transpose(1, 2)  # (B, C * H, size)
    wide = wide.view(count, channels, height, size).permute(0, 2, 3, 1).flatten(2)  # (B, H, size * C)
    return (rows.to(images.device) @ wide).view(count, size, size, channels).permute(0, 3, 1, 2)


def _bilinear(start: Tensor, length: Tensor, size: int, total: int) -> Tensor:
    """Weights (B, size, total) that stretch ``length`` pixels from ``start`` on to ``size``; edges are repeated."""
    position = start[:, None] + (torch.arange(size) + 0.5) * (length / size)[:, None] - 0.5  # (B, size)
    position = position.clamp(start[:, None], (start + length - 1)[:, None])
    return (1 - (position[:, :, None] - torch.arange(total)).abs()).clamp(min=0)
