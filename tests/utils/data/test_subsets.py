"""Orders, sizes and draws; the references' own numbers are in tests/parity/test_splits.py."""

import pytest
import torch

from utils.data import subsets
from utils.run.errors import ConfigError, DataError

LABELS = torch.arange(4).repeat_interleave(10)


def test_without_shuffle_classes_come_by_id():
    assert subsets.class_order(4, shuffle=False, seed=7) == [0, 1, 2, 3]


def test_a_class_order_seed_that_numpy_cannot_take_is_named():
    with pytest.raises(ConfigError, match="seed=-1"):
        subsets.class_order(4, shuffle=True, seed=-1)


@pytest.mark.parametrize(
    ("init_cls", "increment", "sizes"),
    [
        (2, 2, [2, 2, 2, 2, 2]),  # even split
        (5, 2, [5, 2, 2, 1]),  # large first task, short last one
        (1, 1, [1] * 10),  # one class at a time
        (4, 20, [4, 6]),  # the rest at once
        (10, 3, [10]),  # everything at once: joint training
    ],
)
def test_tasks_partition_the_ten_classes(init_cls, increment, sizes):
    assert subsets.task_sizes(10, init_cls, increment) == sizes


def test_a_first_task_larger_than_the_data_set_names_the_allowed_range():
    with pytest.raises(ConfigError) as error:
        subsets.task_sizes(100, 120, 10, "cifar100")
    assert str(error.value) == "init_cls=120, but cifar100 has only 100 classes: use a value from 1 to 100"


def test_a_step_tail_cuts_the_second_half_of_the_classes():
    assert subsets.long_tail_counts(50, 5, 0.3, kind="step") == [10, 10, 3, 3, 3]


def test_one_class_is_not_cut_by_a_long_tail():
    assert subsets.long_tail_counts(10, 1, 0.1) == [10]


def test_a_tail_that_empties_a_class_is_refused_with_the_least_factor():
    with pytest.raises(ConfigError, match=r"imb_factor=0.05 leaves class 3 no image: use at least 0.1"):
        subsets.long_tail_indices(LABELS, 4, 0.05)


def test_a_long_tail_keeps_images_of_the_right_classes():
    kept = subsets.long_tail_indices(LABELS, 4, 0.1)
    assert torch.bincount(LABELS[kept]).tolist() == [10, 4, 2, 1]
    assert len(kept.unique()) == len(kept)


def test_the_least_factor_that_the_message_names_is_enough():
    labels = torch.arange(1347) % 10
    with pytest.raises(ConfigError) as error:
        subsets.long_tail_indices(labels, 10, 0.001)
    least = float(str(error.value).split()[-1])
    assert torch.bincount(labels[subsets.long_tail_indices(labels, 10, least)]).min() == 1


@pytest.mark.parametrize("draw", ["own", "reference"])
def test_few_shot_draws_are_distinct_repeatable_and_move_with_the_seed(draw):
    first, again, other = (subsets.few_shot_indices(LABELS, [[1, 2], [3]], 5, seed, draw) for seed in (1, 1, 2))
    assert first == again != other
    assert sorted(first) == [1, 2, 3]
    assert all(len(set(positions)) == 5 and max(positions) < 10 for positions in first.values())


def test_our_own_draw_of_a_class_does_not_depend_on_the_others():
    alone = subsets.few_shot_indices(LABELS, [[3]], 5, seed=1)
    assert alone[3] == subsets.few_shot_indices(LABELS, [[1, 2], [3]], 5, seed=1)[3]


def test_more_shots_than_images_names_class_count_and_remedy():
    with pytest.raises(DataError, match=r"kshot=11, but class 'dog' has only 10 training images: use kshot of at most"):
        subsets.few_shot_indices(LABELS, [[2]], 11, seed=1, class_names=["ant", "cat", "dog", "eel"])


def test_validation_takes_the_same_share_of_every_class():
    train, val = subsets.split_validation(LABELS, 0.3, 1993)
    assert torch.bincount(LABELS[val]).tolist() == [3, 3, 3, 3]
    assert torch.cat([train, val]).sort().values.tolist() == list(range(40))


def test_validation_leaves_every_class_a_training_image():
    train, val = subsets.split_validation(torch.tensor([0, 1, 1]), 0.9, 1993)
    assert torch.tensor([0, 1, 1])[train].tolist() == [0, 1]
    assert len(val) == 1


def test_no_validation_share_holds_nothing_out():
    train, val = subsets.split_validation(LABELS, 0.0, 1993)
    assert (len(train), len(val)) == (40, 0)
