"""From uint8 to what a network wants, checked against torchvision, PIL and loops over single images."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close
from torchvision import transforms as tv
from torchvision.transforms.v2 import functional as tv2

from utils.data.augment import auto_augment, erase, jiggle, rotate
from utils.data.crops import crop_and_flip, crop_boxes, random_resized_crop, shift_and_flip
from utils.data.images import ImageSet
from utils.data.transforms import (
    AUGMENTATIONS,
    Augmentation,
    ClassifierTransform,
    DiffusionTransform,
    classifier_transform,
    match_channels,
    resize_and_crop,
    stack_images,
    to_uint8,
    to_unit_range,
)

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


def generator(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise_images(count=6, channels=3, height=8, width=8, seed=0):
    return torch.randint(256, (count, channels, height, width), dtype=torch.uint8, generator=generator(seed))


def image_set(*tensors) -> ImageSet:
    return sum((ImageSet.of(tensor, torch.zeros(len(tensor)).long()) for tensor in tensors), ImageSet())


def as_pil(image) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def as_tensor(image: Image.Image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def transform(recipe="cifar", size=8, in_memory=True, mean=MEAN, std=STD) -> ClassifierTransform:
    return ClassifierTransform(AUGMENTATIONS[recipe], size, mean, std, in_memory)


def plain(steps: Augmentation, size: int) -> ClassifierTransform:
    """Without mean and deviation."""
    return ClassifierTransform(steps, size, (0.0,) * 3, (1.0,) * 3, True)


def test_all_256_grey_levels_survive_the_way_to_the_unit_range_and_back():
    levels = torch.arange(256, dtype=torch.uint8)
    unit = to_unit_range(levels)
    assert (unit.min().item(), unit.max().item()) == (-1.0, 1.0)
    assert_close(to_uint8(unit), levels, rtol=0, atol=0)


def test_to_uint8_clamps_and_rounds_to_the_nearest_level():
    values = torch.tensor([-1.5, 1.5, -1.0, 1.0, 2 * 100.4 / 255 - 1, 2 * 100.6 / 255 - 1])
    assert to_uint8(values).tolist() == [0, 255, 0, 255, 100, 101]


@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_shift_and_flip_equals_a_loop_over_single_images(padding, flip, channels):
    images = noise_images(20, channels, height=5, width=7)
    result = shift_and_flip(images, padding, flip, generator(3))
    draw, span = generator(3), 2 * padding + 1
    tops = torch.randint(span, (20, 1), generator=draw)
    lefts = torch.randint(span, (20, 1), generator=draw)
    kept = torch.rand(20, 1, generator=draw) < 0.5 if flip else torch.ones(20, 1, dtype=torch.bool)
    for image, top, left, keep, got in zip(images, tops, lefts, kept, result):
        crop = F.pad(image, (padding,) * 4)[:, int(top) : int(top) + 5, int(left) : int(left) + 7]
        assert_close(got, crop if keep else crop.flip(-1), rtol=0, atol=0)


def test_shifts_reach_every_corner_and_half_of_the_images_are_mirrored():
    image = torch.zeros(1, 1, 5, 5, dtype=torch.uint8)
    image[..., 2, 2] = 1
    spots = shift_and_flip(image.expand(4000, -1, -1, -1), 2, False, generator()).flatten(1).float().mean(0)
    assert_close(spots, torch.full((25,), 1 / 25), rtol=0, atol=0.015)
    image[..., 2, 2], image[..., 2, 0] = 0, 1
    mirrored = shift_and_flip(image.expand(4000, -1, -1, -1), 0, True, generator())[:, 0, 2, 4].float().mean().item()
    assert mirrored == pytest.approx(0.5, abs=0.03)


def test_brightness_multiplies_each_image_by_its_own_factor_in_range():
    images = torch.full((2000, 1, 2, 2), 100, dtype=torch.uint8)
    batch = plain(Augmentation(brightness=63 / 255), 2).train(images, generator())
    factors = batch[:, 0, 0, 0] * 255 / 100
    assert_close(batch, factors.view(-1, 1, 1, 1).expand_as(batch) * 100 / 255)
    assert factors.min() == pytest.approx(1 - 63 / 255, abs=0.003)
    assert factors.max() == pytest.approx(1 + 63 / 255, abs=0.003)
    assert factors.mean() == pytest.approx(1, abs=0.01)
    white = torch.full((50, 3, 2, 2), 255, dtype=torch.uint8)  # which gets no brighter
    assert plain(Augmentation(brightness=0.5), 2).train(white, generator()).max().item() == 1.0


def test_grey_batches_become_normalised_float_with_three_channels_in_channels_last_order():
    grey = noise_images(channels=1)
    training, test = transform().train(grey, generator()), transform().test(grey)
    assert_close(test, tv.Normalize(MEAN, STD)(grey.expand(-1, 3, -1, -1) / 255))
    for batch in (training, test, transform().test(noise_images())):
        assert batch.shape == (6, 3, 8, 8) and batch.dtype == torch.float32
        assert batch.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("flip", [True, False])
def test_generators_see_flips_only_where_the_data_set_has_them(flip):
    plain = to_unit_range(noise_images(16))
    batch = DiffusionTransform(8, flip).train(noise_images(16), generator())
    same, mirrored = ((batch == view).flatten(1).all(1) for view in (plain, plain.flip(-1)))
    assert torch.all(same | mirrored) and bool(mirrored.any()) is flip


def test_the_strong_augmentation_shifts_flips_turns_jiggles_and_erases_one_after_the_other():
    images, draw = noise_images(40), generator(5)
    pixels = shift_and_flip(images, 4, True, draw) / 255
    pixels = jiggle(rotate(pixels, 30, 0.5, draw), 0.1, draw)
    pixels = erase(pixels, 0.5, (0.1, 0.5), (0.3, 3.3), draw)
    strong = transform("strong", mean=(0.5,) * 3, std=(0.5,) * 3)
    assert_close(strong.train(images, generator(5)), pixels * 2 - 1)
    assert_close(strong.test(images), to_unit_range(images))


def test_auto_augment_crops_flips_brightens_and_auto_augments_in_workers_and_normalises_on_the_device():
    images, draw, expected = noise_images(20, height=60, width=50), generator(5), []
    for image in images:
        image = random_resized_crop(image, 24, (0.08, 1.0), draw)
        image = image.flip(-1) if torch.rand((), generator=draw) < 0.5 else image
        factor = torch.empty(()).uniform_(1 - 63 / 255, 1 + 63 / 255, generator=draw).item()
        expected.append(auto_augment((image * factor).clamp(0, 255).to(torch.uint8), "imagenet", draw))
    files, same = transform("auto_augment", 24, in_memory=False), generator(5)
    loaded = torch.stack([files.load_train(image, same) for image in images])
    assert_close(loaded, torch.stack(expected), rtol=0, atol=0)
    assert_close(files.train(loaded, same), tv.Normalize(MEAN, STD)(loaded / 255))
    assert torch.equal(same.get_state(), draw.get_state())  # nothing else is drawn


def test_cifar_auto_augment_shifts_flips_brightens_auto_augments_and_blackens_a_square():
    images, draw, expected = noise_images(20, height=32, width=32), generator(5), []
    for image in images:
        image = shift_and_flip(image[None], 4, False, draw)[0]
        image = image.flip(-1) if torch.rand((), generator=draw) < 0.5 else image
        factor = torch.empty(()).uniform_(1 - 63 / 255, 1 + 63 / 255, generator=draw).item()
        image = auto_augment((image * factor).clamp(0, 255).to(torch.uint8), "cifar", draw)
        y, x = (int(torch.randint(32, (), generator=draw)) for _ in range(2))
        near = torch.arange(32)
        hole = ((near >= y - 8) & (near < y + 8))[:, None] & ((near >= x - 8) & (near < x + 8))
        expected.append(image.masked_fill(hole, 0))
    shown = transform("cifar_aa", 32).train(images, generator(5))
    assert_close(shown, tv.Normalize(MEAN, STD)(torch.stack(expected) / 255))


@pytest.mark.parametrize("channels", [1, 3])
def test_auto_augment_sees_small_images_in_memory_as_it_sees_files(channels):
    images, draw = noise_images(8, channels, 8, 8), generator(3)
    small, files = transform("auto_augment", 24), transform("auto_augment", 24, in_memory=False)
    loaded = torch.stack([files.load_train(image, draw) for image in images])
    assert_close(small.train(small.keep(images, training=True), generator(3)), files.train(loaded, draw))
    assert_close(small.test(images), files.test(torch.stack([files.load_test(image) for image in images])))


def test_a_flip_before_a_rotation_is_one_after_the_opposite_rotation():
    image, bilinear = noise_images(1)[0] / 255, tv.InterpolationMode.BILINEAR
    assert_close(tv2.rotate(image.flip(-1), 20, bilinear), tv2.rotate(image, -20, bilinear).flip(-1))


def test_steps_that_are_left_out_draw_nothing():
    images, draw, same = noise_images(), generator(5), generator(5)
    pixels = shift_and_flip(images, 4, True, draw) / 255
    pixels = (pixels * torch.empty(6, 1, 1, 1).uniform_(1 - 63 / 255, 1 + 63 / 255, generator=draw)).clamp(0, 1)
    expected = tv.Normalize(MEAN, STD)(pixels)
    assert_close(transform().train(images, same), expected, rtol=0, atol=0)
    assert torch.equal(draw.get_state(), same.get_state())


def test_a_learner_may_ask_for_another_augmentation_mean_and_deviation_than_the_data_set():
    images = noise_images()
    for name, mean, std in (("cifar", MEAN, STD), ("strong", (0.5,) * 3, (0.5,) * 3)):
        dataset = SimpleNamespace(augmentation=name, image_size=8, mean=mean, std=std, in_memory=True)
        view = classifier_transform(dataset)
        assert view.augmentation == AUGMENTATIONS[name]
        assert_close(view.test(images), tv.Normalize(mean, std)(images / 255))


@pytest.mark.parametrize(("height", "width"), [(300, 400), (400, 300), (64, 64), (8, 90)])
def test_a_resized_crop_has_the_asked_size_whatever_the_image(height, width):
    image = noise_images(1, 3, height, width)[0]
    crops = [random_resized_crop(image, 32, (0.08, 1.0), generator(seed)) for seed in range(5)]
    assert all(crop.shape == (3, 32, 32) and crop.dtype == torch.uint8 for crop in crops)


def test_a_resized_crop_keeps_area_and_aspect_in_range_and_lies_anywhere():
    top, left, h, w = crop_boxes(4000, 100, 120, (0.2, 0.6), generator())
    areas, ratios = h * w / 12000, w / h
    assert 0.19 < areas.min() < 0.22 and 0.57 < areas.max() < 0.61
    assert 0.73 < ratios.min() < 0.77 and 1.3 < ratios.max() < 1.36
    assert areas.mean().item() == pytest.approx(0.4, abs=0.01)
    assert ratios.log().mean().item() == pytest.approx(0, abs=0.01)  # 3/4 is as likely as 4/3
    assert (top.min(), left.min(), (top + h).max(), (left + w).max()) == (0, 0, 100, 120)
    assert ((top + h / 2).mean() / 100).item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (20, 32), (7, 9)])
@pytest.mark.parametrize("size", [32, 224])
def test_a_batch_is_cropped_as_torchvision_crops_its_images_one_by_one(height, width, size):
    images = noise_images(12, 3, height, width)
    top, left, h, w = crop_boxes(12, height, width, (0.05, 1.0), generator(4))
    crops = crop_and_flip(images.float(), size, (0.05, 1.0), False, generator(4))
    expected = [
        tv2.resized_crop(image, *box, [size, size], antialias=True)
        for image, *box in zip(images, *(numbers.tolist() for numbers in (top, left, h, w)))
    ]
    assert_close(crops, torch.stack(expected).float(), rtol=0, atol=1)
    assert crops.is_contiguous(memory_format=torch.channels_last)


def test_half_of_the_cropped_images_are_mirrored_and_the_rest_are_not():
    images = noise_images(1, 3, 16, 16).float().expand(400, -1, -1, -1)
    crops = crop_and_flip(images, 16, (1.0, 1.0), True, generator())  # of a square only the whole has its full area
    mirrored = (crops == images.flip(-1)).flatten(1).all(1)
    assert_close(crops[~mirrored], images[~mirrored], rtol=0, atol=0)
    assert mirrored.float().mean().item() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("recipe", ["vit_crop", "imagenet_jitter"])
def test_a_cropped_training_batch_stays_in_range_and_is_normalised(recipe):
    images = noise_images(6)
    batch = plain(AUGMENTATIONS[recipe], 32).train(images, generator(2))
    assert batch.shape == (6, 3, 32, 32) and batch.min() >= 0 and batch.max() <= 1
    assert_close(transform(recipe, 32).train(images, generator(2)), tv.Normalize(MEAN, STD)(batch))


@pytest.mark.parametrize(("height", "width"), [(10, 1000), (1000, 10), (40, 161), (161, 40), (90, 100), (1, 1)])
def test_an_image_too_long_for_any_crop_is_cut_as_torchvision_cuts_it(height, width):
    # An area of more than the image, so that none of the ten draws fits.
    expected = tv.RandomResizedCrop.get_params(torch.zeros(1, height, width), [50.0, 60.0], [3 / 4, 4 / 3])
    assert [int(number) for number in crop_boxes(1, height, width, (50.0, 60.0), generator())] == list(expected)


SIDES = [(300, 400), (500, 333), (256, 256), (100, 120), (32, 32), (24, 32)]  # small images are enlarged


@pytest.mark.parametrize(("height", "width"), SIDES)
def test_the_test_view_is_torchvisions_resize_and_centre_crop_of_a_pil_image(height, width):
    image = noise_images(1, 3, height, width)
    for resize, recipe in (("bilinear", "imagenet"), ("bicubic", "vit_crop")):
        view = tv.Compose([tv.Resize(256, tv.InterpolationMode(resize)), tv.CenterCrop(224)])
        shown = resize_and_crop(image, 224, resize)
        assert_close(shown[0], as_tensor(view(as_pil(image[0]))), rtol=0, atol=1)
        assert_close(plain(AUGMENTATIONS[recipe], 224).test(image) * 255, shown.float())


@pytest.mark.parametrize(("mode", "filtering"), [("bicubic", Image.BICUBIC), ("bilinear", Image.BILINEAR)])
def test_replay_is_resized_with_antialiasing_as_pil_does(mode, filtering):
    pixels = noise_images(1, 3, 64, 64)
    expected = as_tensor(as_pil(pixels[0]).resize((16, 16), filtering))
    assert_close(stack_images(image_set(pixels), 16, mode)[0], expected, rtol=0, atol=1)


def test_stack_resizes_other_sizes_repeats_grey_and_leaves_the_rest_alone():
    small, colour, grey = noise_images(2), noise_images(1, 3, 16, 16), noise_images(3, 1)
    stacked = stack_images(image_set(small, colour, grey), 8)
    assert stacked.shape == (6, 3, 8, 8) and stacked.dtype == torch.uint8
    assert_close(stacked[:2], small, rtol=0, atol=0)
    assert_close(stacked[3:], torch.cat([grey] * 3, 1), rtol=0, atol=0)
    # One channel stays where all images are grey.
    assert stack_images(image_set(grey, noise_images(2, 1, 4, 4)), 8, "nearest").shape == (5, 1, 8, 8)
    assert match_channels(grey, 1) is grey


@pytest.mark.parametrize(
    ("recipe", "side", "training", "kept"),
    [
        ("cifar", 8, True, 8),
        ("cifar", 4, True, 32),  # without a crop, other sizes are brought to the network's
        ("vit_crop", 8, True, 8),  # with one, small images are enlarged per batch
        ("vit_crop", 8, False, 8),
        ("vit_crop", 40, True, 32),
        ("vit_crop", 40, False, 32),
    ],
)
def test_images_are_kept_small_where_every_batch_is_cropped_anew(recipe, side, training, kept):
    size = 8 if (recipe, side) == ("cifar", 8) else 32
    images = noise_images(2, 3, side, side)
    pixels = transform(recipe, size).keep(images, training)
    assert pixels.shape == (2, 3, kept, kept)
    if side > size and not training:  # large images beside small ones are tested by their middle
        assert_close(pixels, resize_and_crop(images, size, "bicubic"), rtol=0, atol=0)


def test_workers_turn_large_grey_images_into_three_channels_of_the_networks_size():
    image = noise_images(1, 1, 50, 40)[0]
    for large in (transform(recipe, 24, in_memory=False) for recipe in ("none", "imagenet")):
        assert large.load_train(image, generator()).shape == large.load_test(image).shape == (3, 24, 24)
