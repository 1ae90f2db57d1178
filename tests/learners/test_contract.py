"""What every registered learner must hold; a new one is under contract as soon as it is registered."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from learners import LEARNERS
from synth import SOURCES
from tests.support import toy
from tests.support.toy import TINY_SOURCES, goes_with, toy_experiment
from tests.support.toy_agem import AGEM
from tests.support.toy_distilled import MeanImages
from tests.support.toy_features import Gaussians
from utils.data.images import FeatureSet
from utils.training.fit import Step

ALL = LEARNERS.names()
PAIRS = [(name, source) for name in ALL for source in SOURCES.names() if goes_with(LEARNERS[name], SOURCES[source])]
PAIRS += [(name, None) for name in ALL if not LEARNERS[name].needs_source]
# Every learner with ddpm or without a source in both precisions; the slower sources with three learners, and with all
# others behind the marker.
WITH_EVERY_SOURCE = ("asp", "dddr", "finetune")
INTERRUPTED = [
    pytest.param(name, source, precision, marks=[] if usual else [pytest.mark.slow])
    for name, source in PAIRS
    for precision in ("fp32", "bf16")
    for usual in [source in (None, "ddpm") or (name in WITH_EVERY_SOURCE and precision == "fp32")]
    if source != "controlnet" or name == "finetune"  # with the others, small_controlnet stands for it
]


class Interrupted(Exception):
    """Stands for a kill."""


def weights(experiment):
    return {name: value.clone() for name, value in experiment.learner.network.state_dict().items()}


def without_seconds(results):
    return {key: value for key, value in results.items() if key not in ("seconds", "command")}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("init_cls", "increment", "tasks"),
    [
        (1, 1, 6),  # one class at a time
        (3, 2, 3),  # large first task, short last one
        (6, 2, 1),  # everything at once
    ],
)
def test_learner_grows_by_any_increment(name, init_cls, increment, tasks, tmp_path):
    experiment = toy_experiment(name, tmp_path, init_cls=init_cls, increment=increment, init_epoch=1, epochs=1)
    results = experiment.learn_all()
    assert len(results["accuracy_matrix"]) == tasks
    assert experiment.learner.predict(experiment.data.test_images(range(6)))["cnn"].shape == (24, 6)


@pytest.mark.parametrize("name", ALL)
def test_learner_learns_the_first_task(name, tmp_path):
    long = {"init_epoch": 15, "com_round": 15}  # by whichever name the learner calls its epochs
    results = toy_experiment(name, tmp_path, **long, init_lr=0.05, increment=4, epochs=1).learn_all()
    assert results["accuracy_matrix"][0][0] >= 75


@pytest.mark.parametrize("name", ALL)
def test_same_seed_gives_the_same_bits(name, tmp_path):
    first, second = (toy_experiment(name, tmp_path / part, epochs=1) for part in "ab")
    assert without_seconds(first.learn_all()) == without_seconds(second.learn_all())
    torch.testing.assert_close(weights(first), weights(second), rtol=0, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_another_seed_gives_other_bits(name, tmp_path):
    first, second = (toy_experiment(name, tmp_path / str(seed), epochs=1, seed=seed, increment=4) for seed in (7, 8))
    first.learn_all(), second.learn_all()
    assert not torch.equal(next(iter(weights(first).values())), next(iter(weights(second).values())))


@pytest.mark.parametrize(("name", "source", "precision"), INTERRUPTED)
def test_interrupted_run_ends_with_the_same_bits(name, source, precision, tmp_path, monkeypatch):
    keys = {"epochs": 2, "precision": precision, "checkpoint_every": 2}
    whole = toy_experiment(name, tmp_path / "whole", source, **keys)
    expected = whole.learn_all()
    broken = toy_experiment(name, tmp_path / "broken", source, **keys)
    for stop in stops(whole):
        interrupt(broken, stop, monkeypatch)
        broken = toy_experiment(name, tmp_path / "broken", source, **keys)
    results = broken.learn_all()
    assert without_seconds(results) == without_seconds(expected)
    torch.testing.assert_close(weights(broken), weights(whole), rtol=0, atol=0)


def stops(experiment):
    """Hooks in which a run is left; one whose later tasks train nothing cannot be left in a step."""
    trains = experiment.learner.train_config(experiment.data.task(1)).num_steps(steps_per_epoch=1) > 0
    return ["after_step"] * trains + ["after_training", "before_training"]


def interrupt(experiment, stop, monkeypatch):
    """Run until a hook of the second task or later is entered; a training is left after its first checkpoint."""
    learner = LEARNERS[experiment.config.model_name]
    original = getattr(learner, stop)

    def after_step(self, step):
        if step.task.index == 1 and step.number == 3:
            raise Interrupted

    def other_hook(self, task):
        if task.index >= 1:
            raise Interrupted
        return original(self, task)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(learner, stop, after_step if stop == "after_step" else other_hook)
        experiment.learn_all()


@pytest.mark.parametrize("replay", ["keep", "redraw"])
def test_run_goes_on_from_the_checkpoint_before_a_damaged_one(replay, tmp_path, monkeypatch):
    keys = {"epochs": 1, "synth": {"name": "ddpm", **TINY_SOURCES["ddpm"], "replay": replay}}
    whole = toy_experiment("finetune", tmp_path / "whole", **keys)
    expected = whole.learn_all()
    broken = toy_experiment("finetune", tmp_path / "broken", **keys)
    write = type(broken)._write
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(type(broken), "_write", lambda self: stop_after(self, tasks=2) or write(self))
        broken.learn_all()
    newest = broken.folder / "checkpoints" / "task_1" / "network.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"?")
    results = toy_experiment("finetune", tmp_path / "broken", **keys).learn_all()
    assert without_seconds(results) == without_seconds(expected)
    assert "network.safetensors is missing or damaged" in (broken.folder / "log.txt").read_text()


def stop_after(experiment, tasks):
    if len(experiment.results.accuracy_matrix) == tasks:
        raise Interrupted


@pytest.mark.parametrize("name", ALL)
def test_memory_ledger_equals_the_bytes_on_disk(name, tmp_path):
    experiment = toy_experiment(name, tmp_path)
    ledger = experiment.learn_all()["memory_bytes"]
    newest = experiment.folder / "checkpoints" / "task_2"
    assert ledger["network"] + ledger["old_branches"] == (newest / "network.safetensors").stat().st_size
    assert ledger["source"] == sum(path.stat().st_size for path in newest.glob("source/*"))
    bank = tmp_path / "outputs" / "syn_image_toy_seed7"
    assert ledger["bank"] == sum(path.stat().st_size for path in bank.glob("task_*/*/*-*.png"))
    exemplars = (newest / "exemplars.safetensors").stat().st_size if LEARNERS[name].uses_exemplars else 0
    assert ledger["exemplars"] == (ledger["all_real_data"] if LEARNERS[name].upper_bound else exemplars)


@pytest.mark.parametrize("name", [name for name in ALL if not LEARNERS[name].upper_bound])
def test_learner_works_while_past_data_is_sealed(name, tmp_path, monkeypatch):
    experiment = toy_experiment(name, tmp_path, epochs=1)
    seen = []
    original = experiment.data.train_images
    monkeypatch.setattr(experiment.data, "train_images", lambda task: seen.append(task.index) or original(task))
    experiment.learn_all()
    assert experiment.data.upper_bound is False
    assert seen == sorted(seen)  # never an earlier task's


@pytest.mark.parametrize("name", ALL)
def test_finished_run_is_known_as_finished(name, tmp_path):
    assert toy_experiment(name, tmp_path).finished() is None
    results = toy_experiment(name, tmp_path).learn_all()
    assert toy_experiment(name, tmp_path).finished()["final_accuracy"] == results["final_accuracy"]


# What the contract allows and no method here needs yet; each toy is one file in tests/support.


LEFT_IN = ("after_step", "after_training")


@pytest.fixture
def toys(monkeypatch):
    """Register the toy learner and sources for one test."""
    learners, sources = LEARNERS._load(), SOURCES._load()
    monkeypatch.setitem(learners, "agem", AGEM)
    for name, source in {"gaussians": Gaussians, "means": MeanImages}.items():
        monkeypatch.setitem(sources, name, source)
        monkeypatch.setitem(TINY_SOURCES, name, {"syn_per_class": 3})


def toy_run(name, source, folder, monkeypatch, stops=(), **keys):
    """A run and its results, seen to be the same where it is left in these hooks, if any, and taken up again."""
    keys = {"epochs": 2, "checkpoint_every": 2, **keys}
    whole = toy_experiment(name, folder / "whole", source, **keys)
    expected = whole.learn_all()
    if not stops:
        return whole, expected
    for stop in stops:
        interrupt(toy_experiment(name, folder / "cut", source, **keys), stop, monkeypatch)
    results = toy_experiment(name, folder / "cut", source, **keys).learn_all()
    assert without_seconds(results) == without_seconds(expected)
    return whole, expected


@pytest.mark.parametrize("source", [None, "ddpm", "means"])
def test_agem_is_one_short_file(source, toys, tmp_path, monkeypatch):
    seen = []
    gradient = Step.gradient
    monkeypatch.setattr(Step, "gradient", lambda self, loss: seen.append(self.purpose) or gradient(self, loss))
    toy_run("agem", source, tmp_path, monkeypatch, LEFT_IN if source is None else (), batch_size=2)
    assert set(seen) == {"train"}
    assert len(Path(toy.__file__).with_name("toy_agem.py").read_text().splitlines()) <= 45


def test_agem_removes_what_raises_the_loss_on_the_past(toys, tmp_path, monkeypatch):
    project, seen = AGEM.after_backward, []

    def watched(self, step):
        def along():
            return float(sum((own.grad * other).sum() for own, other in zip(step.parameters, reference)))

        if (old := step.batch.replay) is not None:
            reference = step.gradient(lambda: F.cross_entropy(self.network(old.images), old.labels))
            before, gradients = along(), [parameter.grad.clone() for parameter in step.parameters]
            project(self, step)
            changed = any(not torch.equal(own.grad, old) for own, old in zip(step.parameters, gradients))
            seen.append((before < 0, changed))
            assert along() >= -1e-5 * float(sum(other.square().sum() for other in reference))

    monkeypatch.setattr(AGEM, "after_backward", watched)
    toy_experiment("agem", tmp_path, epochs=6).learn_all()
    assert set(seen) == {(True, True), (False, False)}


@pytest.mark.parametrize("name", ["finetune", "icarl", "lwf"])
def test_features_stand_for_the_past(name, toys, tmp_path, monkeypatch):
    whole, results = toy_run(name, "gaussians", tmp_path, monkeypatch, LEFT_IN if name == "finetune" else ())
    assert results["memory_bytes"]["source"] > 0 and results["memory_bytes"]["bank"] == 0
    past = whole.learner.past
    assert isinstance(past, FeatureSet) and past.counts(6).tolist() == [3, 3, 3, 3, 0, 0]


@pytest.mark.parametrize("name", ["finetune", "replay", "wa"])
def test_a_source_takes_the_place_of_the_present(name, toys, tmp_path, monkeypatch):
    whole, _ = toy_run(name, "means", tmp_path, monkeypatch, LEFT_IN if name == "replay" else (), batch_size=2)
    learner = whole.learner
    assert learner.present.counts(6).tolist() == [0, 0, 0, 0, 2, 2]  # of ten real images each
    assert learner.past.counts(6).tolist() == [2, 2, 2, 2, 0, 0]
    assert learner.present.soft_targets().shape == (4, 6)
