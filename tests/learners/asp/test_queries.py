"""Queries of un-augmented images are computed once, in batches that do not depend on what was asked before."""

import pytest
import torch
from torch.testing import assert_close

from learners.asp.queries import remembered
from utils.data.images import ImageSet

PIXELS = torch.randint(256, (5, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
IMAGES = ImageSet.of(PIXELS, torch.tensor([2, 0, 1, 0, 2]))
WIDE_AND_TALL = ImageSet.of(PIXELS[:1].view(1, 1, 2, 8), torch.tensor([0])) + IMAGES.take([0])


class Counter:
    """Answers with sums over an image's pixels and remembers what it was asked for."""

    def __init__(self):
        self.asked: list[list[int]] = []

    def __call__(self, images: ImageSet) -> torch.Tensor:
        self.asked.append(images.labels.tolist())
        return torch.cat([part.images.flatten(1).float().sum(1, keepdim=True) for part in images.parts])


@pytest.mark.parametrize("asked_before", [[], [2], [0, 1], [4, 3, 2, 1, 0]])
def test_an_image_is_computed_once_and_with_its_class_whatever_was_asked_for_before(asked_before):
    rows, compute = {}, Counter()
    if asked_before:
        remembered(rows, IMAGES.select(IMAGES.labels[asked_before].tolist()), compute)
    assert_close(remembered(rows, IMAGES, compute), PIXELS.flatten(1).float().sum(1, keepdim=True))
    assert sorted(compute.asked) == [[0, 0], [1], [2, 2]]


def test_only_what_is_missing_is_computed():
    rows, compute = {}, Counter()
    remembered(rows, IMAGES.take([1, 2]), compute)
    remembered(rows, IMAGES, compute)
    assert compute.asked == [[0], [1], [0], [2, 2]]


def test_the_same_bytes_in_another_shape_are_another_image():
    rows = {}
    remembered(rows, WIDE_AND_TALL, Counter())
    assert len(rows) == 2


def test_files_are_known_by_their_paths():
    rows, asked = {}, []
    files = ImageSet.of(["a.png", "b.png", "a.png"], torch.tensor([0, 0, 0]))
    remembered(rows, files, lambda images: asked.extend(images.parts[0].images) or torch.arange(3.0).view(3, 1))
    assert set(rows) == {"a.png", "b.png"}
