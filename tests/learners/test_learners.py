"""What tells one learner from another: losses against hand-written formulas, and which images they see."""

import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from learners import LEARNERS
from learners.losses import cross_entropy_from, distillation_loss
from learners.run.configure import build_config
from learners.run.experiment import Experiment
from synth import SOURCES
from synth.replay import Replay
from tests.support.toy import TINY_SOURCES, toy_experiment, toy_raw
from utils.data.batches import Batch
from utils.data.datasets import load_dataset
from utils.data.manager import Task
from utils.run.folder import claim_folder, claim_machine
from utils.training.run import Run
from utils.training.runtime import Runtime

LOGITS = torch.tensor([[1.0, 0.0, 2.0, -1.0], [0.5, 1.5, 0.0, 1.0]])
OLD = torch.tensor([[2.0, 0.0], [0.0, 1.0]])


def test_distillation_is_the_soft_cross_entropy_without_temperature_squared():
    loss = distillation_loss(LOGITS[:, :2], OLD, 2.0)
    by_hand = 0.0
    for new, old in zip(LOGITS[:, :2].tolist(), OLD.tolist()):
        weights = [math.exp(value / 2) for value in old]
        log_total = math.log(sum(math.exp(value / 2) for value in new))
        by_hand -= sum(w / sum(weights) * (value / 2 - log_total) for w, value in zip(weights, new)) / 2
    assert loss.item() == pytest.approx(by_hand, abs=1e-6)


def test_distillation_is_the_entropy_of_the_old_network_where_both_agree():
    target = (OLD / 2).softmax(1)
    entropy = -(target * target.log()).sum(1).mean()
    torch.testing.assert_close(distillation_loss(OLD, OLD, 2.0), entropy)


def test_cross_entropy_of_new_classes_ignores_old_outputs():
    labels = torch.tensor([2, 3])
    changed = LOGITS.clone()
    changed[:, :2] += 100
    assert cross_entropy_from(2, LOGITS, labels) == cross_entropy_from(2, changed, labels)


def learner_between_tasks(name, tmp_path, **keys):
    """A learner whose networks answer fixed logits: four classes, two of them old; and a batch of new ones."""
    learner = make_learner(toy_experiment(name, tmp_path, **keys))
    learner.network, learner.old_network = lambda images: LOGITS, lambda images: OLD
    batch = Batch(torch.zeros(2, 3, 8, 8), torch.tensor([2, 3]), torch.zeros(2, dtype=torch.bool))
    return learner, batch


def make_learner(experiment):
    run = Run(experiment.folder, 7, experiment.runtime, progress=False)
    replay = Replay(experiment.config, None, experiment.data, run, experiment.folder)
    return LEARNERS[experiment.config.model_name](experiment.config, experiment.data, run, replay)


SECOND = Task(1, range(2, 4), ("c", "d"))


@pytest.mark.parametrize(
    ("name", "cross_entropy", "weight"),
    [
        ("lwf", F.cross_entropy(LOGITS[:, 2:], torch.tensor([0, 1])), 3.0),  # new outputs alone, lambda 3
        ("icarl", F.cross_entropy(LOGITS, torch.tensor([2, 3])), 1.0),  # all outputs
    ],
)
def test_distilling_learners_weigh_their_terms_as_pycil_does(name, cross_entropy, weight, tmp_path):
    learner, batch = learner_between_tasks(name, tmp_path)
    terms = learner.compute_loss(batch, SECOND)
    torch.testing.assert_close(terms["cross_entropy"], cross_entropy)
    torch.testing.assert_close(terms["distill"], weight * distillation_loss(LOGITS[:, :2], OLD, 2.0))


def test_weight_aligning_weighs_its_terms_by_the_share_of_old_classes(tmp_path):
    learner, batch = learner_between_tasks("wa", tmp_path)
    terms = learner.compute_loss(batch, Task(1, range(2, 8), tuple("cdefgh")))  # two old classes of eight
    torch.testing.assert_close(terms["cross_entropy"], 0.75 * F.cross_entropy(LOGITS, torch.tensor([2, 3])))
    torch.testing.assert_close(terms["distill"], 0.25 * distillation_loss(LOGITS[:, :2], OLD, 2.0))


@pytest.mark.parametrize("name", ["wa", "der", "memo"])
def test_new_classes_end_with_weights_as_long_as_old_ones(name, tmp_path):
    experiment = toy_experiment(name, tmp_path, epochs=1)
    experiment.learn_all()
    assert experiment.learner.network.align_new_weights(4) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("loss_over", "zero"), [("new", True), ("all", False)])
def test_one_new_class_gives_finetune_no_loss_unless_all_outputs_compete(loss_over, zero, tmp_path):
    learner, batch = learner_between_tasks("finetune", tmp_path, loss_over=loss_over)
    batch.labels[:] = 3
    loss = learner.compute_loss(batch, Task(1, range(3, 4), ("d",)))["cross_entropy"]
    assert (loss == 0) == zero


