import numpy as np
import pytest
import torch

from utils.results import metrics
from utils.run.errors import DataError


def one_hot(predictions, num_classes):
    return torch.nn.functional.one_hot(torch.tensor(predictions), num_classes).float()


def test_the_row_has_one_accuracy_per_task_over_all_seen_classes():
    scores = one_hot([0, 2, 1, 1, 2, 3], 4)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    assert metrics.accuracy_row(scores, labels, [2, 2]) == [75.0, 50.0]
    # scores of unseen classes make a prediction wrong
    assert metrics.accuracy_row(one_hot([0, 3], 4), torch.tensor([0, 1]), [2]) == [50.0]
    with pytest.raises(DataError, match="task 1"):  # which has no test image
        metrics.accuracy_row(one_hot([0], 4), torch.tensor([0]), [2, 2])


@pytest.mark.parametrize("convert", [torch.tensor, np.array])
def test_numpy_and_torch_give_plain_floats(convert):
    scores, labels = convert([[0.1, 0.9], [0.8, 0.2]]), convert([1, 1])
    row = metrics.accuracy_row(scores, labels, [2])
    table = metrics.group_accuracies(labels, labels, 0, [2])
    assert row == [50.0] and all(type(value) is float for value in [*row, *table.values()])
    assert type(metrics.topk(scores, labels, 1)) is float


def test_topk_agrees_with_sorting_and_is_capped_at_the_number_of_classes():
    scores = torch.rand(40, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 7
    for k in (1, 2, 5, 7, 8):
        hits = [label in row for label, row in zip(labels, scores.argsort(1, descending=True)[:, :k])]
        assert metrics.topk(scores, labels, k) == pytest.approx(100 * sum(hits) / 40)


def test_accuracy_forgetting_and_backward_transfer_come_from_the_matrix():
    matrix = [[90.0], [60.0, 80.0], [50.0, 70.0, 85.0]]
    assert sum(matrix[-1]) / 3 == pytest.approx(68.333, abs=1e-3)
    assert (metrics.backward_transfer(matrix), metrics.forgetting(matrix)) == (-25.0, 25.0)


NAN = float("nan")


@pytest.mark.parametrize(
    ("scores", "percentage"),
    [
        ([[0.0, 0.0], [0.0, 0.0]], 50.0),  # tied scores count for the lower class only
        ([[NAN, NAN], [NAN, 1.0]], 0.0),  # a network that returns NaN gets nothing right
    ],
)
def test_ties_and_nan_have_their_rules(scores, percentage):
    assert metrics.topk(torch.tensor(scores), torch.tensor([0, 1]), 1) == percentage


HUNDRED = [f"{first:02d}-{first + 9:02d}" for first in range(0, 120, 10)]


@pytest.mark.parametrize(
    ("labels", "num_old", "groups", "names"),
    [
        (range(10), 9, [5, 4, 1], ["00-04", "05-08", "09-09"]),  # the real tasks
        (range(120), 110, 10, HUNDRED),  # numeric order over a hundred classes
        (range(11), 0, 10, ["00-09", "10-19"]),  # a group that holds only the last class is kept
        ([0, 1, 4], 4, [2, 2, 2], ["00-01", "04-05"]),  # one without test images is left out
    ],
)
def test_groups_of_classes_stand_between_the_total_and_old_and_new(labels, num_old, groups, names):
    labels = np.array(labels)
    table = metrics.group_accuracies(labels, labels, num_old, groups)
    assert list(table) == ["total", *names, "old", "new"]
    assert set(table.values()) == ({100.0} if num_old else {100.0, 0.0}) and table["old"] == (100.0 if num_old else 0.0)


def test_percentages_of_groups_have_two_decimals():
    assert metrics.group_accuracies(np.array([0, 0, 1]), np.zeros(3, int), 0, [1])["total"] == 66.67


def test_per_class_accuracy_is_none_without_test_images():
    predictions, labels = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 1, 1])
    assert metrics.per_class_accuracy(predictions, labels, 3) == [50.0, 50.0, None]


def test_forgetting_starts_from_the_best_and_backward_transfer_from_the_first():
    assert metrics.forgetting([[80.0]]) == metrics.backward_transfer([[80.0]]) == 0.0  # one task
    matrix = [[60.0], [80.0, 50.0], [70.0, 40.0, 90.0]]
    assert metrics.forgetting_per_task(matrix) == [10.0, 10.0]
    assert (metrics.forgetting(matrix), metrics.backward_transfer(matrix)) == (10.0, 0.0)


def test_performance_drop_weighs_tasks_by_their_test_images_and_the_harmonic_mean_of_nothing_is_zero():
    assert metrics.harmonic_mean(0.0, 0.0) == 0.0
    figures = metrics.fscil([[90.0], [80.0, 40.0]], test_counts=[300, 100])
    assert figures["performance_drop"] == [0.0, 20.0]
    assert figures["novel"] == [None, 40.0]


def test_group_averages_weigh_groups_and_not_images():
    labels = np.array([0] * 30 + [1] * 10 + [2] * 5 + [3] * 5)
    predictions = np.where(np.arange(50) < 30, labels, 0)  # class 0 right, all others wrong
    assert metrics.group_averages(predictions, labels, init_cls=2, increment=2)["old"] == 75.0  # one group of 40 images
    single = metrics.group_averages(predictions, labels, init_cls=3, increment=1)
    assert single["old"] == pytest.approx((100 + 0 + 0) / 3)
    assert single["new"] is None  # class 3 ends exactly at init_cls and is lost, as in the authors' code
    # the first session has no new groups
    first = metrics.group_averages(labels[:40], labels[:40], 4, 2)
    assert first == {"old": 100.0, "new": None, "harmonic_mean": None}


@pytest.mark.parametrize(
    ("accuracies", "counts", "groups"),
    [  # lines are drawn at 100 and 20; unknown classes are skipped; an empty group is None
        ([10.0, 20.0, 30.0, 40.0, None], [101, 100, 20, 19, 500], (10.0, 25.0, 40.0)),
        ([50.0], [5], (None, None, 50.0)),
    ],
)
def test_classes_are_many_medium_or_few(accuracies, counts, groups):
    assert metrics.many_medium_few(accuracies, counts) == dict(zip(("many", "medium", "few"), groups))


def test_where_the_task_is_known_only_its_own_classes_compete():
    scores = torch.tensor([[1.0, 2, 9], [3, 2, 9], [0, 9, 1], [9, 9, 0]])
    labels = torch.tensor([1, 1, 2, 2])
    assert metrics.within_task(scores, labels, [2, 1]) == 75.0  # the second of four is wrong within its own task
    assert metrics.within_task(scores, labels, [3]) == metrics.topk(scores, labels, 1)
