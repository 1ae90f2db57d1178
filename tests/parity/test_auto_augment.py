"""AutoAugment's operations against the widely used policies in PIL, with which ESCORT and PyCIL's newer data train.

The ranges are those of Cubuk et al., arXiv:1805.09501, Table 6, in ten steps. How a strength is applied, and the grey
of 128 behind what turns and shears, are that code's.
"""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms import AutoAugment, AutoAugmentPolicy

from utils.data.augment import POLICIES, auto_augment

RANGES = {
    "ShearX": np.linspace(0, 0.3, 10), "ShearY": np.linspace(0, 0.3, 10),
    "TranslateX": np.linspace(0, 150 / 331, 10), "TranslateY": np.linspace(0, 150 / 331, 10),  # shares of the image
    "Brightness": np.linspace(0, 0.9, 10), "Rotate": np.linspace(0, 30, 10), "Solarize": np.linspace(256, 0, 10),
    "Posterize": np.round(np.linspace(8, 4, 10)).astype(int), "Color": np.linspace(0, 0.9, 10),
    "Contrast": np.linspace(0, 0.9, 10), "Sharpness": np.linspace(0, 0.9, 10),
}  # fmt: skip
GREY = (128, 128, 128)


def turned(image, degrees):
    """Rotated where there is something to see, over grey."""
    seen = image.convert("RGBA").rotate(degrees)
    return Image.composite(seen, Image.new("RGBA", seen.size, (128,) * 4), seen).convert(image.mode)


def moved(image, rows, resample=Image.NEAREST):
    """Over grey, by what leads from a place in the new image to its place in the old one."""
    return image.transform(image.size, Image.AFFINE, rows, resample, fillcolor=GREY)


ORIGINAL = {
    "Brightness": lambda image, size, sign: ImageEnhance.Brightness(image).enhance(1 + size * sign),
    "TranslateX": lambda image, size, sign: moved(image, (1, 0, size * image.size[0] * sign, 0, 1, 0)),
    "TranslateY": lambda image, size, sign: moved(image, (1, 0, 0, 0, 1, size * image.size[1] * sign)),
    "ShearY": lambda image, size, sign: moved(image, (1, 0, 0, size * sign, 1, 0), Image.BICUBIC),
    "AutoContrast": lambda image, size, sign: ImageOps.autocontrast(image),
    "Color": lambda image, size, sign: ImageEnhance.Color(image).enhance(1 + size * sign),
    "Contrast": lambda image, size, sign: ImageEnhance.Contrast(image).enhance(1 + size * sign),
    "Equalize": lambda image, size, sign: ImageOps.equalize(image),
    "Invert": lambda image, size, sign: ImageOps.invert(image),
    "Posterize": lambda image, size, sign: ImageOps.posterize(image, int(size)),
    "Rotate": lambda image, size, sign: turned(image, size),
    "Sharpness": lambda image, size, sign: ImageEnhance.Sharpness(image).enhance(1 + size * sign),
    "ShearX": lambda image, size, sign: moved(image, (1, size * sign, 0, 0, 1, 0), Image.BICUBIC),
    "Solarize": lambda image, size, sign: ImageOps.solarize(image, size),
}
# The published pairs are torchvision's too.
PUBLISHED = {
    name: AutoAugment(AutoAugmentPolicy(of)).policies for name, of in (("imagenet", "imagenet"), ("cifar", "cifar10"))
}
USED = sorted(
    {(policy, name, strength) for policy, pairs in PUBLISHED.items() for pair in pairs for name, _, strength in pair},
    key=str,
)


def photograph():
    x, y = np.meshgrid(np.linspace(0, 255, 40), np.linspace(10, 240, 30))
    noise = np.random.default_rng(0).integers(-10, 10, (30, 40))
    return Image.fromarray(np.stack([x, y, (x + y) / 2 + noise], axis=2).clip(0, 255).astype(np.uint8))


def ours(monkeypatch, image, policy, name, strength, seed=0):
    """The image after one operation alone."""
    monkeypatch.setattr(POLICIES[policy], "_policies", [((name, 1.0, strength),)])
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return auto_augment(pixels, policy, torch.Generator().manual_seed(seed))


def same(left, right) -> bool:
    """Up to a grey level: the strengths are float32 here and float64 there."""
    return bool((left.int() - right.int()).abs().max() <= 1)


@pytest.mark.parametrize(("policy", "name", "strength"), USED)
def test_an_operation_is_that_of_the_original(monkeypatch, policy, name, strength):
    image, size = photograph(), RANGES[name][strength] if name in RANGES else 0
    plus, minus = (torch.from_numpy(np.array(ORIGINAL[name](image, size, sign))).permute(2, 0, 1) for sign in (1, -1))
    drawn = [ours(monkeypatch, image, policy, name, strength, seed) for seed in range(8)]
    signs = {(same(changed, plus), same(changed, minus)) for changed in drawn}
    assert signs == ({(True, True)} if same(plus, minus) else {(True, False), (False, True)})


@pytest.mark.parametrize(
    ("name", "corners"),
    [("Rotate", [(0, 0), (0, -1), (-1, 0), (-1, -1)]), ("ShearX", [(-1, 0), (-1, -1)])],  # by either sign
)
def test_what_comes_into_the_image_is_grey(monkeypatch, name, corners):
    shown = [ours(monkeypatch, Image.new("RGB", (32, 32), "white"), "imagenet", name, 5, seed) for seed in range(8)]
    assert all(any(image[:, y, x].tolist() == [128] * 3 for image in shown) for y, x in corners)


@pytest.mark.parametrize("policy", PUBLISHED)
def test_the_pairs_are_the_published_ones(policy):
    assert POLICIES[policy]._policies == PUBLISHED[policy] and len(PUBLISHED[policy]) == 25
