"""Samples that are shown as generated copies of themselves, in every epoch another one."""

from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from synth.escort.batches import CopiedBatches
from utils.data.batches import Loading
from utils.data.images import ImageSet
from utils.data.transforms import AUGMENTATIONS, ClassifierTransform


def level(labels, copies, **columns) -> ImageSet:
    """Images whose grey level says whose copy they are and which one; real ones are their own copy 9."""
    levels = (10 * labels + copies).to(torch.uint8)
    return ImageSet.of(levels.view(-1, 1, 1, 1).repeat(1, 3, 8, 8), labels, **columns)


class Painter:
    """Paints two copies of each of eight samples, whose maps are called as their labels."""

    source = SimpleNamespace(read=lambda images: images.labels, ask=lambda *asked: asked)

    def __init__(self, chance):
        self.config = SimpleNamespace(augmentation_prob=chance, augmentations_per_image=2, prepare="needed")
        self.drawn = []

    def copies(self, asked):
        labels, items, numbers = asked
        self.drawn += zip(items.tolist(), numbers.tolist())
        return level(labels, numbers)


def copied(chance, in_memory=True) -> tuple[CopiedBatches, Painter]:
    """Batches of six real images and of two samples that have none."""
    transform = ClassifierTransform(AUGMENTATIONS["none"], 8, (0.5,) * 3, (0.5,) * 3, in_memory)
    painter, labels, loading = Painter(chance), torch.arange(8), Loading(transform, 3, (0,), torch.device("cpu"))
    return CopiedBatches(level(labels[:6], 9), level(labels[6:], 0, items=labels[6:]), painter, loading), painter


def shown(batches, epoch) -> dict[int, int]:
    """Which copy of each sample an epoch shows."""
    found = {}
    for batch in batches.epoch(epoch):
        levels = ((batch.images[:, 0, 0, 0] + 1) * 127.5).round().long()
        assert_close(levels // 10, batch.labels)  # a copy keeps its sample's label
        found |= dict(zip(batch.labels.tolist(), (levels % 10).tolist()))
    return found


@pytest.mark.parametrize(("chance", "allowed"), [(0.0, {9}), (0.5, {0, 1, 9}), (1.0, {0, 1})])
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_sample_is_shown_as_a_copy_by_its_chance(in_memory, chance, allowed):
    batches, _ = copied(chance, in_memory)
    epochs = [shown(batches, epoch) for epoch in range(8)]
    assert {copy for epoch in epochs for sample, copy in epoch.items() if sample < 6} == allowed
    assert {copy for epoch in epochs for sample, copy in epoch.items() if sample >= 6} == {0, 1}


def test_copies_are_drawn_once_and_those_that_are_there_never():
    batches, painter = copied(1.0)
    for epoch in range(12):
        shown(batches, epoch)
    assert sorted(painter.drawn) == [(s, k) for s in range(8) for k in range(2) if (s, k) not in {(6, 0), (7, 0)}]


def test_copies_depend_on_the_epoch_alone():
    (late, _), (early, _) = copied(0.5), copied(0.5)
    assert shown(late, 5) == [shown(early, epoch) for epoch in range(6)][5]
