"""What every registered learner must hold; a new one is under contract as soon as it is registered."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from learners import LEARNERS
from learners.frozen_backbone import FrozenBackboneLearner
from synth import SOURCES
from tests.support import toy
from tests.support.toy import (
    TINY_SOURCES,
    Interrupted,
    goes_with,
    interrupt,
    toy_experiment,
    without_clock,
    without_cost,
)
from tests.support.toy_agem import AGEM
from tests.support.toy_sources import Gaussians, MeanImages
from utils.data.images import FeatureSet
from utils.run.folder import read_results
from utils.training.fit import Step

ALL = LEARNERS.names()
PAIRS = [(name, source) for name in ALL for source in SOURCES.names() if goes_with(LEARNERS[name], SOURCES[source])]
PAIRS += [(name, None) for name in ALL if not LEARNERS[name].needs_source]
# In fp32 every learner with ddpm and without a source, and three learners with the slower sources; in bf16 every
# learner without a source or with the one that it needs. All other pairs stand behind the marker.
WITH_EVERY_SOURCE = ("asp", "dddr", "finetune")
LIKE_FINETUNE = ("crt", "logit_adjustment")  # whose steps are its steps
KIN = ("cbdm", "small_d4m")  # of ddpm and small_ldm, from which an interruption differs for no learner but one
WITH_SOURCE_IN_BF16 = ("finetune", "generative_replay", "guide")
INTERRUPTED = [
    pytest.param(name, source, precision, marks=[] if usual else [pytest.mark.slow])
    for name, source in PAIRS
    for precision in ("fp32", "bf16")
    for usual in [
        (source is None and (precision == "fp32" or name not in LIKE_FINETUNE))
        or (source == "ddpm" and (precision == "fp32" or name in WITH_SOURCE_IN_BF16))
        or (LEARNERS[name].accepts == {"features"} and precision == "fp32")  # which ddpm does not serve
        or (name in WITH_EVERY_SOURCE and precision == "fp32" and (source not in KIN or name == "finetune"))
    ]
    if source not in ("controlnet", "d4m") or name == "finetune"  # with the others, our small ones stand for them
]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("init_cls", "increment", "tasks"), [
    (1, 1, 6),  # one class at a time
    (3, 2, 3),  # large first task, short last one
    (6, 2, 1),  # everything at once
])  # fmt: skip
def test_learner_grows_by_any_increment(name, init_cls, increment, tasks, tmp_path):
    experiment = toy_experiment(name, tmp_path, init_cls=init_cls, increment=increment, init_epoch=1, epochs=1)
    results = experiment.learn_all()
    assert len(results["accuracy_matrix"]) == tasks
    assert experiment.learner.predict(experiment.data.test_images(range(6)))["cnn"].shape == (24, 6)


@pytest.mark.parametrize("name", ALL)
def test_learner_learns_the_first_task(name, tmp_path):
    long = {"init_epoch": 15, "com_round": 15}  # by whichever name the learner calls its epochs
    results = toy_experiment(name, tmp_path, **long, init_lr=0.05, limit_tasks=1).learn_all()
    assert results["accuracy_matrix"][0][0] >= 75


@pytest.fixture(scope="module", params=ALL)
def ended(request, tmp_path_factory):
    """A learner's run that has ended, its results, and the tasks whose real images were asked for in their order."""
    experiment = toy_experiment(request.param, tmp_path_factory.mktemp(request.param), epochs=1)
    asked, original = [], experiment.data.train_images
    experiment.data.train_images = lambda task: asked.append(task.index) or original(task)
    assert read_results(experiment.folder) is None
    return experiment, experiment.learn_all(), asked


def test_finished_run_is_known_as_finished(ended):
    experiment, results, _ = ended
    assert read_results(experiment.folder)["final_accuracy"] == results["final_accuracy"]


def test_another_seed_gives_other_bits(ended, tmp_path):
    first, other = ended[0], toy_experiment(ended[0].config.model_name, tmp_path, epochs=1, seed=8, limit_tasks=1)
    other.learn_all()
    assert not torch.equal(*(next(iter(each.learner.network.state_dict().values())) for each in (first, other)))


def test_learner_works_while_past_data_is_sealed_unless_it_is_an_upper_bound(ended):
    experiment, results, asked = ended
    assert experiment.data.upper_bound == results["upper_bound"] == experiment.learner.upper_bound
    assert experiment.learner.present.classes == list(range(0 if results["upper_bound"] else 4, 6))
    assert asked == sorted(asked)  # never an earlier task's


