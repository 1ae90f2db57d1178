"""Orders, sizes and draws; the references' own numbers are in tests/parity/test_splits.py."""

import pytest
import torch

from utils.data import subsets
from utils.run.errors import ConfigError

LABELS = torch.arange(4).repeat_interleave(10)


def test_without_shuffle_classes_come_by_id():
    assert subsets.class_order(4, shuffle=False, seed=7) == [0, 1, 2, 3]


def test_classes_come_one_at_a_time_or_the_rest_at_once_or_in_a_short_last_task():
    assert subsets.task_sizes(10, init_cls=1, increment=1) == [1] * 10
    assert subsets.task_sizes(10, init_cls=4, increment=20) == [4, 6]
    assert subsets.task_sizes(10, init_cls=5, increment=2) == [5, 2, 2, 1]


def test_a_step_tail_cuts_the_second_half_of_the_classes_and_one_class_is_not_cut():
    assert subsets.long_tail_counts(50, 5, 0.3, kind="step") == [10, 10, 3, 3, 3]
    assert subsets.long_tail_counts(10, 1, 0.1) == [10]


def test_a_long_tail_keeps_images_of_the_right_classes():
    kept = subsets.long_tail_indices(LABELS, 4, 0.1)
    assert torch.bincount(LABELS[kept]).tolist() == [10, 4, 2, 1]
    assert len(kept.unique()) == len(kept)


@pytest.mark.parametrize(
    ("labels", "factor", "empty", "least"),
    [(LABELS, 0.05, 3, 0.1), (torch.arange(1347) % 10, 0.001, 7, 0.007424)],
)
def test_a_tail_that_empties_a_class_is_refused_with_the_least_factor(labels, factor, empty, least):
    num_classes = int(labels.max()) + 1
    with pytest.raises(ConfigError, match=rf"imb_factor={factor} leaves class {empty} no image: use at least {least}$"):
        subsets.long_tail_indices(labels, num_classes, factor)
    assert torch.bincount(labels[subsets.long_tail_indices(labels, num_classes, least)]).min() == 1


@pytest.mark.parametrize("draw", ["own", "reference"])
def test_few_shot_draws_are_distinct_repeatable_and_move_with_the_seed(draw):
    first, again, other = (subsets.few_shot_indices(LABELS, [[1, 2], [3]], 5, seed, draw) for seed in (1, 1, 2))
    assert first == again != other
    assert sorted(first) == [1, 2, 3]
    if draw == "own":  # which of a class does not depend on the others
        assert first[3] == subsets.few_shot_indices(LABELS, [[3]], 5, seed=1)[3]
    assert all(len(set(positions)) == 5 and max(positions) < 10 for positions in first.values())


def test_validation_takes_the_same_share_of_every_class_and_leaves_each_a_training_image():
    train, val = subsets.split_validation(LABELS, 0.3, 1993)
    assert torch.bincount(LABELS[val]).tolist() == [3, 3, 3, 3]
    assert torch.cat([train, val]).sort().values.tolist() == list(range(40))
    train, val = subsets.split_validation(torch.tensor([0, 1, 1]), 0.9, 1993)
    assert torch.tensor([0, 1, 1])[train].tolist() == [0, 1] and len(val) == 1
    assert [len(part) for part in subsets.split_validation(LABELS, 0.0, 1993)] == [40, 0]
