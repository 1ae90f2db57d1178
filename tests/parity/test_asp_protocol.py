"""ASP's data protocol: checks 19, 22 and 24 of its card; 23 stands with the other metrics."""

import random

import pytest
import torch

from models.heads import CosineHead
from utils.data.datasets import DATASETS, Dataset
from utils.data.images import ImageSet
from utils.data.manager import DataManager, Split
from utils.data.transforms import classifier_transform

CIFAR = {"num_classes": 100, "per_class": 500, "tests": 100, "init_cls": 60, "increment": 5}
PHOTOGRAPHS = {"num_classes": 200, "per_class": 30, "tests": 30, "init_cls": 100, "increment": 10}  # CUB, ImageNet-R
# Positions within the class that the second draw of seed 2024 takes from CIFAR-100.
EFFECTIVE = {
    60: [385, 341, 206, 488, 21], 61: [96, 342, 15, 94, 58], 64: [135, 73, 239, 154, 482],
    65: [119, 25, 1, 57, 54], 99: [210, 359, 421, 35, 383],
}  # fmt: skip


def images_of(num_classes, per_class):
    """Images whose two pixels tell their position within the class."""
    position = torch.arange(per_class).repeat(num_classes)
    pixels = torch.stack([position // 256, position % 256], 1).to(torch.uint8).view(-1, 1, 1, 2)
    return ImageSet.of(pixels, torch.arange(num_classes).repeat_interleave(per_class))


def data_of(num_classes, per_class, tests, init_cls, increment):
    recipe, names = DATASETS["cifar224"], [f"{i}" for i in range(num_classes)]
    dataset = Dataset(
        "fake", images_of(num_classes, per_class), images_of(num_classes, tests), names, recipe.image_size, 1, True,
        recipe.mean, recipe.std, recipe.augmentation, "made for tests",
    )  # fmt: skip
    keys = {"shuffle": False, "order_seed": 2024, "kshot": 5, "few_shot_draw": "reference"}
    return DataManager(dataset, Split(init_cls, increment, **keys))


@pytest.fixture(scope="module")
def cifar():
    return data_of(**CIFAR)


def positions(images):
    pixels = images.parts[0].images.long().flatten(1)
    return (pixels[:, 0] * 256 + pixels[:, 1]).tolist()


def test_check_19_the_shots_of_seed_2024_are_those_of_the_table_whatever_was_drawn_before(cifar):
    assert {label: cifar.few_shot_indices[label] for label in EFFECTIVE} == EFFECTIVE
    for task in cifar.tasks():
        random.seed(task.index), torch.manual_seed(task.index)
        images = cifar.train_images(task)
        for label in EFFECTIVE.keys() & set(task.classes):
            assert positions(images.select([label])) == EFFECTIVE[label]


@pytest.mark.parametrize(("protocol", "sessions", "shots"), [(CIFAR, 9, 25), (PHOTOGRAPHS, 11, 50)])
def test_check_22_sessions_and_few_shot_sets_have_their_sizes(protocol, sessions, shots):
    data = data_of(**protocol)
    sizes = [len(data.train_images(task)) for task in data.tasks()]
    assert sizes == [protocol["init_cls"] * protocol["per_class"]] + [shots] * (sessions - 1)


def test_check_22_heads_and_test_sets_grow_by_five_classes_and_500_images(cifar):
    head, heads, tests = CosineHead(4), [], []
    for task in cifar.tasks():
        head.grow(task.num_seen)
        heads.append(len(head.weight))
        tests.append(len(cifar.test_images(range(task.num_seen))))
    assert heads == list(range(60, 101, 5))
    assert tests == list(range(6000, 10_001, 500))


def test_check_24_a_test_view_of_cifar_has_224_pixels_in_0_to_1_without_normalisation(cifar):
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[..., ::2] = images[..., ::2] // 200 * 255  # hard edges, over which a bicubic shoots
    view = classifier_transform(cifar.dataset).test(images)
    assert view.shape == (2, 3, 224, 224)
    assert view.min() == 0 and view.max() == 1
