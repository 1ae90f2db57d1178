"""Exemplars: PyCIL's herding and budgets, Vitter's reservoir, and what a checkpoint holds of them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from learners.memory import ExemplarMemory, class_mean, herding, keep_exemplars, reservoir_slots
from utils.data.images import ImageSet
from utils.data.manager import Task
from utils.run.files import load_tensors, save_tensors
from utils.training import seeding


def numbered(count, label, start=0) -> ImageSet:
    """Images of one class whose pixels are their rank."""
    pixels = torch.arange(start, start + count, dtype=torch.uint8).view(-1, 1, 1, 1)
    return ImageSet.of(pixels, torch.full((count,), label))


def ranks(images: ImageSet, label: int) -> list[int]:
    own = images.select([label])
    return [int(own.image(position)) for position in range(len(own))]


@pytest.mark.parametrize(("features", "picks"), [
    (np.random.RandomState(0).randn(30, 4), [2, 15, 3, 12, 7, 18, 22, 4, 10, 24]),  # PyCIL's card, 11.3
    (np.random.RandomState(1).rand(12, 3), [3, 11, 2, 5, 4, 6]),  # ESCORT's card, check 5
])  # fmt: skip
def test_herding_picks_the_images_of_the_cards(features, picks):
    assert herding(torch.from_numpy(features), len(picks)) == picks
    assert herding(torch.from_numpy(features).float(), len(picks)) == picks


def test_the_class_mean_of_the_cards_picks_has_the_cards_numbers():
    features = torch.from_numpy(np.random.RandomState(0).randn(30, 4))
    unit = features / (features.norm(dim=1, keepdim=True) + 1e-8)
    expected = torch.tensor([0.054515, 0.072368, -0.027857, 0.118272], dtype=torch.float64)
    assert_close(unit.mean(0), expected, rtol=0, atol=1e-6)
    assert_close(class_mean(features), expected / expected.norm(), rtol=0, atol=1e-5)
    chosen = class_mean(features[herding(features, 10)])
    assert_close(chosen, chosen.new_tensor([0.415893, 0.516278, -0.251848, 0.705026]), rtol=0, atol=1e-6)


def test_fewer_picks_are_a_prefix_of_more():
    features = torch.randn(20, 5, generator=seeding.generator("prefix"))
    assert herding(features, 7) == herding(features, 20)[:7]
    assert sorted(herding(features, 20)) == list(range(20))


@pytest.mark.parametrize(("features", "wanted", "picks"), [
    (torch.ones(3, 4), 5, [0, 1, 2]),  # PyCIL crashes where a class has too few
    (torch.ones(3, 4), 0, []),
    (torch.ones(0, 4), 2, []),
    (torch.zeros(3, 4), 2, [0, 1]),
])  # fmt: skip
def test_herding_takes_no_more_than_there_are_and_the_first_wins_a_tie(features, wanted, picks):
    assert herding(features, wanted) == picks
    assert len(features) == 0 or class_mean(features).isfinite().all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_only_the_direction_of_a_feature_counts(scale):
    features = torch.rand(15, 6, generator=seeding.generator("direction"))
    stretch = torch.linspace(0.5, 2, 15)[:, None] * scale
    assert herding(features * stretch, 6) == herding(features, 6)
    assert_close(class_mean(features * stretch), class_mean(features), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("fixed", "budgets"), [
    (False, [200, 100, 66, 50, 40, 33, 28, 25, 22, 20]),  # PyCIL shares a total of 2000 over the seen classes
    (True, [20] * 10),  # a fixed number per class lets the total grow
])  # fmt: skip
def test_budgets_are_those_of_pycil(fixed, budgets):
    memory = ExemplarMemory(2000, 20, fixed)
    assert [memory.budget(num_seen) for num_seen in range(10, 101, 10)] == budgets


@pytest.mark.parametrize(("size", "tasks", "kept"), [
    (2000, [[200] * 10] * 3, [66] * 30),  # 1980 in all
    (2000, [[200] * 10] * 7, [28] * 70),  # 1960
    (9, [[6, 2], [5]], [3, 2, 3]),  # a class that has fewer keeps all
    (5, [[3], [3] * 9], [0] * 10),  # a budget of nothing forgets everything
    (0, [[3]], [0]),
])  # fmt: skip
def test_the_best_of_every_class_are_kept_within_its_share(size, tasks, kept):
    memory, seen = ExemplarMemory(size, 20, fixed=False), 0
    for index, counts in enumerate(tasks):
        present = sum((numbered(count, label) for label, count in enumerate(counts, seen)), ImageSet())
        choices = {label: list(range(count)) for label, count in enumerate(counts, seen)}  # in their order
        task = Task(index, range(seen, seen + len(counts)), ())
        keep_exemplars(SimpleNamespace(memory=memory, present=present, choices=choices), task)
        seen += len(counts)
    assert [ranks(memory.images, label) for label in range(seen)] == [list(range(count)) for count in kept]


@pytest.mark.parametrize("pieces", [[20], [1] * 20, [3, 12, 5]])
def test_a_reservoir_keeps_every_image_seen_equally_often(pieces):
    kept = torch.zeros(20)
    for trial in range(1500):
        slots, seen, generator = {}, 0, seeding.generator("reservoir", trial)
        for piece in pieces:
            for item, slot in reservoir_slots(seen, piece, 5, generator):
                slots[slot] = seen + item
            seen += piece
        kept[list(slots.values())] += 1
    assert_close(kept / 1500, torch.full((20,), 5 / 20), rtol=0, atol=0.045)  # four standard deviations


def test_a_reservoir_fills_its_slots_first_and_never_leaves_them():
    slots = list(reservoir_slots(0, 50, 4, seeding.generator("fill")))
    assert slots[:4] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert {slot for _, slot in slots} <= {0, 1, 2, 3}
    assert list(reservoir_slots(0, 3, 0, seeding.generator("nothing"))) == []


@pytest.mark.parametrize("empty", [False, True])
def test_exemplars_of_tensors_and_files_come_back(empty, tmp_path):
    memory, again = ExemplarMemory(10, 2, fixed=True), ExemplarMemory(10, 2, fixed=True)
    if not empty:
        files = ImageSet.of(["a.png", "b.png", "c.png"], torch.tensor([1, 1, 2]))
        memory.images = numbered(2, 0) + files + numbered(1, 3, start=9)
    tensors, layout = memory.state("data")
    save_tensors(tmp_path / "exemplars.safetensors", tensors)
    again.load(load_tensors(tmp_path / "exemplars.safetensors"), layout, "data")
    assert again.images.labels.tolist() == memory.images.labels.tolist()
    assert [part.images for part in again.images.parts[1:2]] == [part.images for part in memory.images.parts[1:2]]
    assert (ranks(again.images, 0), ranks(again.images, 3)) == (([], []) if empty else ([0, 1], [9]))


def test_dropping_takes_the_last_of_a_class_and_tells_the_bytes_of_pixels_and_label():
    memory = ExemplarMemory(size=9, per_class=3, fixed=False)
    memory.images = numbered(3, label=0) + numbered(3, label=1, start=10)
    assert memory.drop_last(0) == 1 + 8
    assert memory.counts() == {0: 2, 1: 3} and ranks(memory.images, 0) == [0, 1]
