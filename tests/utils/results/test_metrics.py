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


def test_scores_of_unseen_classes_make_a_prediction_wrong():
    scores = one_hot([0, 3], 4)
    assert metrics.accuracy_row(scores, torch.tensor([0, 1]), [2]) == [50.0]


def test_a_task_without_test_images_is_named():
    with pytest.raises(DataError, match="task 1"):
        metrics.accuracy_row(one_hot([0], 4), torch.tensor([0]), [2, 2])


@pytest.mark.parametrize("convert", [torch.tensor, np.array])
def test_numpy_and_torch_give_plain_floats(convert):
    scores, labels = convert([[0.1, 0.9], [0.8, 0.2]]), convert([1, 1])
    row = metrics.accuracy_row(scores, labels, [2])
    table = metrics.group_accuracies(labels, labels, 0, [2])
    assert row == [50.0] and all(type(value) is float for value in [*row, *table.values()])
    assert type(metrics.topk(scores, labels, 1)) is float


@pytest.mark.parametrize("k", [1, 2, 5])
def test_topk_agrees_with_sorting(k):
    scores = torch.rand(40, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 7
    hits = [label in row for label, row in zip(labels.tolist(), scores.argsort(1, descending=True)[:, :k].tolist())]
    assert metrics.topk(scores, labels, k) == pytest.approx(100 * sum(hits) / 40)


def test_topk_is_capped_at_the_number_of_classes():
    assert metrics.topk(torch.rand(6, 3), torch.arange(6) % 3, 5) == 100.0


def test_tied_scores_count_for_the_lower_class_only():
    assert metrics.topk(torch.zeros(2, 2), torch.tensor([0, 1]), 1) == 50.0


def test_a_network_that_returns_nan_gets_nothing_right():
    scores = torch.tensor([[float("nan"), float("nan")], [float("nan"), 1.0]])
    assert metrics.topk(scores, torch.tensor([0, 1]), 1) == 0.0


def test_groups_follow_the_real_tasks():
    labels = np.arange(10)
    assert list(metrics.group_accuracies(labels, labels, 9, [5, 4, 1]))[1:-2] == ["00-04", "05-08", "09-09"]


def test_groups_stay_in_numeric_order_over_a_hundred_classes():
    labels = np.arange(120)
    names = list(metrics.group_accuracies(labels, labels, 110, 10))[1:-2]
    assert names[:2] == ["00-09", "10-19"] and names[-2:] == ["100-109", "110-119"]


def test_a_group_that_holds_only_the_last_class_is_kept():
    labels = np.arange(11)
    assert "10-19" in metrics.group_accuracies(labels, labels, 0, 10)


def test_old_is_zero_in_phase_0():
    labels = np.arange(4)
    table = metrics.group_accuracies(labels, labels, num_old=0, groups=[4])
    assert table == {"total": 100.0, "00-03": 100.0, "old": 0.0, "new": 100.0}


def test_a_group_without_test_images_is_left_out():
    labels = np.array([0, 1, 4])
    table = metrics.group_accuracies(labels, labels, 4, [2, 2, 2])
    assert list(table) == ["total", "00-01", "04-05", "old", "new"]


def test_percentages_of_groups_have_two_decimals():
    assert metrics.group_accuracies(np.array([0, 0, 1]), np.zeros(3, int), 0, [1])["total"] == 66.67


def test_per_class_accuracy_is_none_without_test_images():
    predictions, labels = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 1, 1])
    assert metrics.per_class_accuracy(predictions, labels, 3) == [50.0, 50.0, None]


def test_average_incremental_accuracy_counts_the_first_task():
    assert metrics.average_incremental_accuracy([90.0, 60.0, 30.0]) == 60.0


def test_one_task_forgets_and_transfers_nothing():
    assert metrics.forgetting([[80.0]]) == metrics.backward_transfer([[80.0]]) == 0.0


def test_forgetting_starts_from_the_best_and_backward_transfer_from_the_first():
    matrix = [[60.0], [80.0, 50.0], [70.0, 40.0, 90.0]]
    assert metrics.forgetting_per_task(matrix) == [10.0, 10.0]
    assert metrics.forgetting(matrix) == 10.0
    assert metrics.backward_transfer(matrix) == 0.0


def test_performance_drop_weighs_tasks_by_their_test_images():
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


def test_group_averages_of_the_first_session_have_no_new_groups():
    labels = np.arange(4)
    assert metrics.group_averages(labels, labels, 4, 2) == {"old": 100.0, "new": None, "harmonic_mean": None}


def test_the_harmonic_mean_of_nothing_is_zero():
    assert metrics.harmonic_mean(0.0, 0.0) == 0.0


def test_many_medium_few_draw_the_line_at_100_and_20_and_skip_unknown_classes():
    groups = metrics.many_medium_few([10.0, 20.0, 30.0, 40.0, None], [101, 100, 20, 19, 500])
    assert groups == {"many": 10.0, "medium": 25.0, "few": 40.0}


def test_an_empty_group_is_none():
    assert metrics.many_medium_few([50.0], [5]) == {"many": None, "medium": None, "few": 50.0}
