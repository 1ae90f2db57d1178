"""What tells one learner from another: losses against hand-written formulas, and which images they see."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from learners import LEARNERS
from learners.losses import distillation_loss
from learners.run.configure import build_config
from learners.run.experiment import Experiment
from models.incremental import IncrementalNet
from synth import SOURCES
from tests.support.learned import learned_toy
from tests.support.toy import TINY_SOURCES, toy_experiment, toy_raw
from utils.data.batches import Batch, ShuffledBatches
from utils.data.datasets import load_dataset
from utils.data.manager import Task
from utils.run.errors import ConfigError
from utils.run.folder import claim_folder, claim_machine
from utils.training.runtime import Runtime

LOGITS = torch.tensor([[1.0, 0.0, 2.0, -1.0], [0.5, 1.5, 0.0, 1.0]])
LABELS = torch.tensor([2, 3])
CROSS_ENTROPY, OF_NEW = F.cross_entropy(LOGITS, LABELS), F.cross_entropy(LOGITS[:, 2:], LABELS - 2)
OLD = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
DISTILL = distillation_loss(LOGITS[:, :2], OLD, 2.0)


def terms_of(name, folder, labels, task, **keys):
    """The loss of a learner whose networks answer fixed logits: four classes, two of them old; a batch of new ones."""
    learner = toy_experiment(name, folder, **keys).check()
    learner.network, learner.old_network = lambda images: LOGITS, lambda images: OLD
    return learner.compute_loss(Batch(torch.zeros(2, 3, 8, 8), labels, torch.zeros(2, dtype=torch.bool)), task)


@pytest.mark.parametrize(("name", "num_seen", "terms"), [
    ("lwf", 4, {"cross_entropy": OF_NEW, "distill": 3 * DISTILL}),  # new outputs alone, lambda 3
    ("icarl", 4, {"cross_entropy": CROSS_ENTROPY, "distill": DISTILL}),  # all outputs
    ("wa", 8, {"cross_entropy": 0.75 * CROSS_ENTROPY, "distill": 0.25 * DISTILL}),  # two old classes of eight
])  # fmt: skip
def test_distilling_learners_weigh_their_terms_as_pycil_does(name, num_seen, terms, tmp_path):
    task = Task(1, range(2, num_seen), tuple("cdefgh"[: num_seen - 2]))
    torch.testing.assert_close(terms_of(name, tmp_path, LABELS, task), terms)


@pytest.mark.parametrize(("loss_over", "zero"), [("new", True), ("all", False)])
def test_one_new_class_gives_finetune_no_loss_unless_all_outputs_compete(loss_over, zero, tmp_path):
    labels, task = torch.tensor([3, 3]), Task(1, range(3, 4), ("d",))
    assert (terms_of("finetune", tmp_path, labels, task, loss_over=loss_over)["cross_entropy"] == 0) == zero


@pytest.mark.parametrize("name", ["wa", "der", "memo"])
def test_new_classes_end_with_weights_as_long_as_old_ones(name, tmp_path):
    experiment = learned_toy(name, tmp_path, epochs=1)
    assert experiment.learner.network.align_new_weights(4) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("name", "keys", "per_class"), [
    ("icarl", {"memory_size": 12}, [2] * 6),  # a fixed total, shared
    ("icarl", {"fixed_memory": True, "memory_per_class": 3}, [3] * 6),  # a fixed number per class
    ("icarl", {"memory_size": 999}, [10] * 6),  # more than there are: all are kept
    ("icarl", {"memory_size": 5}, [0] * 6),  # fewer than classes
    ("replay", {"selection": "reservoir", "fixed_memory": True, "memory_per_class": 2}, [2] * 6),
    ("replay", {"selection": "reservoir", "memory_size": 12}, None),  # by chance, of whichever classes
])  # fmt: skip
def test_memory_keys_mean_what_they_mean_in_pycil(name, keys, per_class, tmp_path):
    experiment = learned_toy(name, tmp_path, init_epoch=1, epochs=1, **keys)
    kept = experiment.learner.memory.images.counts(6).tolist()
    assert kept == per_class if per_class else sum(kept) == 12


def test_nearest_mean_of_all_images_is_the_nearest_class_mean_classifier(tmp_path):
    experiment = learned_toy("icarl", tmp_path, epochs=1, init_cls=6, memory_size=999)
    learner, images = experiment.learner, experiment.data.train_images(experiment.data.task(0))
    unit = F.normalize(learner.extract_features(images))
    means = torch.stack([F.normalize(unit[images.labels == label].mean(0), dim=0) for label in range(6)])
    nearest = torch.cdist(unit, means).argmin(1)
    assert torch.equal(learner.predict(images)["nme"].argmax(1), nearest)


def test_replay_images_are_marked_in_the_batches(tmp_path):
    experiment = learned_toy("generative_replay", tmp_path, epochs=1)
    learner, task = experiment.learner, experiment.data.task(2)
    batches = learner.batches(task).epoch(0)
    seen = {pair for batch in batches for pair in zip(batch.labels.tolist(), batch.is_replay.tolist())}
    assert seen == {*((label, True) for label in range(4)), (4, False), (5, False)}


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
    config, _ = build_config(toy_raw("icarl", tmp_path, convnet_type="resnet18", init_epoch=1, epochs=1, **keys))
    runtime = Runtime(config.device, "fp32")
    claim_machine(claim_folder(config, "large", overwrite=False), runtime)
    experiment = Experiment(config, "large", 7, load_dataset("large", tmp_path), runtime)
    results = experiment.learn_all()
    stored = sum(path.stat().st_size for path in (tmp_path / "large" / "train").rglob("*.jpg"))
    assert results["memory_bytes"]["exemplars"] >= stored


def test_the_hooks_of_a_task_are_called_in_one_order(tmp_path, monkeypatch):
    called, experiment = [], toy_experiment("finetune", tmp_path, "ddpm")

    def noting(name, hook):
        def wrapper(*args):
            called.append(name)
            return hook(*args)

        return wrapper

    own = ("grow_network", "before_training", "batches", "after_training", "after_source_fit")
    way, fits = ("learned", "present", "past"), ("fit_before", "fit_after")
    for owner, hooks in ((LEARNERS["finetune"], own), (type(experiment.check().replay), way), (SOURCES["ddpm"], fits)):
        for hook in hooks:
            monkeypatch.setattr(owner, hook, noting(hook, getattr(owner, hook)))
    experiment.learn_all()
    first = [
        "grow_network", "fit_before", "learned", "present", "before_training", "batches", "after_training",
        "fit_after", "learned", "after_source_fit",
    ]  # fmt: skip
    assert called[:21] == [*first, *first[:5], "past", *first[5:]]


ONE_STEP = {
    "init_epoch": 1, "pretrain_epochs": 1, "tuned_epoch": 1, "com_round": 1, "disjoint_classifier_init_num_steps": 1,
    "batch_size": 19, "pretrain_batch_size": 19, "head_batch_size": 20, "precision": "fp32",
}  # fmt: skip


@pytest.mark.parametrize("name", LEARNERS.names())
def test_no_learner_trains_batch_norm_on_the_one_image_that_is_left(name, tmp_path, monkeypatch):
    monkeypatch.setattr(IncrementalNet, "least_batch", lambda network, side: 2)
    seen, share = [], ShuffledBatches.share
    monkeypatch.setattr(ShuffledBatches, "share", lambda self, pick: seen.append(len(pick)) or share(self, pick))
    learner = toy_experiment(name, tmp_path, **ONE_STEP).check()
    learner.replay.fit_after = lambda *task: None
    learner.learn_task(next(learner.data.tasks()))  # of twenty images
    # GUIDE leaves out what does not fill a batch.
    assert set(seen) == ({19} if "guide" in name else {20})


@pytest.mark.parametrize(
    ("name", "key"), [("finetune", "batch_size"), ("dddr", "replay_batch_size"), ("guide", "batch_size")]
)
def test_batches_of_one_image_are_refused_at_once_where_batch_norm_cannot_take_them(name, key, tmp_path, monkeypatch):
    monkeypatch.setattr(IncrementalNet, "least_batch", lambda network, side: 2)
    with pytest.raises(ConfigError, match=f"^{key}=1: BatchNorm of this network cannot train on one image alone; take"):
        toy_experiment(name, tmp_path, **{key: 1}).check()


def test_batches_of_one_image_are_trained_where_the_maps_leave_batch_norm_several_values(tmp_path):
    keys = {"init_epoch": 1, "limit_tasks": 1, "batch_size": 1}
    assert toy_experiment("finetune", tmp_path, **keys).learn_all()["finished"]
