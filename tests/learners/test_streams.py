"""Learners of a stream: what a reservoir and a balanced memory hold, and what merged weights are."""

import pytest
import torch

from learners.task_arithmetic import TaskArithmetic, ties
from tests.support.toy import tiny_source, toy_experiment, toy_images
from utils.run.errors import ConfigError


def run(name, folder, source=None, **keys):
    experiment = toy_experiment(name, folder, source, limit_tasks=3, **{"init_epoch": 2, "epochs": 2, **keys})
    return experiment.learn_all(), experiment.learner


# ---------------------------------------------------------------------- experience replay and A-GEM


def test_reservoir_holds_a_sample_of_all_that_was_shown(tmp_path):
    results, learner = run("er", tmp_path, memory_size=12)
    assert results["memory_units"]["real"] == len(learner.memory.images) == 12
    assert learner.num_offered == 3 * 2 * 20  # tasks, epochs, images
    assert set(learner.memory.images.classes) - {4, 5} and {4, 5} & set(learner.memory.images.classes)


def test_first_step_has_nothing_to_remember_and_later_ones_a_whole_batch(tmp_path):
    experiment = toy_experiment("er", tmp_path, limit_tasks=1, batch_size=8, memory_batch_size=6, memory_size=10)
    learner, task = experiment.check(), experiment.data.task(0)
    experiment.data.advance(task)
    learner.present = experiment.data.train_images(task)
    batches = list(learner.batches(task).epoch(0))
    assert [len(batch) for batch in batches] == [8, 8, 4]
    assert [0 if batch.replay is None else len(batch.replay) for batch in batches] == [0, 6, 6]
    again = learner.batches(task)
    for step, _ in enumerate(again.epoch(0)):
        if step == 1:
            break
    rest = learner.batches(task)
    rest.load_state_dict(again.state_dict())
    assert torch.equal(next(rest.epoch(0, start=2)).replay.images, batches[2].replay.images)


def test_balanced_memory_holds_equal_shares_of_the_tasks(tmp_path):
    learner = run("er", tmp_path, buffer="balanced", memory_size=13)[1]
    counts = learner.memory.images.counts(6).view(3, 2).sum(1).tolist()
    assert counts == [5, 4, 4]


def test_agem_keeps_a_fixed_number_of_every_class_unless_it_fills_a_reservoir(tmp_path):
    assert len(run("agem", tmp_path / "fixed", memory_per_class=3)[1].memory.images) == 18
    assert len(run("agem", tmp_path / "r", buffer="reservoir", fixed_memory=False)[1].memory.images) == 12


def test_a_balanced_memory_is_drawn_from_all_classes_of_a_distilled_stream(tmp_path):
    """Drawn images come in a part per class; a random order of them all must not begin with the first one's."""
    synth = {**tiny_source("small_d4m"), "stream": "distilled", "memory": "stream", "ipc": 6, "syn_per_class": 6}
    for name, keys in (("agem", {"memory_per_class": 3}), ("er", {"buffer": "balanced", "memory_size": 18})):
        memory = run(name, tmp_path / name, synth=synth, **keys)[1].memory.images
        counts = memory.counts(6).tolist()
        assert counts == [3] * 6 if name == "agem" else (min(counts) > 0 and sum(counts) == 18)


def test_a_last_image_alone_in_a_batch_of_memory_joins_the_one_before(tmp_path):
    experiment = toy_experiment("agem", tmp_path, limit_tasks=2, memory_batch_size=3, batch_size=4)
    learner = experiment.check()
    learner.memory.images, learner.present = toy_images(5, 2, "remembered"), toy_images(6, 2, "new")
    learner.network.least_batch = lambda size: 2
    batches = learner.batches(experiment.data.task(1)).replay
    assert [len(batch) for batch in batches.epoch(0)] == [3, 3, 4]


def test_first_task_of_a_stream_is_no_other_learners(tmp_path):
    run("er", tmp_path / "er")
    assert not list(tmp_path.glob("er/**/initial"))
    with pytest.raises(ConfigError, match="the learner 'er' trains the first task in its own way"):
        toy_experiment("er", tmp_path, init_from=str(tmp_path / "er"))


def test_generated_images_are_remembered_beside_the_reservoir_and_never_leave_it(tmp_path):
    experiment = toy_experiment("er", tmp_path, "ddpm", limit_tasks=2, memory_size=0, init_epoch=1, epochs=1)
    seen, learner_class = [], type(experiment.check())
    loss = learner_class.compute_loss
    try:
        learner_class.compute_loss = lambda self, batch, task: (
            seen.append((task.index, batch.replay)) or loss(self, batch, task)
        )
        experiment.learn_all()
    finally:
        learner_class.compute_loss = loss
    assert all(replay is None for index, replay in seen if index == 0)
    assert all(replay.is_replay.all() for index, replay in seen if index == 1)