def test_memory_ledger_equals_the_bytes_on_disk(ended):
    experiment, results, _ = ended
    learner, ledger = experiment.learner, results["memory_bytes"]
    newest = experiment.folder / "checkpoints" / "task_2"
    assert ledger["network"] + ledger["old_branches"] == (newest / "network.safetensors").stat().st_size
    assert ledger["source"] == sum(path.stat().st_size for path in newest.glob("source/*"))
    bank = experiment.folder.parents[1] / "syn_image_toy_seed7"
    assert ledger["bank"] == sum(path.stat().st_size for path in bank.glob("task_*/*/*-*.png"))
    exemplars = (newest / "exemplars.safetensors").stat().st_size if learner.uses_exemplars else 0
    assert ledger["exemplars"] == (ledger["all_real_data"] if learner.upper_bound else exemplars)


# Two runs of one seed, in folders of their own, end with the same bits even where one of them is left and taken up.
@pytest.mark.parametrize(("name", "source", "precision"), INTERRUPTED)
def test_interrupted_run_ends_with_the_same_bits(name, source, precision, tmp_path, monkeypatch):
    short = {"init_epoch": 1, "disjoint_classifier_init_num_steps": 4, "pretrain_epochs": 1}  # of the first task
    keys = {"epochs": 2, **short, "precision": precision, "checkpoint_every": 2}
    whole = toy_experiment(name, tmp_path / "whole", source, **keys)
    expected = whole.learn_all()
    broken = toy_experiment(name, tmp_path / "broken", source, **keys)
    for stop in stops(whole):
        leave(broken, stop, monkeypatch)
        broken = toy_experiment(name, tmp_path / "broken", source, **keys)
    results = broken.learn_all()
    # A frozen backbone is asked again for what was kept in memory alone.
    same = without_cost if issubclass(LEARNERS[name], FrozenBackboneLearner) else without_clock
    assert same(results) == same(expected)
    networks = (experiment.learner.network.state_dict() for experiment in (broken, whole))
    torch.testing.assert_close(*networks, rtol=0, atol=0)


def stops(experiment):
    """Hooks in which a run is left; one whose later tasks train nothing cannot be left in a step."""
    trains = experiment.learner.train_config(experiment.data.task(1)).num_steps(steps_per_epoch=1) > 0
    return ["after_step"] * trains + ["after_training", "before_training"]


def leave(experiment, stop, monkeypatch):
    """Run until a hook of the second task or later is entered; a training is left after its first checkpoint."""
    learner = LEARNERS[experiment.config.model_name]
    original = getattr(learner, stop)

    def hook(self, place):  # a step or a task
        if (place.task.index, place.number) == (1, 3) if stop == "after_step" else place.index >= 1:
            raise Interrupted
        return original(self, place)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(learner, stop, hook)
        experiment.learn_all()


@pytest.mark.parametrize("replay", ["keep", "redraw"])
def test_run_goes_on_from_the_checkpoint_before_a_damaged_one(replay, tmp_path):
    keys = {"epochs": 1, "synth": {"name": "ddpm", **TINY_SOURCES["ddpm"], "replay": replay}}
    whole = toy_experiment("finetune", tmp_path / "whole", **keys)
    expected = whole.learn_all()
    broken = toy_experiment("finetune", tmp_path / "broken", **keys)
    write = broken._write
    broken._write = lambda: interrupt() if len(broken.results.accuracy_matrix) == 2 else write()
    with pytest.raises(Interrupted):
        broken.learn_all()
    newest = broken.folder / "checkpoints" / "task_1" / "network.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"?")
    results = toy_experiment("finetune", tmp_path / "broken", **keys).learn_all()
    assert without_clock(results) == without_clock(expected)
    assert "network.safetensors is missing or damaged" in (broken.folder / "log.txt").read_text()


# What the contract allows and no method here needs yet; each toy is one file in tests/support.
LEFT_IN = ("after_step", "after_training")


@pytest.fixture
def toys(monkeypatch):
    """Register the toy learner and sources for one test."""
    learners, sources = LEARNERS._load(), SOURCES._load()
    monkeypatch.setitem(learners, "toy_agem", AGEM)
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
        leave(toy_experiment(name, folder / "cut", source, **keys), stop, monkeypatch)
    results = toy_experiment(name, folder / "cut", source, **keys).learn_all()
    assert without_clock(results) == without_clock(expected)
    return whole, expected


@pytest.mark.parametrize("source", [None, "ddpm", "means"])
def test_agem_is_one_short_file(source, toys, tmp_path, monkeypatch):
    seen = []
    gradient = Step.gradient
    monkeypatch.setattr(Step, "gradient", lambda self, loss: seen.append(self.purpose) or gradient(self, loss))
    toy_run("toy_agem", source, tmp_path, monkeypatch, LEFT_IN if source is None else (), batch_size=2)
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
    toy_experiment("toy_agem", tmp_path, epochs=6).learn_all()
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
