"""Random numbers by name."""

import torch
from torch.testing import assert_close

from utils.training import seeding

TRAIN = (1993, 0, "train")
KEYS = [(), (0,), (-1,), TRAIN, (1993, 1, "train"), (*TRAIN, 0), ("1993", 0, "train"), ("a", "b"), ("ab",)]


def test_every_part_of_a_key_counts_and_gives_numbers_that_torch_and_numpy_take():
    seeds = {seeding.derive(*key) for key in KEYS}
    assert len(seeds) == len(KEYS) and all(0 <= seed < 2**63 for seed in seeds)


def test_a_key_means_the_same_in_every_process_and_every_version():
    # Another value would change every result that anyone has published with this program.
    assert seeding.derive(*TRAIN) == 5_418_343_016_127_121_186


def test_a_generator_gives_its_numbers_whatever_was_drawn_before_and_moves_no_global_one():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = torch.randn(5, generator=seeding.generator(1, "noise"))
    assert_close(torch.rand(3), expected, rtol=0, atol=0)
    assert_close(torch.randn(5, generator=seeding.generator(1, "noise")), first, rtol=0, atol=0)
    assert not torch.equal(torch.randn(5, generator=seeding.generator(1, "other")), first)


def test_numpys_generator_and_torchs_global_one_have_keys_too():
    draws = [seeding.numpy_generator(key).random(3).tolist() for key in (1, 1, 2)]
    draws += [seeding.seed_everything("step", key) or torch.rand(4).tolist() for key in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2] and draws[3] == draws[4] != draws[5]


def test_a_hash_of_tensors_changes_with_names_and_values_and_not_with_memory_order():
    weight, count, images = torch.tensor([1.0, 2.0, 3.0]), torch.tensor(4), torch.rand(2, 3, 4, 4)
    whole = seeding.hash_tensors({"weight": weight, "count": count, "images": images})
    strided = images.to(memory_format=torch.channels_last)
    assert whole == seeding.hash_tensors({"weight": weight.clone().requires_grad_(), "count": count, "images": strided})
    assert whole != seeding.hash_tensors({"weight": weight + 0.5, "count": count, "images": images})
    assert whole != seeding.hash_tensors({"heavy": weight, "count": count, "images": images})
    assert whole != seeding.hash_tensors({"weight": weight, "count": count})
