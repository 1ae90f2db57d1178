"""AutoAugment's operations against the widely used ImageNetPolicy in PIL, with which ESCORT trains.

The ranges are those of Cubuk et al., arXiv:1805.09501, Table 6, in ten steps. How a strength is applied, and the grey
of 128 behind what turns and shears, are that code's.
"""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms import AutoAugment

from utils.data.augment import IMAGENET_POLICY, auto_augment

RANGES = {
    "ShearX": np.linspace(0, 0.3, 10), "Rotate": np.linspace(0, 30, 10), "Solarize": np.linspace(256, 0, 10),
    "Posterize": np.round(np.linspace(8, 4, 10)).astype(int), "Color": np.linspace(0, 0.9, 10),
    "Contrast": np.linspace(0, 0.9, 10), "Sharpness": np.linspace(0, 0.9, 10),
}  # fmt: skip
GREY = (128, 128, 128)


def turned(image, degrees):
    """Rotated where there is something to see, over grey."""
    seen = image.convert("RGBA").rotate(degrees)
    return Image.composite(seen, Image.new("RGBA", seen.size, (128,) * 4), seen).convert(image.mode)


ORIGINAL = {
    "AutoContrast": lambda image, size, sign: ImageOps.autocontrast(image),
    "Color": lambda image, size, sign: ImageEnhance.Color(image).enhance(1 + size * sign),
    "Contrast": lambda image, size, sign: ImageEnhance.Contrast(image).enhance(1 + size * sign),
    "Equalize": lambda image, size, sign: ImageOps.equalize(image),
    "Invert": lambda image, size, sign: ImageOps.invert(image),
    "Posterize": lambda image, size, sign: ImageOps.posterize(image, int(size)),
    "Rotate": lambda image, size, sign: turned(image, size),
    "Sharpness": lambda image, size, sign: ImageEnhance.Sharpness(image).enhance(1 + size * sign),
    "ShearX": lambda image, size, sign: image.transform(
        image.size, Image.AFFINE, (1, size * sign, 0, 0, 1, 0), Image.BICUBIC, fillcolor=GREY
    ),
    "Solarize": lambda image, size, sign: ImageOps.solarize(image, size),
}
# The published pairs are torchvision's too.
POLICIES = AutoAugment().policies
USED = sorted({(name, strength) for pair in POLICIES for name, _, strength in pair}, key=str)


def photograph():
    x, y = np.meshgrid(np.linspace(0, 255, 40), np.linspace(10, 240, 30))
    noise = np.random.default_rng(0).integers(-10, 10, (30, 40))
    return Image.fromarray(np.stack([x, y, (x + y) / 2 + noise], axis=2).clip(0, 255).astype(np.uint8))


def ours(monkeypatch, image, name, strength, seed=0):
    """The image after one operation alone."""
    monkeypatch.setattr(IMAGENET_POLICY, "_policies", [((name, 1.0, strength),)])
    return auto_augment(torch.from_numpy(np.array(image)).permute(2, 0, 1), torch.Generator().manual_seed(seed))


def same(left, right) -> bool:
    """Up to a grey level: the strengths are float32 here and float64 there."""
    return bool((left.int() - right.int()).abs().max() <= 1)


@pytest.mark.parametrize(("name", "strength"), USED)
def test_an_operation_is_that_of_the_original(monkeypatch, name, strength):
    image, size = photograph(), RANGES[name][strength] if name in RANGES else 0
    plus, minus = (torch.from_numpy(np.array(ORIGINAL[name](image, size, sign))).permute(2, 0, 1) for sign in (1, -1))
    drawn = [ours(monkeypatch, image, name, strength, seed) for seed in range(8)]
    signs = {(same(changed, plus), same(changed, minus)) for changed in drawn}
    assert signs == ({(True, True)} if same(plus, minus) else {(True, False), (False, True)})


@pytest.mark.parametrize(
    ("name", "corners"),
    [("Rotate", [(0, 0), (0, -1), (-1, 0), (-1, -1)]), ("ShearX", [(-1, 0), (-1, -1)])],  # by either sign
)
def test_what_comes_into_the_image_is_grey(monkeypatch, name, corners):
    shown = [ours(monkeypatch, Image.new("RGB", (32, 32), "white"), name, 5, seed) for seed in range(8)]
    assert all(any(image[:, y, x].tolist() == [128] * 3 for image in shown) for y, x in corners)


def test_the_pairs_are_the_published_ones():
    assert IMAGENET_POLICY._policies == POLICIES and len(POLICIES) == 25
