"""From uint8 images to what a network wants, and nowhere else: sizes, channels, augmentation, value ranges.

Small images are augmented as a whole batch on the device. Large ones are decoded, cropped and resized one by one in
worker processes; what follows the crop runs per batch on the device, unless AutoAugment is part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode

from utils.data.augment import auto_augment, cut_out, erase, jiggle, rotate, scale_brightness
from utils.data.crops import Range, crop_and_flip, random_resized_crop, shift_and_flip
from utils.data.images import ImageSet, decode_image

if TYPE_CHECKING:  # its photographs import this module
    from utils.data.datasets.base import Dataset, Triple


@dataclass(frozen=True)
class Augmentation:
    """Changes to a training image. Sizes are pixels; probabilities and ranges are published ones."""

    padding: int = 0  # random crop after zero padding
    flip: bool = False  # horizontal, p = 0.5
    brightness: float = 0.0  # factor drawn from [1 - b, 1 + b]
    crop_scale: Range | None = None  # RandomResizedCrop's area; None: no resized crop
    auto_augment: str = ""  # a policy of `utils.data.augment`, image by image after crop, flip and brightness
    hole: int = 0  # side of the square that is blackened behind it
    rotation: float = 0.0  # degrees to either side, p = 0.5
    jiggle: float = 0.0  # brightness, contrast, saturation and hue by up to this much: `utils.data.augment.jiggle`
    erasing: float = 0.0  # probability of a black rectangle
    erased_area: Range = (0.1, 0.5)  # its share of the image
    erased_aspect: Range = (0.3, 3.3)  # its height / width
    test_resize: str = "bilinear"  # of large test images


AUGMENTATIONS = {
    "none": Augmentation(),
    "crop": Augmentation(padding=4),
    "cifar": Augmentation(padding=4, flip=True, brightness=63 / 255),
    "imagenet": Augmentation(flip=True, crop_scale=(0.08, 1.0)),
    "imagenet_jitter": Augmentation(flip=True, brightness=63 / 255, crop_scale=(0.08, 1.0)),
    "vit_crop": Augmentation(flip=True, crop_scale=(0.05, 1.0), test_resize="bicubic"),
    "auto_augment": Augmentation(flip=True, brightness=63 / 255, crop_scale=(0.08, 1.0), auto_augment="imagenet"),
    "cifar_aa": Augmentation(padding=4, flip=True, brightness=63 / 255, auto_augment="cifar", hole=16),
    "strong": Augmentation(padding=4, flip=True, rotation=30, jiggle=0.1, erasing=0.5),
}


def to_unit_range(images: Tensor) -> Tensor:
    """Turn uint8 in [0, 255] into float in [-1, 1], the range that diffusion models train on."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Turn float in [-1, 1] (clamped) into uint8 in [0, 255], rounded to the nearest grey level."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def resize_and_crop(image: Tensor, size: int, resize: str = "bilinear") -> Tensor:
    """Resize the short side of test images, (..., C, H, W), to size * 8 / 7 and cut out the middle square."""
    resized = F.resize(image, [size * 8 // 7], interpolation=InterpolationMode(resize), antialias=True)
    return F.center_crop(resized, [size, size])


def resize_to_square(pixels: Tensor, size: int, resize: str) -> Tensor:
    """Resize images (..., C, H, W) to (..., C, size, size) with antialiasing; leave those of this size alone."""
    return F.resize(pixels, [size, size], interpolation=InterpolationMode(resize), antialias=True)


def match_channels(image: Tensor, channels: int) -> Tensor:
    """Repeat grey (..., 1, H, W) to three channels; leave three alone."""
    return image if image.shape[-3] == channels else image.expand(*image.shape[:-3], channels, *image.shape[-2:])


def stack_images(images: ImageSet, size: int, resize: str = "bicubic") -> Tensor:
    """Stack all images as one uint8 tensor (N, C, size, size), those of another size resized with antialiasing.

    Args:
        images: at least one; files may have any sizes and be grey or coloured.
        size: side in pixels.
        resize: "bicubic", "bilinear" or "nearest".
    """
    return stack_by_size(images, lambda pixels: resize_to_square(pixels, size, resize))[0]


def stack_by_size(images: ImageSet, fit: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Read all images into memory, in stored order: uint8 (N_i, C, H_i, W_i), a tensor for each stretch of one size.

    Args:
        images: files may have any sizes and be grey or coloured.
        fit: brings one image (C, H, W), or many of one size (N, C, H, W), to the size that they are kept at.
    """
    tensors: list[Tensor] = []
    for part in images.parts:
        if isinstance(part.images, Tensor):
            tensors.append(fit(part.images))
        else:
            with ThreadPoolExecutor() as pool:
                tensors += pool.map(lambda path: fit(decode_image(path)).unsqueeze(0), part.images)
    channels = max((tensor.shape[1] for tensor in tensors), default=0)
    stretches = groupby((match_channels(tensor, channels) for tensor in tensors), key=lambda tensor: tensor.shape[2:])
    return [torch.cat(list(stretch)) for _, stretch in stretches]


class ClassifierTransform:
    """A data set's views of its images: training, test, both float (B, 3, S, S).

    Small images lie on the device as uint8 at the size that ``keep`` gives them. Where they are cropped, that is their
    own: enlarged copies would take 49 times the memory at 32 -> 224 pixels, and are made per batch instead.

    Args:
        augmentation: changes to training images.
        size: side of the network's input in pixels.
        mean, std: three floats for images in [0, 1].
        in_memory: small images that are augmented as a batch; else ``load_*`` works image by image in a worker.
        resize: how images without a crop are brought to the network's size: replay of another size.
    """

    def __init__(
        self, augmentation: Augmentation, size: int, mean: Triple, std: Triple, in_memory: bool, resize: str = "bicubic"
    ):
        self.augmentation, self.size, self.resize, self.whole_batch = augmentation, size, resize, in_memory
        self.mean, self.std = torch.tensor(mean), torch.tensor(std)
        self._crops_batches = in_memory and augmentation.crop_scale is not None

    def describe(self) -> dict[str, Any]:
        """Return what shapes its views, as JSON has it."""
        return {**asdict(self.augmentation), "size": self.size, "resize": self.resize,
                "mean": self.mean.tolist(), "std": self.std.tolist()}  # fmt: skip

    def keep(self, pixels: Tensor, training: bool) -> Tensor:
        """Bring uint8 (..., C, H, W) to the size that small images, and replay beside them, are kept at."""
        if self._crops_batches and max(pixels.shape[-2:]) <= self.size:
            return pixels
        if self._crops_batches and not training:
            return self._test_view(pixels)
        return resize_to_square(pixels, self.size, self.resize)

    def load_train(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """Turn one uint8 (C, H, W) image into uint8 (3, S, S), in a worker."""
        steps = self.augmentation
        if steps.crop_scale is not None:
            image = match_channels(random_resized_crop(image, self.size, steps.crop_scale, generator), 3)
        elif steps.auto_augment:
            image = match_channels(resize_to_square(image, self.size, self.resize), 3)
            image = shift_and_flip(image[None], steps.padding, False, generator)[0]
        else:
            return self.load_test(image)
        if not steps.auto_augment:
            return image
        # What comes before AutoAugment has to follow the crop here. Each step gives whole grey levels, as with PIL.
        if steps.flip and torch.rand((), generator=generator) < 0.5:
            image = image.flip(-1)
        if steps.brightness:
            factor = torch.empty(()).uniform_(1 - steps.brightness, 1 + steps.brightness, generator=generator)
            image = F.adjust_brightness(image, float(factor))
        image = auto_augment(image, steps.auto_augment, generator)
        return cut_out(image, steps.hole, generator) if steps.hole else image

    def load_test(self, image: Tensor) -> Tensor:
        """Turn one uint8 (C, H, W) image into uint8 (3, S, S), in a worker."""
        return match_channels(self._test_view(image), 3)

    def train(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Turn uint8 (B, C, H, W), as kept or as loaded, into an augmented float batch (B, 3, S, S)."""
        steps = self.augmentation
        if steps.auto_augment:
            if self.whole_batch:  # every image has operations of its own, so small ones too are changed one by one
                images = torch.stack([self.load_train(image, generator) for image in images])
            return self.test(images)  # at the network's size, so that only the normalisation is left
        if self._crops_batches:
            # Colours first, on the few stored pixels; stretching changes neither their scale nor their mean.
            return crop_and_flip(self._alter(images, generator), self.size, steps.crop_scale, steps.flip, generator)
        padding = steps.padding if self.whole_batch else 0
        if padding or steps.flip:
            # The code that "strong" comes from flips after its rotation. Angles to either side are equally likely, so
            # the order does not matter.
            images = shift_and_flip(images, padding, steps.flip, generator)
        return self._alter(images, generator).contiguous(memory_format=torch.channels_last)

    def test(self, images: Tensor) -> Tensor:
        """Turn uint8 (B, C, H, W), as kept or as loaded, into a float batch (B, 3, S, S)."""
        if images.shape[-2:] != (self.size, self.size):
            images = self._test_view(images)
        pixels = F.normalize(images.float() / 255, self.mean, self.std)  # one grey channel becomes three
        return pixels.contiguous(memory_format=torch.channels_last)

    def _test_view(self, images: Tensor) -> Tensor:
        return resize_and_crop(images, self.size, self.augmentation.test_resize)

    def _alter(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """What follows shift and flip; a step that is left out draws nothing."""
        steps, pixels = self.augmentation, images.float() / 255
        if steps.brightness:
            pixels = scale_brightness(pixels, steps.brightness, generator)
        if steps.rotation:
            pixels = rotate(pixels, steps.rotation, 0.5, generator)
        if steps.jiggle:
            pixels = jiggle(pixels, steps.jiggle, generator)
        if steps.erasing:
            pixels = erase(pixels, steps.erasing, steps.erased_area, steps.erased_aspect, generator)
        return F.normalize(pixels, self.mean, self.std)


class DiffusionTransform:
    """A generator's view of small images: float in [-1, 1], (B, C, S, S), with flips where the data set has them."""

    whole_batch = True

    def __init__(self, size: int, flip: bool, resize: str = "bicubic"):
        self.size, self.flip, self.resize = size, flip, resize

    def keep(self, pixels: Tensor, training: bool) -> Tensor:
        """Bring uint8 (..., C, H, W) to the generator's size."""
        return resize_to_square(pixels, self.size, self.resize)

    def train(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Turn uint8 (B, C, S, S) into float (B, C, S, S) in [-1, 1]."""
        images = shift_and_flip(images, 0, True, generator) if self.flip else images
        return to_unit_range(images).contiguous()


def classifier_transform(dataset: Dataset, resize: str = "bicubic") -> ClassifierTransform:
    """Build the transform that a data set asks for.

    Args:
        dataset: a learner with an augmentation, a mean or a deviation of its own replaces them in it.
        resize: how replay of another size is brought to the network's.
    """
    steps, size = AUGMENTATIONS[dataset.augmentation], dataset.image_size
    return ClassifierTransform(steps, size, dataset.mean, dataset.std, dataset.in_memory, resize)
