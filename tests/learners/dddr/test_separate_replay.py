"""DDDR's classifier: which images stand where, and the terms of its loss."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torchvision.transforms import Resize
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from learners import LEARNERS
from learners.dddr.learner import DDDR
from learners.losses import distillation_loss, supervised_contrastive
from synth.base import ReplaySource
from synth.replay import Replay, replay_kind
from tests.support.toy import TINY_SOURCES, toy_experiment
from utils.data.batches import Batch
from utils.data.images import ImageSet
from utils.training.run import Run


class Painter(ReplaySource):
    """Learns classes before the classifier trains; an image's grey level is 10 times its class plus its copy."""

    def fit_before(self, task, images):
        self.fitted_classes |= set(task.classes)

    def generate(self, requests):
        grey = (10 * requests.labels + requests.copy).to(torch.uint8)
        return ImageSet.of(grey.view(-1, 1, 1, 1).expand(-1, 1, 8, 8), requests.labels)

    def save(self, directory): ...

    def load(self, directory): ...


def make_learner(folder, replay="keep", **keys):
    """A learner on the toy data, three painted images of each class; nothing is learned yet."""
    synth = {"name": "ddpm", **TINY_SOURCES["ddpm"], "replay": replay}
    experiment = toy_experiment("dddr", folder, synth=synth, **keys)
    config, data = experiment.config, experiment.data
    run = Run(experiment.folder, 7, experiment.runtime, progress=False)
    source = Painter(config.synth, run, data.num_classes, data.class_names, data.dataset)
    kind = replay_kind(config, Painter, None)
    return LEARNERS["dddr"](config, data, run, kind(config, source, data, run, folder / "bank"))


def begin(learner, index, prepare=True):
    """The task of this index after painted but untrained ones; ``prepare`` paints its own classes too."""
    for task in learner.data.tasks():
        learner.grow_network(task)
        learner.present = learner.data.train_images(task)
        if task.index < index or prepare:
            learner.replay.fit_before(task, learner.present)
        if task.index == index:
            learner.past = learner.replay.past(task) if index else ImageSet()
            return task
        learner.old_network = learner.network.frozen_copy()


def greys(images: ImageSet) -> list[int]:
    """The grey level of every painted file."""
    return [int(images.image(i).float().mean()) for i in range(len(images))]


@pytest.mark.parametrize(("index", "counts"), [(0, [11, 11, 0, 0, 0, 0]), (1, [0, 0, 12, 12, 0, 0])])
def test_painted_images_of_the_new_classes_join_the_real_ones(index, counts, tmp_path):
    learner = make_learner(tmp_path, base_cur_size=1, cur_size=2)
    task = begin(learner, index)
    assert (learner.present + learner.current_synthetic(task)).counts(6).tolist() == counts


@pytest.mark.parametrize("replay", ["keep", "redraw"])
def test_the_first_stored_images_are_the_ones_that_are_used(replay, tmp_path):
    learner = make_learner(tmp_path, replay, cur_size=2, pre_size=1)
    task = begin(learner, 1)
    assert greys(learner.current_synthetic(task)) == [20, 21, 30, 31]
    learner.batches(task)
    assert greys(learner.past) == [0, 10]
    assert learner.past.labels.tolist() == [0, 1]


def test_all_that_was_drawn_is_replayed_where_no_size_is_given(tmp_path):
    learner = make_learner(tmp_path)
    begin(learner, 2)
    assert greys(learner.past) == [10 * label + copy for label in range(4) for copy in range(3)]


@pytest.mark.parametrize("has_source", [True, False])  # one that learns after the training, or none
def test_where_nothing_was_painted_the_present_is_its_real_images(has_source, tmp_path):
    learner = make_learner(tmp_path, cur_size=2)
    if not has_source:
        learner.replay = Replay(learner.config, None, learner.data, learner.run, tmp_path)
    task = begin(learner, 1, prepare=False)
    assert learner.present.classes == [2, 3] and len(learner.current_synthetic(task)) == 0
    assert all((batch.replay is not None) == has_source for batch in learner.batches(task).epoch(0))


def test_replay_stands_in_batches_of_its_own(tmp_path):
    learner = make_learner(tmp_path, cur_size=2, batch_size=7, replay_batch_size=4)
    batches = list(learner.batches(begin(learner, 1)).epoch(0))
    assert [len(batch) for batch in batches] == [7, 7, 7, 3]
    assert {label for batch in batches for label in batch.labels.tolist()} == {2, 3}
    assert {label for batch in batches for label in batch.replay.labels.tolist()} == {0, 1}
    assert all(len(batch.replay) in (2, 4) for batch in batches)