@pytest.mark.parametrize(
    ("keys", "per_class"),
    [
        ({"memory_size": 12}, [2] * 6),  # a fixed total, shared
        ({"fixed_memory": True, "memory_per_class": 3}, [3] * 6),  # a fixed number per class
        ({"memory_size": 999}, [10] * 6),  # more than there are: all are kept
        ({"memory_size": 5}, [0] * 6),  # fewer than classes
    ],
)
def test_memory_keys_mean_what_they_mean_in_pycil(keys, per_class, tmp_path):
    experiment = toy_experiment("icarl", tmp_path, epochs=1, **keys)
    experiment.learn_all()
    assert experiment.learner.memory.images.counts(6).tolist() == per_class


@pytest.mark.parametrize(
    ("keys", "total"), [({"memory_size": 12}, 12), ({"fixed_memory": True, "memory_per_class": 2}, 12)]
)
def test_reservoir_keeps_its_size(keys, total, tmp_path):
    experiment = toy_experiment("replay", tmp_path, epochs=1, selection="reservoir", **keys)
    experiment.learn_all()
    assert len(experiment.learner.memory.images) == total


def test_nearest_mean_of_all_images_is_the_nearest_class_mean_classifier(tmp_path):
    experiment = toy_experiment("icarl", tmp_path, epochs=1, init_cls=6, memory_size=999)
    experiment.learn_all()
    learner, images = experiment.learner, experiment.data.train_images(experiment.data.task(0))
    unit = F.normalize(learner.extract_features(images))
    means = torch.stack([F.normalize(unit[images.labels == label].mean(0), dim=0) for label in range(6)])
    nearest = torch.cdist(unit, means).argmin(1)
    assert torch.equal(learner.predict(images)["nme"].argmax(1), nearest)


def test_joint_trains_on_every_class_seen(tmp_path):
    experiment = toy_experiment("joint", tmp_path, epochs=1)
    results = experiment.learn_all()
    assert experiment.learner.present.classes == list(range(6))
    assert results["upper_bound"] is True


def test_replay_images_are_marked_in_the_batches(tmp_path):
    experiment = toy_experiment("generative_replay", tmp_path, epochs=1)
    experiment.learn_all()
    learner, task = experiment.learner, experiment.data.task(2)
    batches = learner.batches(task)
    rows = torch.cat([torch.stack([batch.labels, batch.is_replay.long()], 1) for batch in batches.epoch(0)])
    assert set(rows[rows[:, 1] == 1][:, 0].tolist()) == {0, 1, 2, 3} and set(rows[rows[:, 1] == 0][:, 0].tolist()) == {
        4,
        5,
    }


def test_redraw_draws_every_old_class_before_every_task(tmp_path):
    synth = {"name": "ddpm", **TINY_SOURCES["ddpm"], "replay": "redraw"}
    experiment = toy_experiment("finetune", tmp_path, epochs=1, synth=synth)
    results = experiment.learn_all()
    bank = tmp_path / "outputs" / "syn_image_toy_seed7"
    folders = sorted(str(path.relative_to(bank)) for path in bank.glob("task_*/redraw_*"))
    assert folders == ["task_0/redraw_1", "task_0/redraw_2", "task_1/redraw_2"]
    assert results["memory_bytes"]["bank"] == 0


def test_large_images_from_files_go_through_the_same_life(tmp_path):
    """Files of mixed size, decoded by workers, exemplars kept as paths."""
    for split, name, index in ((s, n, i) for s in ("train", "test") for n in "ab" for i in range(3)):
        path = tmp_path / "large" / split / name / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L" if index else "RGB", (90 + index, 80), 60 * index).save(path)
    keys = {"dataset": "large", "init_cls": 1, "increment": 1, "data_dir": str(tmp_path), "num_workers": 0}
    config, _ = build_config(toy_raw("icarl", tmp_path, convnet_type="resnet18", epochs=1, **keys))
    runtime = Runtime(config.device, "fp32")
    claim_machine(claim_folder(config, "large", overwrite=False), runtime)
    experiment = Experiment(config, "large", 7, load_dataset("large", tmp_path), runtime)
    results = experiment.learn_all()
    stored = sum(path.stat().st_size for path in (tmp_path / "large" / "train").rglob("*.jpg"))
    assert results["memory_bytes"]["exemplars"] >= stored


def test_the_hooks_of_a_task_are_called_in_one_order(tmp_path, monkeypatch):
    called = []
    experiment = toy_experiment("finetune", tmp_path, "ddpm")
    replay = experiment.check().replay
    own = ("grow_network", "before_training", "batches", "after_training", "after_source_fit")
    way = ("learned", "present", "past")
    fits = ("fit_before", "fit_after")
    for owner, hooks in ((LEARNERS["finetune"], own), (type(replay), way), (SOURCES["ddpm"], fits)):
        for hook in hooks:
            monkeypatch.setattr(owner, hook, recorded(called, hook, getattr(owner, hook)))
    experiment.learn_all()
    first = [
        "grow_network", "fit_before", "learned", "present", "before_training", "batches", "after_training",
        "fit_after", "learned", "after_source_fit",
    ]  # fmt: skip
    assert called[:10] == first
    assert called[10:21] == [*first[:5], "past", *first[5:]]


def recorded(called, name, hook):
    """The hook, which also notes its name."""

    def wrapper(*args):
        called.append(name)
        return hook(*args)

    return wrapper
