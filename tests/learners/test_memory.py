"""Exemplars: PyCIL's herding and budgets, Vitter's reservoir, and what a checkpoint holds of them."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from learners.memory import ExemplarMemory, class_mean, herding, reservoir_slots
from utils.data.images import ImageSet
from utils.run.files import load_tensors, save_tensors
from utils.training import seeding


def numbered(count, label, start=0) -> ImageSet:
    """Images of one class whose pixels are their rank."""
    pixels = torch.arange(start, start + count, dtype=torch.uint8).view(-1, 1, 1, 1)
    return ImageSet.of(pixels, torch.full((count,), label))


def ranks(images: ImageSet, label: int) -> list[int]:
    own = images.select([label])
    return [int(own.image(position)) for position in range(len(own))]


# ---------------------------------------------------------------------- herding and means


@pytest.mark.parametrize(
    ("features", "picks"),
    [
        (np.random.RandomState(0).randn(30, 4), [2, 15, 3, 12, 7, 18, 22, 4, 10, 24]),  # PyCIL's card, 11.3
        (np.random.RandomState(1).rand(12, 3), [3, 11, 2, 5, 4, 6]),  # ESCORT's card, check 5
    ],
)
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


@pytest.mark.parametrize(
    ("num_images", "wanted", "picks"),
    [(3, 5, [0, 1, 2]), (3, 0, []), (0, 2, [])],  # PyCIL crashes where a class has too few
)
def test_herding_takes_no_more_than_there_are_and_the_first_wins_a_tie(num_images, wanted, picks):
    assert herding(torch.ones(num_images, 4), wanted) == picks


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_only_the_direction_of_a_feature_counts(scale):
    features = torch.rand(15, 6, generator=seeding.generator("direction"))
    stretch = torch.linspace(0.5, 2, 15)[:, None] * scale
    assert herding(features * stretch, 6) == herding(features, 6)
    assert_close(class_mean(features * stretch), class_mean(features), rtol=0, atol=1e-4)


def test_features_of_zeros_give_numbers():
    assert class_mean(torch.zeros(3, 4)).isfinite().all()
    assert herding(torch.zeros(3, 4), 2) == [0, 1]


# ---------------------------------------------------------------------- budgets


def test_a_fixed_total_of_2000_is_shared_as_pycil_shares_it():
    memory = ExemplarMemory(2000, 20, fixed=False)
    budgets = [memory.budget(num_seen) for num_seen in range(10, 101, 10)]
    assert budgets == [200, 100, 66, 50, 40, 33, 28, 25, 22, 20]


@pytest.mark.parametrize(("num_seen", "stored"), [(30, 1980), (70, 1960)])
def test_images_stored_at_a_total_of_2000(num_seen, stored):
    memory = ExemplarMemory(2000, 20, fixed=False)
    for seen in range(10, num_seen + 1, 10):
        memory.trim(memory.budget(seen))
        for label in range(seen - 10, seen):
            memory.add(numbered(memory.budget(seen), label))
    assert len(memory.images) == stored
    assert set(memory.images.counts(num_seen).tolist()) == {stored // num_seen}


def test_a_fixed_number_per_class_lets_the_total_grow():
    memory = ExemplarMemory(2000, 20, fixed=True)
    assert [memory.budget(num_seen) for num_seen in (10, 50, 100)] == [20, 20, 20]


def test_trimming_keeps_the_first_of_every_class():
    memory = ExemplarMemory(12, 0, fixed=False)
    memory.add(numbered(6, 0) + numbered(2, 1, start=50))
    memory.add(numbered(5, 2, start=100))
    memory.trim(3)
    assert [ranks(memory.images, label) for label in range(3)] == [[0, 1, 2], [50, 51], [100, 101, 102]]


@pytest.mark.parametrize("budget", [0, 1])
def test_an_empty_memory_can_be_trimmed(budget):
    memory = ExemplarMemory(0, 0, fixed=False)
    memory.trim(budget)
    assert len(memory.images) == 0


def test_a_budget_of_nothing_forgets_everything():
    memory = ExemplarMemory(5, 0, fixed=False)
    memory.add(numbered(3, 0))
    memory.trim(memory.budget(10))
    assert len(memory.images) == 0


# ---------------------------------------------------------------------- reservoir


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
    slots = reservoir_slots(0, 50, 4, seeding.generator("fill"))
    assert slots[:4] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert {slot for _, slot in slots} <= {0, 1, 2, 3}
    assert reservoir_slots(0, 3, 0, seeding.generator("nothing")) == []


# ---------------------------------------------------------------------- keeping


def test_exemplars_of_tensors_and_files_come_back(tmp_path):
    memory, again = ExemplarMemory(10, 2, fixed=True), ExemplarMemory(10, 2, fixed=True)
    memory.add(numbered(2, 0))
    memory.add(ImageSet.of(["a.png", "b.png", "c.png"], torch.tensor([1, 1, 2])))
    memory.add(numbered(1, 3, start=9))
    tensors, layout = memory.state("data")
    save_tensors(tmp_path / "exemplars.safetensors", tensors)
    again.load(load_tensors(tmp_path / "exemplars.safetensors"), layout, "data")
    assert again.images.labels.tolist() == [0, 0, 1, 1, 2, 3]
    assert again.images.parts[1].images == ("a.png", "b.png", "c.png")
    assert (ranks(again.images, 0), ranks(again.images, 3)) == ([0, 1], [9])


def test_an_empty_memory_comes_back_empty(tmp_path):
    memory = ExemplarMemory(10, 2, fixed=True)
    tensors, layout = memory.state("data")
    save_tensors(tmp_path / "exemplars.safetensors", tensors)
    memory.load(load_tensors(tmp_path / "exemplars.safetensors"), layout, "data")
    assert len(memory.images) == 0


def test_dropping_takes_the_last_of_a_class_and_tells_the_bytes_of_pixels_and_label():
    memory = ExemplarMemory(size=9, per_class=3, fixed=False)
    memory.add(numbered(3, label=0) + numbered(3, label=1, start=10))
    assert memory.drop_last(0) == 1 + 8
    assert memory.counts() == {0: 2, 1: 3} and ranks(memory.images, 0) == [0, 1]