@pytest.mark.parametrize("word", ["buffer_size", "mem_size"])
def test_words_of_mammoth_and_avalanche_mean_what_they_mean_there(word, tmp_path):
    mammoth = {word: 9, "lr": 0.03, "n_epochs": 3, "minibatch_size": 5, "optim_mom": 0.5, "optim_wd": 0.1}
    own = {"init_lr": None, "lrate": None, "init_epoch": None, "epochs": None, "memory_size": None}
    config = toy_experiment("er", tmp_path, **{**own, **mammoth, "memory_batch_size": None}).config
    assert (config.memory_size, config.memory_batch_size, config.momentum) == (9, 5, 0.5)
    assert (config.init_lr, config.lrate, config.init_epoch, config.epochs) == (0.03, 0.03, 3, 3)
    assert (config.init_weight_decay, config.weight_decay) == (0.1, 0.1)
    with pytest.raises(ConfigError, match=rf"{word}=9 and memory_size=5 are one key: keep one of them"):
        toy_experiment("er", tmp_path, memory_size=5, **{word: 9})
    total = toy_experiment("agem", tmp_path / "total", **{"memory_size": None, "memory_per_class": None, word: 9})
    fixed = toy_experiment("agem", tmp_path / "fixed", memory_per_class=3)
    assert (total.config.fixed_memory, fixed.config.fixed_memory) == (False, True)


# ---------------------------------------------------------------------- task arithmetic


def merged(folder, **keys):
    results, learner = run("task_arithmetic", folder, anchor="first_task", **{"reestimate_bn": False, **keys})
    return results, learner, dict(learner.network.backbone.named_parameters())


@pytest.mark.parametrize("scaling", [0.0, 0.3, 1.0])
def test_merged_weights_are_in_the_network(scaling, tmp_path):
    _, learner, weights = merged(tmp_path, scaling=scaling)
    assert len(learner.vectors) == 2
    for name, value in weights.items():
        moves = sum(vector[name] for vector in learner.vectors)
        torch.testing.assert_close(value, learner.theta_0[name] + scaling * moves)
    # In the study that D4M was used in, the merged trunk was never loaded.
    assert all(torch.equal(weights[name], learner.theta_0[name]) for name in weights) is (scaling == 0)


def test_statistics_of_batch_norm_are_measured_anew_and_not_added(tmp_path):
    _, learner, _ = merged(tmp_path, scaling=1.0, reestimate_bn=True)
    buffers = dict(learner.network.backbone.named_buffers())
    assert all((value > 0).all() for name, value in buffers.items() if name.endswith("running_var"))
    assert not any("running" in name or "num_batches" in name for vector in learner.vectors for name in vector)
    means = [name for name in buffers if name.endswith("running_mean")]
    assert any(not torch.equal(buffers[name], learner.theta_0[name]) for name in means)


def test_ties_pairs_entries_by_their_names():
    one, other = ({"b": torch.tensor([3.0, sign]), "a": sign * torch.tensor([0.5])} for sign in (-1, 1))
    merged, again = ties([one, other], 0.7), ties([one, dict(sorted(other.items()))], 0.7)  # as a file gives it back
    assert all(torch.equal(value, again[name]) for name, value in merged.items())


def test_a_budget_counts_task_vectors(tmp_path):
    with pytest.raises(ConfigError, match=r"memory_budget_mb=.*task_vectors \d+"):
        whole = run("task_arithmetic", tmp_path / "whole", anchor="first_task", reestimate_bn=False)[0]["memory_bytes"]
        budget = (whole["total"] - whole["task_vectors"] / 2) / 1e6
        run("task_arithmetic", tmp_path / "b", anchor="first_task", reestimate_bn=False, memory_budget_mb=budget)


def test_averaging_is_a_sum_over_the_number_of_tasks_and_every_class_keeps_its_own_row(tmp_path):
    _, average, weights = merged(tmp_path / "average", merge="average")
    _, half, same = merged(tmp_path / "half", scaling=0.5)
    torch.testing.assert_close(weights, same)
    assert torch.equal(average.network.head.weight, half.network.head.weight)
    assert len(average.network.head.weight.unique(dim=0)) == 6


def test_scaling_is_chosen_on_images_that_were_held_out(tmp_path, monkeypatch):
    merge, tried = TaskArithmetic._merge, []
    monkeypatch.setattr(TaskArithmetic, "_merge", lambda self, scaling: tried.append(scaling) or merge(self, scaling))
    merged(tmp_path, scaling="val", val_share=0.2)
    assert tried[:21] == [step / 20 for step in range(21)] and tried[21] in tried[:21] and len(tried) == 44
    for share in (0, 0.001):  # of ten images, none
        with pytest.raises(ConfigError, match=rf"scaling='val' .*val_share={share} holds no image .* raise it"):
            merged(tmp_path / str(share), scaling="val", val_share=share)
