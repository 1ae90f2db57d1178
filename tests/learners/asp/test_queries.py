"""Queries of un-augmented images are computed once, in batches that do not depend on what was asked before."""

import torch
from torch.testing import assert_close

from learners.asp.queries import QueryCache
from utils.data.images import ImageSet


def pixels(*shape, seed=0):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def images_of(labels, seed=0) -> ImageSet:
    return ImageSet.of(pixels(len(labels), 1, 4, 4, seed=seed), torch.tensor(labels))


class Counter:
    """Answers with sums over an image's pixels and remembers what it was asked for."""

    def __init__(self):
        self.asked: list[list[int]] = []

    def __call__(self, images: ImageSet) -> torch.Tensor:
        self.asked.append(images.labels.tolist())
        return torch.cat([part.images.flatten(1).float().sum(1, keepdim=True) for part in images.parts])


def test_rows_come_in_the_order_of_the_images():
    images = images_of([2, 0, 1, 0, 2])
    expected = images.parts[0].images.flatten(1).float().sum(1, keepdim=True)
    assert_close(QueryCache().get(images, Counter()), expected)


def test_an_image_is_computed_once_whoever_asks_again():
    cache, compute, images = QueryCache(), Counter(), images_of([0, 1, 0])
    rows = cache.get(images, compute)
    assert_close(cache.get(images.take([2, 0]), compute), rows[[2, 0]])
    assert sum(map(len, compute.asked)) == 3


def test_only_what_is_missing_is_computed():
    cache, compute, old, new = QueryCache(), Counter(), images_of([0, 1]), images_of([2, 3], seed=1)
    cache.get(old, compute)
    compute.asked.clear()
    cache.get(old + new, compute)
    assert compute.asked == [[2], [3]]


def test_images_are_computed_class_by_class_whatever_was_asked_for_before():
    images, at_once, in_steps = images_of([1, 0, 1, 0]), Counter(), Counter()
    QueryCache().get(images, at_once)
    cache = QueryCache()
    cache.get(images.select([1]), in_steps), cache.get(images, in_steps)
    assert sorted(at_once.asked) == sorted(in_steps.asked) == [[0, 0], [1, 1]]


def test_the_same_bytes_in_another_shape_are_another_image():
    wide = pixels(1, 1, 2, 8)
    both = ImageSet.of(wide, torch.tensor([0])) + ImageSet.of(wide.view(1, 1, 8, 2), torch.tensor([0]))
    cache = QueryCache()
    cache.get(both, Counter())
    assert len(cache.rows) == 2


def test_files_are_known_by_their_paths():
    cache, asked = QueryCache(), []
    files = ImageSet.of(["a.png", "b.png", "a.png"], torch.tensor([0, 0, 0]))
    cache.get(files, lambda images: asked.extend(images.parts[0].images) or torch.arange(3.0).view(3, 1))
    assert set(cache.rows) == {"a.png", "b.png"}
