"""Rotations, colours and erased rectangles for whole batches, and AutoAugment for single images.

The formulas for batches are those of kornia 0.7.1, with which Cywiński et al. (arXiv:2403.03938) train; several differ
from torchvision's of the same name. Batches are changed on their device; the draws are made on the CPU, so that a seed
means the same everywhere.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import AutoAugment, AutoAugmentPolicy
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from utils.data.crops import Range


class Policy(AutoAugment):
    """AutoAugment of PIL images, as the widely used code has it with which Duan et al. (arXiv:2311.18266) train.

    torchvision's own fills with black what moves, turns and shears into the image, turns to either side, and neither
    interpolates when it shears, nor moves by parts of a pixel, nor solarizes above quite the same level.
    """

    def _apply_image_or_video_transform(self, image, transform_id, level, *args, **kwargs):
        # What leads from a place in the new image to its place in the old one.
        maps = {"ShearX": (1, level, 0, 0, 1, 0), "ShearY": (1, 0, 0, level, 1, 0),
                "TranslateX": (1, 0, level, 0, 1, 0), "TranslateY": (1, 0, 0, 0, 1, level)}  # fmt: skip
        if transform_id == "Rotate":
            return image.rotate(abs(level), fillcolor="grey")
        if transform_id in maps:
            resample = Image.BICUBIC if "Shear" in transform_id else Image.NEAREST
            return image.transform(image.size, Image.AFFINE, maps[transform_id], resample, fillcolor="grey")
        level *= 256 / 255 if transform_id == "Solarize" else 1
        return super()._apply_image_or_video_transform(image, transform_id, level, *args, **kwargs)


POLICIES = {"imagenet": Policy(AutoAugmentPolicy.IMAGENET), "cifar": Policy(AutoAugmentPolicy.CIFAR10)}


def scale_brightness(images: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Multiply each image, float (B, C, H, W) in [0, 1], by its own factor from [1 - amount, 1 + amount]; clamp."""
    factor = _uniform(len(images), 1 - amount, 1 + amount, generator).view(-1, 1, 1, 1)
    return (images * factor.to(images.device)).clamp(0, 1)


def rotate(images: Tensor, degrees: float, p: float, generator: torch.Generator) -> Tensor:
    """Turn some images about their middle, bilinear; pixels from outside are black.

    Args:
        images: float (B, C, H, W), on any device.
        degrees: angles are drawn from [-degrees, degrees], one per image.
        p: share of images that are turned; the others keep every bit.
        generator: on the CPU.

    Returns:
        (B, C, H, W).
    """
    count, _, height, width = images.shape
    angle = _uniform(count, -degrees, degrees, generator).deg2rad().to(images.device)
    chosen = (torch.rand(count, 1, 1, 1, generator=generator) < p).to(images.device)
    cos, sin = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
    y = (torch.arange(height, device=images.device) - (height - 1) / 2).view(-1, 1)  # pixels below the middle
    x = torch.arange(width, device=images.device) - (width - 1) / 2  # pixels right of it
    # Built by hand: `affine_grid` is a matrix product, which half precision would move by parts of a pixel.
    grid = torch.stack([(cos * x - sin * y) * 2 / width, (sin * x + cos * y) * 2 / height], dim=-1)  # (B, H, W, 2)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False).where(chosen, images)


