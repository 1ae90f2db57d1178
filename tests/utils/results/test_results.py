"""One seed's numbers as they grow session by session, and what several seeds have in common."""

from statistics import fmean

import pytest
import torch

from tests.support.toy import toy_dataset
from utils.data.manager import DataManager, Split
from utils.results.results import SUMMARISED, Results, log, summarise

# Right answers among the four test images of each class, after each of three sessions of two classes.
RIGHT = [[4, 3], [3, 3, 2, 2], [2, 2, 1, 1, 3, 1]]


def results_of(sessions, few_shot=True, results=None, with_val=False):
    data = DataManager(toy_dataset(), Split(init_cls=2, increment=2, shuffle=False, kshot=2 if few_shot else 0))
    results = results or Results({"seed": 7}, data)
    for index in sessions:
        num_seen = 2 * index + 2
        labels = torch.arange(num_seen).repeat_interleave(4)
        right = torch.arange(4).repeat(num_seen) < torch.tensor(RIGHT[index]).repeat_interleave(4)
        scores = torch.nn.functional.one_hot(labels.where(right, (labels + 1) % num_seen), num_seen).float()
        val = ({"cnn": scores[:4]}, labels[:4]) if with_val else None  # held-out images of class 0
        results.add(data.task(index), {"cnn": scores}, labels, val)
    return results


def continued(results, *sessions, **options):
    """What was stored, taken up by another process, which goes on."""
    other = results_of([])
    other.load(results.state())
    return results_of(sessions, results=other, **options)


def final(results):
    return results.to_dict({}, {}, {})


@pytest.fixture
def lines(monkeypatch):
    """What is logged."""
    lines = []
    monkeypatch.setattr(log, "info", lambda text, *values: lines.append(text % values))
    return lines


def test_few_shot_figures_are_those_of_the_sessions():
    fscil = final(results_of([0, 1, 2]))["fscil"]
    assert fscil["base"] == [87.5, 75.0, 50.0]
    assert fscil["novel"] == [None, 50.0, 37.5]  # of four novel classes in the last session
    assert fscil["harmonic_mean"] == [None, 60.0, pytest.approx(2 * 50 * 37.5 / 87.5)]
    assert fscil["performance_drop"] == pytest.approx([0.0, 25.0, 87.5 - 100 * 10 / 24])
    assert fscil["group_new"] == [None, 50.0, 37.5]  # groups are equally large, so that their means are the same


def test_every_few_shot_session_is_logged_in_one_line(lines):
    results_of([0, 1])
    first, second = [line for line in lines if line.startswith("Few-shot session")]
    assert first.startswith("Few-shot session 0: base 87.50, novel -, harmonic mean -, performance drop 0.00")
    assert second.startswith("Few-shot session 1: base 75.00, novel 50.00, harmonic mean 60.00, performance drop 25.00")


def test_the_average_incremental_accuracy_counts_the_first_task():
    assert final(results_of([0, 1, 2]))["average_incremental_accuracy"] == fmean([87.5, 62.5, 41.67])


def test_results_that_were_stored_in_between_end_alike():
    assert final(continued(results_of([0, 1]), 2)) == final(results_of([0, 1, 2]))


def test_held_out_images_have_a_curve_in_results_and_log(lines):
    plain = final(results_of([0, 1], few_shot=False))
    assert plain["fscil"] is plain["val_top1_curve"] is None and "VAL" not in "".join(lines)
    assert final(results_of([0, 1], with_val=True))["val_top1_curve"] == [100.0, 75.0]
    assert lines.count("VAL top1 curve: [100.0, 75.0]") == 1
    # tasks of a run that began without held-out images have no value
    assert final(continued(results_of([0]), 1, with_val=True))["val_top1_curve"] == [None, 75.0]


def test_the_forgetting_of_classes_comes_from_every_tasks_class_accuracies():
    # Classes 0 to 3 end at 2, 2, 1 and 1 of 4 right; at best they had 4, 3, 2 and 2.
    assert final(results_of([0, 1, 2]))["class_forgetting"] == pytest.approx(25 * (2 + 1 + 1 + 1) / 4)
    assert final(results_of([0]))["class_forgetting"] == 0.0


def seed_results(seed, novel, sessions=slice(None), few_shot=True):
    fscil = {"base": [90.0, 80.0], "novel": [None, novel], "harmonic_mean": [None, 50.0], "performance_drop": [0, 9.0]}
    fscil = {name: values[sessions] for name, values in fscil.items()} if few_shot else None
    return {"seed": seed, **dict.fromkeys(SUMMARISED, 70.0), "fscil": fscil}


def test_seeds_are_summarised_by_the_last_sessions_mean_and_deviation():
    summary = summarise([seed_results(1, 40.0), seed_results(2, 44.0)])
    assert summary["seeds"] == [1, 2]
    assert summary["fscil"]["novel"] == {"mean": 42.0, "std": pytest.approx(8**0.5)}
    assert summary["fscil"]["base"] == {"mean": 80.0, "std": 0.0}
    assert summary["final_accuracy"] == summary["backward_transfer"] == {"mean": 70.0, "std": 0.0}
    # a single session has no novel figures
    assert set(summarise([seed_results(1, 40.0, slice(1))])["fscil"]) == {"base", "performance_drop"}
    assert "fscil" not in summarise([seed_results(1, 40.0, few_shot=False)])
