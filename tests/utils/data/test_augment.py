"""Changes to whole batches and AutoAugment, checked against torchvision, colorsys and loops over single images."""

import colorsys

import pytest
import torch
from torch.testing import assert_close
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv2

from utils.data.augment import auto_augment, erase, hsv_to_rgb, jiggle, rgb_to_hsv, rotate

AREA, ASPECT = (0.1, 0.5), (0.3, 3.3)


def generator(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(count=6, channels=3, height=8, width=8):
    return torch.rand(count, channels, height, width, generator=generator(9))


def pixelwise(function, images):
    """A function of three numbers, such as those of colorsys, for every pixel of (B, 3, H, W)."""
    rows = [function(*pixel) for pixel in images.permute(0, 2, 3, 1).reshape(-1, 3).tolist()]
    return torch.tensor(rows).view(len(images), *images.shape[2:], 3).permute(0, 3, 1, 2)


def amounts_and_order(seed, count, amount=0.1):
    """What `jiggle` draws: brightness, contrast, saturation and hue (4, B, 1, 1, 1), and the order."""
    draw = generator(seed)
    amounts = torch.empty(4, count, 1, 1, 1).uniform_(-amount, amount, generator=draw)
    return amounts, torch.randperm(4, generator=draw).tolist()


@pytest.mark.parametrize(("height", "width"), [(32, 32), (9, 14)])
def test_every_image_is_turned_by_its_own_angle_as_torchvision_turns_it(height, width):
    images = noise(5, 3, height, width)
    turned = rotate(images, 30, 1.0, generator(3))
    angles = torch.empty(5).uniform_(-30, 30, generator=generator(3)).tolist()
    expected = [tv2.rotate(image, angle, InterpolationMode.BILINEAR) for image, angle in zip(images, angles)]
    assert_close(turned, torch.stack(expected), rtol=0, atol=2e-5)
    assert len(set(angles)) == 5


def test_a_chosen_share_of_the_images_is_turned_and_the_others_keep_every_bit():
    images = noise(1, 1, 4, 4).expand(2000, -1, -1, -1)
    changed = (rotate(images, 30, 0.5, generator()) != images).flatten(1).any(1)
    assert changed.float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert torch.equal(rotate(images, 30, 0.0, generator()), images)


def test_corners_that_turn_into_the_image_are_black():
    white = torch.ones(50, 1, 32, 32)
    corners = rotate(white, 30, 1.0, generator())[..., [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.min() == 0 and corners.amax(dim=(1, 2)).median() < 0.1


def test_hue_saturation_and_value_are_those_of_colorsys_and_greys_and_pure_colours_survive_the_way_back():
    images = noise()
    assert_close(rgb_to_hsv(images), pixelwise(colorsys.rgb_to_hsv, images))
    assert_close(hsv_to_rgb(images), pixelwise(colorsys.hsv_to_rgb, images))
    colours = [(0, 0, 0), (1, 1, 1), (0.3, 0.3, 0.3), (1, 0, 0), (0, 1, 1), (1, 0, 1), (0.5, 0.5, 0)]
    pixels = torch.tensor(colours, dtype=torch.float32).view(-1, 3, 1, 1)
    hsv = rgb_to_hsv(pixels)
    assert_close(hsv_to_rgb(hsv), pixels)
    assert_close(hsv[:, 1:], pixelwise(colorsys.rgb_to_hsv, pixels)[:, 1:])


@pytest.mark.parametrize("seed", range(6))
def test_a_jiggle_is_four_changes_in_the_drawn_order(seed):
    images = noise()
    (brightness, contrast, saturation, hue), order = amounts_and_order(seed, len(images))
    expected = images
    for step in order:
        if step == 0:
            expected = (expected + brightness).clamp(0, 1)
        elif step == 1:
            expected = (expected * (1 + contrast)).clamp(0, 1)
        else:
            h, s, v = pixelwise(colorsys.rgb_to_hsv, expected).split(1, dim=1)
            h, s = (h, (s * (1 + saturation)).clamp(max=1)) if step == 2 else ((h + hue) % 1, s)
            expected = pixelwise(colorsys.hsv_to_rgb, torch.cat([h, s, v], dim=1))
    assert_close(jiggle(images, 0.1, generator(seed)), expected, rtol=0, atol=1e-5)


def test_a_jiggle_never_leaves_the_range_of_an_image():
    extremes = torch.tensor([0.0, 1.0, 0.5]).view(1, 3, 1, 1).expand(200, -1, 2, 2)
    for seed in range(20):
        changed = jiggle(extremes, 0.5, generator(seed))
        assert changed.min() >= 0 and changed.max() <= 1


def test_grey_has_neither_saturation_nor_hue_in_one_channel_as_in_three():
    grey = noise(channels=1)
    for seed in range(5):
        one, three = (jiggle(grey.expand(-1, channels, -1, -1), 0.1, generator(seed)) for channels in (1, 3))
        assert_close(three, one.expand(-1, 3, -1, -1), rtol=0, atol=1e-6)


def erased_boxes(p=1.0, height=64, width=64):
    """Top, left, height and width of the black rectangles in a white batch of 2000, each (N,)."""
    black = erase(torch.ones(2000, 1, height, width), p, AREA, ASPECT, generator())[:, 0] == 0
    black = black[black.flatten(1).any(1)]
    rows, columns = black.any(2), black.any(1)
    assert torch.equal(black, rows[:, :, None] & columns[:, None, :])
    for side in (rows.int(), columns.int()):
        assert (side.diff(dim=1).abs().sum(1) <= 2).all()  # in one piece
    return rows.int().argmax(1), columns.int().argmax(1), rows.sum(1), columns.sum(1)


def test_a_rectangle_has_area_and_aspect_in_range_and_is_as_often_tall_as_wide():
    _, _, h, w = erased_boxes()
    uncut, share, ratio = (h < 64) & (w < 64), h * w / 64**2, h / w
    assert 0.09 < share.min() < 0.11 and 0.48 < share.max() < 0.51
    assert 0.28 < ratio[uncut].min() < 0.33 and 3.0 < ratio[uncut].max() < 3.5
    assert (h == 64).any() and (w == 64).any()  # a long side is cut to the image
    small = ratio[share < 0.25]  # of these no side is cut: the aspect is uniform on either side of 1
    assert (small > 1).float().mean().item() == pytest.approx(0.5, abs=0.04)
    assert small[small > 1].mean().item() == pytest.approx((1 + 3.3) / 2, abs=0.08)
    assert small[small < 1].mean().item() == pytest.approx((0.3 + 1) / 2, abs=0.03)


def test_a_rectangle_lies_anywhere_inside_the_image():
    top, left, h, w = erased_boxes(height=24, width=40)
    assert (top.min(), left.min(), (top + h).max(), (left + w).max()) == (0, 0, 24, 40)
    assert ((top + h / 2).mean() / 24).item() == pytest.approx(0.5, abs=0.015)
    assert ((left + w / 2).mean() / 40).item() == pytest.approx(0.5, abs=0.015)


def test_a_chosen_share_of_the_images_loses_a_rectangle_and_what_is_not_erased_keeps_every_bit():
    for p in (0.0, 0.5, 1.0):
        assert len(erased_boxes(p, 8, 8)[0]) / 2000 == pytest.approx(p, abs=0.03)
    images = noise(20) + 0.1
    erased = erase(images, 0.5, AREA, ASPECT, generator())
    assert torch.equal(erased, images.where((erased != 0).all(1, keepdim=True), 0))  # all channels or none


def grey_levels(side=16):
    """One image, uint8 (3, side, side), that holds every grey level from 0 to 255 once."""
    return torch.arange(side * side, dtype=torch.uint8).view(1, side, side).expand(3, -1, -1).contiguous()


def test_auto_augment_depends_on_its_generator_alone_and_leaves_the_global_ones():
    runs = []
    for global_seed in (5, 6):
        state = torch.manual_seed(global_seed).get_state()
        runs.append([auto_augment(grey_levels(), "imagenet", generator(seed)) for seed in range(20)])
        assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, *runs)) and not torch.equal(runs[0][1], runs[0][3])


def test_images_are_inverted_as_often_as_the_published_table_says():
    # With every level once, equalising changes nothing: two of 25 pairs invert and equalise, one sharpens and inverts.
    image, draw = grey_levels(), generator()
    inverted = [bool(auto_augment(image, "imagenet", draw)[0, 0, 0] > 250) for _ in range(3000)]
    assert sum(inverted) / 3000 == pytest.approx(3 / 25 * 0.6, abs=0.015)


@pytest.mark.parametrize(("change", "settings"), [(rotate, (30, 0.5)), (jiggle, (0.1,)), (erase, (0.5, AREA, ASPECT))])
def test_a_change_depends_on_its_generator_alone_and_leaves_its_input(change, settings):
    images, state = noise(20), torch.get_rng_state()
    results = [change(images, *settings, generator(seed)) for seed in (1, 1, 2)]
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    assert torch.equal(images, noise(20)) and torch.equal(torch.get_rng_state(), state)