def jiggle(images: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Change brightness, contrast, saturation and hue, in an order drawn for the batch, by amounts drawn per image.

    With four numbers e from [-amount, amount]: brightness adds e and contrast multiplies by 1 + e, both cut to [0, 1];
    saturation is multiplied by 1 + e and cut to 1, and hue turned by e, both in HSV.

    Args:
        images: float (B, 1 or 3, H, W) in [0, 1], on any device. One channel has neither saturation nor hue.
        amount: 0 to 0.5; for hue, in whole turns.
        generator: on the CPU.

    Returns:
        (B, C, H, W) in [0, 1].
    """
    drawn = _uniform(4 * len(images), -amount, amount, generator).view(4, -1, 1, 1, 1)
    brightness, contrast, saturation, hue = drawn.to(images.device)
    steps = (
        lambda pixels: (pixels + brightness).clamp(0, 1),
        lambda pixels: (pixels * (1 + contrast)).clamp(0, 1),
        lambda pixels: _recolour(pixels, saturation=1 + saturation),
        lambda pixels: _recolour(pixels, turns=hue),
    )
    for step in torch.randperm(4, generator=generator).tolist():
        images = steps[step](images)
    return images


def erase(images: Tensor, p: float, area: Range, aspect: Range, generator: torch.Generator) -> Tensor:
    """Blacken a random rectangle of some images.

    A rectangle is as likely to be tall as wide, its aspect uniform on either side of 1. A side that would be longer
    than the image is cut to it, so that the area may fall short.

    Args:
        images: float (B, C, H, W), on any device.
        p: share of images that lose a rectangle.
        area: range of its share of the image.
        aspect: range of height / width, around 1.
        generator: on the CPU.

    Returns:
        (B, C, H, W).
    """
    assert aspect[0] <= 1 <= aspect[1], f"aspects {aspect} must lie around 1"
    count, _, height, width = images.shape
    size = height * width * _uniform(count, *area, generator)  # pixels
    tall, wide = _uniform(count, 1, aspect[1], generator), _uniform(count, aspect[0], 1, generator)
    ratio = tall.where(torch.rand(count, generator=generator) < 0.5, wide)
    rows = _draw_stretch((size * ratio).sqrt(), height, generator)  # (B, H)
    columns = _draw_stretch((size / ratio).sqrt(), width, generator)  # (B, W)
    rows &= torch.rand(count, 1, generator=generator) < p
    erased = rows.to(images.device)[:, None, :, None] & columns.to(images.device)[:, None, None, :]  # (B, 1, H, W)
    return images.masked_fill(erased, 0)


def auto_augment(image: Tensor, policy: str, generator: torch.Generator) -> Tensor:
    """Apply one of 25 pairs of operations, whose probabilities and strengths were found by search.

    Cubuk et al., "AutoAugment: Learning Augmentation Strategies from Data", CVPR 2019, arXiv:1805.09501, Tables 7, 9.
    Pixels that come into the image are grey.

    Args:
        image: uint8 (3, H, W), on any device; it is changed on the CPU.
        policy: "imagenet" or "cifar", where the search was made.
        generator: on the CPU.

    Returns:
        uint8 (3, H, W).
    """
    # torchvision draws from the CPU's global generator alone. `torch.manual_seed` would reach a GPU's as well, which
    # the fork does not restore.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(torch.randint(2**63 - 1, (), generator=generator)))
        return pil_to_tensor(POLICIES[policy](to_pil_image(image.cpu()))).to(image.device)


def cut_out(image: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Blacken a square of (C, H, W) about a random pixel, as far as it lies in the image; ``generator`` on the CPU.

    DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", arXiv:1708.04552.
    """
    y, x = (int(torch.randint(length, (), generator=generator)) for length in image.shape[-2:])
    rows, columns = (slice(max(middle - side // 2, 0), middle + side // 2) for middle in (y, x))
    image = image.clone()
    image[:, rows, columns] = 0
    return image


def rgb_to_hsv(images: Tensor) -> Tensor:
    """Turn float RGB (B, 3, H, W) in [0, 1] into hue in turns, saturation and value; the hue of grey is any."""
    red, green, blue = images.unbind(1)
    value, brightest = images.max(dim=1, keepdim=True)
    chroma = value - images.amin(dim=1, keepdim=True)
    # Sixths of a turn from the brightest colour's own place on the circle.
    sixths = torch.stack([green - blue, blue - red, red - green], dim=1).gather(1, brightest)
    hue = (sixths / chroma.where(chroma > 0, 1) + 2 * brightest) / 6 % 1
    return torch.cat([hue, chroma / value.where(value > 0, 1), value], dim=1)


def hsv_to_rgb(images: Tensor) -> Tensor:
    """Turn hue in turns (any number), saturation and value in [0, 1] into float RGB (B, 3, H, W)."""
    hue, saturation, value = images.split(1, dim=1)
    place = torch.tensor([5.0, 3.0, 1.0], device=images.device).view(1, 3, 1, 1)
    # A colour is absent for a third of the circle, full for another, and rises and falls by a straight line between.
    sixths = (place + 6 * hue) % 6
    return value * (1 - saturation * torch.minimum(sixths, 4 - sixths).clamp(0, 1))


def _recolour(images: Tensor, saturation: Tensor | float = 1.0, turns: Tensor | float = 0.0) -> Tensor:
    if images.shape[1] == 1:  # grey
        return images
    hue, strength, value = rgb_to_hsv(images).split(1, dim=1)
    return hsv_to_rgb(torch.cat([hue + turns, (strength * saturation).clamp(max=1), value], dim=1))


def _draw_stretch(length: Tensor, room: int, generator: torch.Generator) -> Tensor:
    """Mark ``length`` (B,) pixels, rounded, at a random place: bool (B, room)."""
    length = length.round().clamp(1, room)
    start = (torch.rand(len(length), generator=generator) * (room - length + 1)).floor()
    place = torch.arange(room)
    return (place >= start[:, None]) & (place < (start + length)[:, None])


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.empty(count).uniform_(low, high, generator=generator)