def test_the_first_of_each_class_keep_their_place_over_several_parts():
    first = ImageSet.of(torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1), torch.tensor([1, 0, 1, 1]))
    second = ImageSet.of(torch.arange(4, 7, dtype=torch.uint8).view(3, 1, 1, 1), torch.tensor([0, 0, 2]))
    kept = (first + second).first_of_each(2)
    assert kept.labels.tolist() == [1, 0, 1, 0, 2]
    assert [int(kept.image(i)) for i in range(5)] == [0, 1, 2, 4, 6]
    assert len(ImageSet().first_of_each(2)) == 0


def randn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LOGITS, REPLAYED, OLD = randn(3, 4, seed=0), randn(5, 4, seed=1), randn(5, 2, seed=2)
LABELS, REPLAY_LABELS = torch.tensor([2, 3, 2]), torch.tensor([0, 1, 1, 0, 1])
NEW_ONES = F.cross_entropy(LOGITS[:, 2:], LABELS - 2)
OLD_ONES = F.cross_entropy(REPLAYED[:, :2], REPLAY_LABELS)
DISTILLED = distillation_loss(REPLAYED[:, :2], OLD, 2.0)


def terms_of(folder, replay, **keys):
    """The terms where the networks give fixed logits: four classes, two of them old."""
    learner = make_learner(folder, w_scl=0.0, **keys)
    learner.network = SimpleNamespace(features=lambda logits: logits, head=lambda logits: logits)
    learner.old_network = lambda images: OLD
    replayed = Batch(REPLAYED, REPLAY_LABELS, REPLAY_LABELS >= 0) if replay else None
    return learner.compute_loss(Batch(LOGITS, LABELS, LABELS < 0, replay=replayed), learner.data.task(1))


@pytest.mark.parametrize(("keys", "expected"), [
    # split: new and old classes compete among themselves
    ({}, {"cross_entropy": NEW_ONES, "replay": 0.5 * OLD_ONES, "distill": 10 * DISTILLED}),
    (
        {"replay_softmax": "joint", "w_ce_pre": 2.0, "w_kd": 0.0},
        {"cross_entropy": F.cross_entropy(LOGITS, LABELS), "replay": 2 * F.cross_entropy(REPLAYED, REPLAY_LABELS)},
    ),
    # distillation also works without the other term
    ({"w_ce_pre": 0.0, "w_kd": 1.0}, {"cross_entropy": NEW_ONES, "replay": 0 * OLD_ONES, "distill": DISTILLED}),
])  # fmt: skip
def test_new_classes_and_replayed_ones_have_terms_of_their_own(keys, expected, tmp_path):
    assert_close(terms_of(tmp_path, replay=True, **keys), expected)


def test_without_replay_the_cross_entropy_stands_alone(tmp_path):
    assert_close(terms_of(tmp_path, replay=False), {"cross_entropy": NEW_ONES})


def test_the_contrast_is_of_unit_projections_of_the_current_images_alone(tmp_path):
    learner = make_learner(tmp_path, w_scl=2.0)
    task, passes = begin(learner, 1), []
    batch = next(learner.batches(task).epoch(0))
    z = F.normalize(learner.network.projection(learner.network.features(batch.images)))
    learner.network.backbone.register_forward_pre_hook(lambda module, args: passes.append(len(args[0])))
    terms = learner.compute_loss(batch, task)
    assert passes == [16, 6]  # replayed images pass the network apart
    assert list(terms) == ["cross_entropy", "replay", "distill", "contrastive"]
    assert_close(terms["contrastive"], 2 * supervised_contrastive(z, batch.labels, 0.07))


def test_rounds_of_local_epochs_are_one_training_at_a_constant_rate(tmp_path):
    learner = make_learner(tmp_path, com_round=3, local_ep=5)
    config = learner.train_config(learner.data.task(1))
    assert config.num_steps(steps_per_epoch=2) == 30
    assert {config.learning_rate(step, 2) for step in range(30)} == {0.02}


def test_every_round_has_a_new_optimiser(tmp_path, monkeypatch):
    experiment, seen, original = toy_experiment("dddr", tmp_path, com_round=2, local_ep=2), [], DDDR.before_epoch

    def before_epoch(learner, step):
        before = len(step.optimizer.state)
        original(learner, step)
        seen.append((before > 0, len(step.optimizer.state) > 0))

    monkeypatch.setattr(DDDR, "before_epoch", before_epoch)
    learner, task = experiment.check(), next(iter(experiment.data.tasks()))
    learner.learn_task(task)
    assert seen == [(False, False), (True, True), (True, False), (True, True)]  # whether there is momentum


def test_drawn_images_are_resized_as_the_original_resizes_them(tmp_path):
    """By torchvision's Resize of a PIL image, which is bilinear."""
    drawn = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    kept = make_learner(tmp_path).transform.keep(drawn, training=True)
    assert_close(kept[0], pil_to_tensor(Resize(8)(to_pil_image(drawn[0]))), rtol=0, atol=1)
