"""From uint8 images to what a network wants, and nowhere else: sizes, channels, augmentation, value ranges.

Small images are augmented as a whole batch on the device. Large ones are decoded, cropped and resized one by one in
worker processes; what follows the crop runs per batch on the device.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode

from utils.images import ImageSet, decode_image

RESIZE_MODES = {mode.value: mode for mode in InterpolationMode}


@dataclass(frozen=True)
class Recipe:
    """What is done to a training image. Sizes are pixels; probabilities and ranges are PyCIL's."""

    padding: int = 0  # random crop after zero padding
    flip: bool = False  # horizontal, p = 0.5
    brightness: float = 0.0  # factor drawn from [1 - b, 1 + b]
    crop_scale: tuple[float, float] | None = None  # RandomResizedCrop's area; None: no resized crop
    test_resize: str = "bilinear"  # of large test images


RECIPES = {
    "none": Recipe(),
    "crop": Recipe(padding=4),
    "cifar": Recipe(padding=4, flip=True, brightness=63 / 255),
    "imagenet": Recipe(flip=True, crop_scale=(0.08, 1.0)),
    "imagenet_jitter": Recipe(flip=True, brightness=63 / 255, crop_scale=(0.08, 1.0)),
    "asp": Recipe(flip=True, crop_scale=(0.05, 1.0), test_resize="bicubic"),
}


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """[0, 1] float (B, C, H, W) to zero mean and unit spread; one grey channel becomes three."""
    return (images - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 in [0, 255] to float in [-1, 1], what diffusion models train on."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Float in [-1, 1] (clamped) to uint8 in [0, 255], rounded to the nearest grey level."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def shift_and_flip(images: Tensor, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Zero-padded random crop and horizontal flip of a whole batch in one gather.

    Args:
        images: (B, C, H, W), any dtype, on any device.
        padding: up to so many pixels of shift in each direction.
        flip: mirror each image with probability one half.
        generator: on the CPU; draws are made there and moved.

    Returns:
        (B, C, H, W), the same dtype.
    """
    size, height, width = len(images), images.shape[-2], images.shape[-1]
    top = torch.randint(2 * padding + 1, (size, 1), generator=generator)
    left = torch.randint(2 * padding + 1, (size, 1), generator=generator)
    rows = torch.arange(height) + top  # (B, H)
    columns = (torch.arange(width) + left).where(
        torch.rand(size, 1, generator=generator) < 0.5 if flip else torch.ones(size, 1, dtype=torch.bool),
        torch.arange(width).flip(0) + left,
    )
    padded = torch.nn.functional.pad(images, (padding,) * 4) if padding else images
    rows, columns = rows.to(images.device), columns.to(images.device)
    batch = torch.arange(size, device=images.device)
    # Channels move last so that one index fetches a whole pixel; the result is in channels_last order.
    picked = padded.permute(0, 2, 3, 1)[batch[:, None, None], rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)


def random_resized_crop(image: Tensor, size: int, scale: tuple[float, float], generator: torch.Generator) -> Tensor:
    """A random part of one image, uint8 (C, H, W), as (C, size, size): area in ``scale``, aspect from 3/4 to 4/3."""
    height, width = image.shape[-2:]
    for _ in range(10):
        area = height * width * torch.empty(1).uniform_(*scale, generator=generator).item()
        ratio = torch.empty(1).uniform_(-1, 1, generator=generator).mul(torch.tensor(4 / 3).log()).exp().item()
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(height - h + 1, (1,), generator=generator))
            left = int(torch.randint(width - w + 1, (1,), generator=generator))
            return F.resized_crop(image, top, left, h, w, [size, size], antialias=True)
    side = min(height, width)
    return F.resize(F.center_crop(image, [side, side]), [size, size], antialias=True)


def resize_and_crop(image: Tensor, size: int, resize: str = "bilinear") -> Tensor:
    """The test view of one large image: the short side to size * 8 / 7, then the middle (C, size, size)."""
    resized = F.resize(image, [size * 8 // 7], interpolation=RESIZE_MODES[resize], antialias=True)
    return F.center_crop(resized, [size, size])


def match_channels(image: Tensor, channels: int) -> Tensor:
    """Grey repeated to three channels, (..., C, H, W); three channels stay."""
    return image if image.shape[-3] == channels else image.expand(*image.shape[:-3], channels, *image.shape[-2:])


def stack(images: ImageSet, size: int, resize: str = "bicubic") -> Tensor:
    """All images as one uint8 tensor (N, C, size, size), those of another size resized with antialiasing.

    Args:
        images: at least one; files may have any sizes and be grey or coloured.
        size: side in pixels.
        resize: "bicubic", "bilinear" or "nearest".
    """
    mode = RESIZE_MODES[resize]

    def square(pixels: Tensor) -> Tensor:
        if pixels.shape[-2:] == (size, size):
            return pixels
        return F.resize(pixels, [size, size], interpolation=mode, antialias=True)

    tensors: list[Tensor] = []
    for part in images.parts:
        if isinstance(part.images, Tensor):
            tensors.append(square(part.images))
        else:
            with ThreadPoolExecutor() as pool:
                tensors += pool.map(lambda path: square(decode_image(path)).unsqueeze(0), part.images)
    channels = max(tensor.shape[1] for tensor in tensors)
    return torch.cat([match_channels(tensor, channels) for tensor in tensors])


class ClassifierTransform:
    """A data set's views of its images: training, test, both float (B, 3, S, S).

    Args:
        recipe: what is done to training images.
        size: side of the network's input in pixels.
        mean, std: three floats for images in [0, 1].
        in_memory: small images that are augmented as a batch; else ``load_*`` works image by image in a worker.
    """

    def __init__(self, recipe: Recipe, size: int, mean, std, in_memory: bool, resize: str = "bicubic"):
        self.recipe, self.size, self.resize = recipe, size, resize
        self.whole_batch = in_memory and recipe.crop_scale is None
        self.mean, self.std = torch.tensor(mean), torch.tensor(std)

    def load_train(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """One uint8 (C, H, W) image to uint8 (3, S, S), in a worker."""
        scale = self.recipe.crop_scale
        if scale is None:
            return match_channels(resize_and_crop(image, self.size, self.recipe.test_resize), 3)
        return match_channels(random_resized_crop(image, self.size, scale, generator), 3)

    def load_test(self, image: Tensor) -> Tensor:
        """One uint8 (C, H, W) image to uint8 (3, S, S), in a worker."""
        return match_channels(resize_and_crop(image, self.size, self.recipe.test_resize), 3)

    def train(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """uint8 (B, C, S, S) to an augmented float batch (B, 3, S, S)."""
        recipe = self.recipe
        padding = recipe.padding if self.whole_batch else 0
        if padding or recipe.flip:
            images = shift_and_flip(images, padding, recipe.flip, generator)
        pixels = images.float() / 255
        if recipe.brightness:
            factor = torch.empty(len(images), 1, 1, 1).uniform_(
                1 - recipe.brightness, 1 + recipe.brightness, generator=generator
            )
            pixels = (pixels * factor.to(pixels.device)).clamp(0, 1)
        return self._normalise(pixels)

    def test(self, images: Tensor) -> Tensor:
        """uint8 (B, C, S, S) to a float batch (B, 3, S, S)."""
        return self._normalise(images.float() / 255)

    def _normalise(self, pixels: Tensor) -> Tensor:
        result = normalise(pixels, self.mean.to(pixels.device), self.std.to(pixels.device))
        return result.contiguous(memory_format=torch.channels_last)


class DiffusionTransform:
    """A generator's view of small images: float in [-1, 1], (B, C, S, S), with flips where the data set has them."""

    whole_batch = True

    def __init__(self, size: int, flip: bool, resize: str = "bicubic"):
        self.size, self.flip, self.resize = size, flip, resize

    def train(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """uint8 (B, C, S, S) to float (B, C, S, S) in [-1, 1]."""
        if self.flip:
            images = shift_and_flip(images, 0, True, generator)
        return to_unit_range(images).contiguous()

    def test(self, images: Tensor) -> Tensor:
        """uint8 (B, C, S, S) to float (B, C, S, S) in [-1, 1]."""
        return to_unit_range(images)


def classifier_transform(dataset, resize: str = "bicubic") -> ClassifierTransform:
    """The transform that a data set asks for (`Dataset.augmentation`, `image_size`, `mean`, `std`, `in_memory`)."""
    return ClassifierTransform(
        RECIPES[dataset.augmentation], dataset.image_size, dataset.mean, dataset.std, dataset.in_memory, resize
    )
