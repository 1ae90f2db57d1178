"""Random numbers by name."""

import pytest
import torch
from torch.testing import assert_close

from utils.training import seeding

TRAIN = (1993, 0, "train")
KEYS = [(), (0,), (-1,), TRAIN, (1993, 1, "train"), (*TRAIN, 0), ("1993", 0, "train"), ("a", "b"), ("ab",)]


def test_every_part_of_a_key_counts():
    assert len({seeding.derive(*key) for key in KEYS}) == len(KEYS)


def test_seeds_are_numbers_that_torch_and_numpy_take():
    assert all(0 <= seeding.derive(*key) < 2**63 for key in KEYS)


def test_a_key_means_the_same_in_every_process_and_every_version():
    # Another value would change every result that anyone has published with this program.
    assert seeding.derive(*TRAIN) == 5_418_343_016_127_121_186


def test_a_generator_gives_its_numbers_whatever_was_drawn_before():
    first = torch.randn(5, generator=seeding.generator(1, "noise"))
    torch.randn(100)
    assert_close(torch.randn(5, generator=seeding.generator(1, "noise")), first, rtol=0, atol=0)
    assert not torch.equal(torch.randn(5, generator=seeding.generator(1, "other")), first)


def test_numpys_generator_has_keys_too():
    draws = [seeding.numpy_generator(key).random(3).tolist() for key in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_drawing_from_a_keyed_generator_moves_no_global_one():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    torch.rand(9, generator=seeding.generator("aside"))
    assert_close(torch.rand(3), expected, rtol=0, atol=0)


def test_seeding_everything_reseeds_the_global_generator():
    draws = []
    for _ in range(2):
        seeding.seed_everything(7, "step", 3)
        draws.append(torch.rand(4))
    assert_close(draws[0], draws[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    "other",
    [
        {"weight": torch.tensor([1.0, 2.0, 3.5]), "count": torch.tensor(4)},  # a value
        {"heavy": torch.tensor([1.0, 2.0, 3.0]), "count": torch.tensor(4)},  # a name
        {"weight": torch.tensor([1.0, 2.0, 3.0])},  # one less
    ],
)
def test_a_hash_of_tensors_changes_with_names_and_values(other):
    tensors = {"weight": torch.tensor([1.0, 2.0, 3.0]), "count": torch.tensor(4)}
    same = {name: value.clone().requires_grad_(value.is_floating_point()) for name, value in tensors.items()}
    assert seeding.hash_tensors(same) == seeding.hash_tensors(tensors) != seeding.hash_tensors(other)


def test_memory_order_is_no_part_of_a_hash():
    images = torch.rand(2, 3, 4, 4)
    strided = {"x": images.to(memory_format=torch.channels_last)}
    assert seeding.hash_tensors(strided) == seeding.hash_tensors({"x": images})
