"""Metric values of the specification cards: PyCIL 11.4, 11.5, GUIDE P10, ASP 5.2 and 23, DDDR 16, TDFA 1.10."""

from statistics import fmean

import numpy as np
import pytest

from utils.results import metrics

# GUIDE P10, turned to our A[after task i][task j].
GUIDE_MATRIX = [[0.9], [0.5, 0.8], [0.6, 0.4, 0.7]]


@pytest.mark.parametrize(
    ("groups", "table"),
    [
        (10, {"00-09": 86.0, "10-19": 86.0}),
        ([10, 10], {"00-09": 86.0, "10-19": 86.0}),
        (5, {"00-04": 88.0, "05-09": 84.0, "10-14": 88.0, "15-19": 84.0}),
    ],
)
def test_pycils_table_has_its_names_order_and_values(groups, table):
    labels = np.repeat(np.arange(20), 5)
    predictions = np.where(np.arange(100) % 7 == 0, 0, labels)
    found = metrics.group_accuracies(predictions, labels, num_old=10, groups=groups)
    assert list(found.items()) == [("total", 86.0), *table.items(), ("old", 86.0), ("new", 86.0)]


def test_pycils_forgetting_is_34_and_guides_negative_where_a_task_improved():
    assert metrics.forgetting([[90], [70, 88], [50, 60, 85]]) == 34.0
    assert metrics.forgetting([[0.5], [0.6, 0.8]]) == pytest.approx(-0.1)


@pytest.mark.parametrize(("after", "average", "lost"), [(0, 0.9, 0.0), (1, 0.65, 0.4), (2, 1.7 / 3, 0.35)])
def test_guides_average_accuracy_and_forgetting(after, average, lost):
    matrix = GUIDE_MATRIX[: after + 1]
    assert fmean(matrix[-1]) == pytest.approx(average)
    assert metrics.forgetting(matrix) == pytest.approx(lost)


@pytest.mark.parametrize(("after", "lost"), [(1, 0.0), (2, 0.30), (3, 0.20)])
def test_dddrs_forgetting_of_classes(after, lost):
    rows = [[0.9, 0.8], [0.5, 0.6, 0.7, 0.9], [0.6, 0.5, 0.6, 0.8, 0.9, 0.9]]
    assert metrics.class_forgetting(rows[:after]) == pytest.approx(lost)


def test_dddrs_forgetting_is_never_negative_and_skips_classes_without_test_images():
    assert metrics.class_forgetting([[0.5, 0.5, None], [0.9, 0.3, None, 0.1]]) == pytest.approx(0.1)


def test_asps_novel_accuracy_covers_all_novel_groups_and_base_only_the_base():
    assert metrics.harmonic_mean(80.454, 52.928) == pytest.approx(63.8507, abs=5e-5)
    figures = metrics.fscil([[92.2], [90.0, 50.0], [80.454, 50.928, 54.928]], test_counts=[6000, 500, 500])
    assert figures["base"][-1] == 80.454
    assert figures["novel"] == pytest.approx([None, 50.0, 52.928])
    assert figures["harmonic_mean"][-1] == pytest.approx(63.8507, abs=5e-5)


def test_asps_old_and_new_are_means_over_base_and_over_all_novel_groups():
    labels = np.repeat(np.arange(15), 100)
    shares = np.repeat([0.80, 0.90, 0.50, 0.40, 0.60], 3)  # of five groups of three classes, three of them novel
    predictions = np.where(np.tile(np.arange(100) / 100, 15) < np.repeat(shares, 100), labels, -1)
    averages = metrics.group_averages(predictions, labels, init_cls=6, increment=3)
    assert averages == pytest.approx({"old": 85.0, "new": 50.0, "harmonic_mean": 2 * 85 * 50 / 135})


def test_asps_averages_leave_out_a_last_group_of_one_class():
    # The original's groups start at 0, increment, ... below the largest label: class 6 of seven has none.
    labels = np.repeat(np.arange(7), 10)
    predictions = np.where(np.tile(np.arange(10), 7) < np.repeat([9, 7, 8, 8, 6, 4, 1], 10), labels, -1)
    averages = metrics.group_averages(predictions, labels, init_cls=4, increment=2)
    assert averages == pytest.approx({"old": 80.0, "new": 50.0, "harmonic_mean": 2 * 80 * 50 / 130})


@pytest.mark.parametrize(
    ("num_classes", "largest", "sizes"),
    [(100, 500, (35, 35, 30)), (10, 5000, (8, 2, 0))],  # CIFAR-100-LT and CIFAR-10-LT at rho = 0.01
)
def test_many_medium_few_split_the_long_tailed_cifars(num_classes, largest, sizes):
    counts = [int(largest * 0.01 ** (i / (num_classes - 1))) for i in range(num_classes)]
    parts = np.split(np.arange(num_classes), np.cumsum(sizes)[:-1])
    wanted = [part.mean() if len(part) else None for part in parts]
    assert list(metrics.many_medium_few(range(num_classes), counts).values()) == wanted
