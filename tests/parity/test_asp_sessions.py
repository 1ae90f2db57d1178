"""The life of ASP from session to session: checks 12 to 18 and 21 of its card, and what a base session goes through."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from learners.run.state import learner_state, restore_learner
from tests.support.learned import snapshot
from tests.support.tiny_asp import base_loss_as_tokens, prompted_as_tokens, tiny_vit_file
from tests.support.toy import TINY_LEARNERS, toy_experiment
from utils.data.batches import Batch, test_batches
from utils.data.images import ImageSet
from utils.training.fit import Step

EXACT = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 0, "atol": 1e-5}


def make_learner(folder, **keys):
    """ASP on the toy data with a random ViT: four base classes, then one session of two classes with three shots."""
    file = tiny_vit_file(folder, TINY_LEARNERS["asp"]["convnet_type"], **TINY_LEARNERS["asp"]["backbone_args"])
    keys = {"backbone_weights": file, "pretrain_epochs": 0, "fs_epoch": 0, "precision": "fp32", **keys}
    return toy_experiment("asp", folder, init_cls=4, kshot=3, **keys).check()


def start(folder, index=0, **keys):
    """A learner, the task of this index, for which the network has grown, and its images; those before are learned."""
    learner = make_learner(folder, **keys)
    for task in learner.data.tasks():
        if task.index < index:
            learner.learn_task(task)
            continue
        learner.grow_network(task)
        learner.present = learner.data.train_images(task)
        return learner, task, learner.present


def start_base(folder, **keys):
    """A learner whose base session is about to begin its first epoch, and its task."""
    learner, task, _ = start(folder, **keys)
    learner.before_training(task)
    learner.backbone.tip.data.normal_()
    return learner, task


def begin_epoch(learner, task):
    learner.before_epoch(Step(learner.run, task, "train", epoch=0, number=0, parameters=[]))


def views(learner, images: ImageSet) -> torch.Tensor:
    return torch.cat(list(test_batches(images, learner.transform, 64, learner.run.device)))


@torch.no_grad()
def oracle(learner, images: ImageSet, average=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (N, D) and mu (N, L, p, D) of images one by one, with prompts as tokens; ``average`` replaces pbar."""
    net = copy.deepcopy(learner.backbone)
    net.average_prompt.copy_(net.average_prompt if average is None else average)
    rows = [prompted_as_tokens(net, x[None]) for x in views(learner, images)]
    return torch.cat([row[0] for row in rows]), torch.cat([row[1] for row in rows]).unflatten(2, (3, 48))


def class_means(features, labels, classes):
    return torch.stack([features[labels == label].mean(0) for label in classes])


@pytest.mark.parametrize("batch_size", [16, 7])  # 40 images are not a multiple of it
def test_check_15_the_base_session_ends_with_means_and_decides_by_the_cosine_to_them(batch_size, tmp_path):
    learner, task, images = start(tmp_path, batch_size=batch_size)
    learner.learn_task(task)
    features, mu = oracle(learner, images)
    head = learner.network.head
    assert_close(learner.backbone.average_prompt, mu.mean(0), **CLOSE)
    assert_close(head.weight.data, class_means(features, images.labels, range(4)), **CLOSE)
    assert (features.norm(dim=1) > 1.5).all()  # so a mean of unit vectors would be another one
    tests = learner.data.test_images(range(4))
    cosines = F.normalize(oracle(learner, tests)[0]) @ F.normalize(head.weight.data).T  # without noise
    assert_close(learner.predict(tests)["cnn"], head.scale.detach() * cosines, **CLOSE)


def test_check_14_the_base_session_trains_all_but_the_vit(tmp_path):
    learner, task, _ = start(tmp_path, tuned_epoch=10)
    before, vit = snapshot(learner.network), copy.deepcopy(learner.frozen.network.state_dict())
    learner.before_training(task)
    learner.train(task)
    assert [name for name, value in snapshot(learner.network).items() if torch.equal(value, before[name])] == []
    assert_close(learner.frozen.network.state_dict(), vit, **EXACT)
    tip = learner.backbone.tip
    assert_close(tip, tip[:, :1].expand_as(tip), rtol=0, atol=1e-6)


def central_images(features, labels) -> list[int]:
    """Of every class the image with the largest cosine to the mean of its features."""
    found = []
    for label, mean in enumerate(class_means(features, labels, range(4))):
        own = [i for i in range(len(labels)) if labels[i] == label]
        found.append(max(own, key=lambda i: F.cosine_similarity(features[i], mean, dim=0).item()))
    return found


def test_check_21_anchors_are_nearest_to_their_class_means_under_the_last_average_prompt(tmp_path, monkeypatch):
    learner, task = start_base(tmp_path)
    images, average, extract, seen = learner.present, learner.backbone.average_prompt, learner.extract_features, []
    last = average.normal_().clone()
    monkeypatch.setattr(learner, "extract_features", lambda images: seen.append(average.clone()) or extract(images))
    begin_epoch(learner, task)
    assert_close(seen, [last], **EXACT)
    expected = central_images(oracle(learner, images, last)[0], images.labels)
    assert learner.anchors.tolist() == expected
    assert images.labels[expected].tolist() == [0, 1, 2, 3]
    assert_close(learner.anchor_images, views(learner, images)[expected], **EXACT)
    assert_close(learner.anchor_queries, learner.frozen(learner.anchor_images), **CLOSE)
    assert_close(average, oracle(learner, images)[1].mean(0), **CLOSE)  # which is then renewed


def test_check_21_nearness_is_an_angle_and_lengths_count_in_the_mean(tmp_path, monkeypatch):
    learner, task = start_base(tmp_path)
    features = torch.randn(40, 48) * torch.logspace(-1, 1, 10).repeat(4)[:, None]
    monkeypatch.setattr(learner, "extract_features", lambda images: features)
    begin_epoch(learner, task)
    assert learner.anchors.tolist() == central_images(features, learner.base_images.labels)


def start_step(folder, **keys):
    """A learner in its first epoch, and a batch with repeated classes."""
    torch.manual_seed(3)
    learner, task = start_base(folder, **keys)
    begin_epoch(learner, task)
    labels = torch.tensor([0, 2, 1, 2, 2, 0])
    return learner, Batch(torch.rand(6, 3, 8, 8), labels, labels < 0)


# Copies of an anchor may differ in their noise.
@pytest.mark.parametrize(("deduplicate", "equal"), [(True, True), (False, True), (False, False)])
def test_the_base_loss_is_the_cards_whether_anchors_come_once_or_as_copies(deduplicate, equal, tmp_path, monkeypatch):
    learner, batch = start_step(tmp_path, deduplicate_anchors=deduplicate, anchor_lambda=0.5, kl_weight=0.01)
    picks, sizes, prompted = batch.labels.unique() if deduplicate else batch.labels, [], learner.backbone.prompted
    own, of_classes = torch.randn(10, 2 * 144).split([6, 4])
    of_anchors = of_classes[picks] if equal else torch.randn(6, 2 * 144)
    drawn = torch.cat([own, of_anchors])
    monkeypatch.setattr(learner, "noise", lambda num_images: drawn.view(num_images * 2, 144))
    monkeypatch.setattr(learner.backbone, "prompted", lambda x, *rest: sizes.append(len(x)) or prompted(x, *rest))
    terms = learner.base_loss(batch)
    assert sizes == [6, 3 if deduplicate else 6]
    noise = torch.cat([own, of_classes[batch.labels] if equal else of_anchors]).view(12, 2, 144)
    expected = base_loss_as_tokens(learner.network, batch.images, batch.labels, learner.anchor_images, noise)
    expected = {name: {"anchor": 0.5, "kl": 0.01}.get(name, 1) * term for name, term in expected.items()}
    assert_close(terms, expected, rtol=1e-5, atol=1e-5)
    parameters = list(learner.network.parameters())
    gradients, by_hand = (torch.autograd.grad(sum(loss.values()), parameters) for loss in (terms, expected))
    assert_close(gradients, by_hand, rtol=1e-3, atol=1e-5)


def test_check_12_each_term_moves_its_own_parameters(tmp_path):
    learner, batch = start_step(tmp_path)
    kl = {"f_mu", "f_sigma"}
    anchor = {"backbone.tip"} | kl
    moved = {"cross_entropy": {"head.weight", "head.scale"} | anchor, "anchor": anchor, "kl": kl}
    for term, loss in learner.base_loss(batch).items():
        learner.network.zero_grad(set_to_none=True)
        loss.backward(retain_graph=True)
        found = {name for name, parameter in learner.network.named_parameters() if parameter.grad is not None}
        assert {name.split(".")[1] if ".f_" in name else name for name in found} == moved[term]


def test_the_base_session_may_start_from_class_means_under_the_first_prompts(tmp_path):
    learner, task, images = start(tmp_path, head_start="means", head_scale=16.0)
    learner.before_training(task)
    features, mu = oracle(learner, images)
    means = torch.stack([features[images.labels == label].mean(0) for label in task.classes])
    assert_close(learner.network.head.weight.data, F.normalize(means), **CLOSE)
    assert_close(learner.backbone.average_prompt, mu.mean(0), **CLOSE)
    assert learner.network.head.scale.item() == 16
    assert make_learner(tmp_path / "published").network.head.scale.item() == 1


def test_training_noise_is_scaled_by_perturb_var(tmp_path):
    for perturb_var in (0.0, 1.0, 2.0):
        noise = make_learner(tmp_path / str(perturb_var), perturb_var=perturb_var).noise(50)
        assert noise.shape == (100, 144)
        assert noise.std().item() == pytest.approx(perturb_var, rel=0.05)


@pytest.mark.parametrize("beta", [0.99, 0.5])
def test_checks_16_and_17_the_average_prompt_moves_first_then_come_new_rows_alone(beta, tmp_path, monkeypatch):
    learner, task, shots = start(tmp_path, 1, EMA_beta=beta)
    before = snapshot(learner.network)
    old = before["backbone.average_prompt"]
    monkeypatch.setattr("learners.base.fit", None)  # no step may be taken
    learner.learn_task(task)
    after = snapshot(learner.network)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {"backbone.average_prompt", "head.weight"} and len(shots) == 6
    assert_close(after["head.weight"][:4], before["head.weight"][:4], **EXACT)
    features, mu = oracle(learner, shots)
    assert_close(after["backbone.average_prompt"], beta * old + (1 - beta) * mu.mean(0), rtol=0, atol=1e-6)
    assert_close(after["head.weight"][4:], class_means(features, shots.labels, (4, 5)), **CLOSE)
    stale = class_means(oracle(learner, shots, old)[0], shots.labels, (4, 5))
    assert (after["head.weight"][4:] - stale).abs().max() > 2e-5


def test_check_18_a_checkpoint_without_the_vit_predicts_the_same_bits(tmp_path):
    learner = make_learner(tmp_path / "a")
    for task in learner.data.tasks():
        learner.learn_task(task)
    tensors, state = learner_state(learner)
    copied = make_learner(tmp_path / "b")
    restore_learner(copied, tensors, state)
    images = learner.data.test_images(range(6))
    assert not any("vit" in name for name in tensors["network"])
    assert_close(copied.predict(images)["cnn"], learner.predict(images)["cnn"], **EXACT)


def start_session(folder, **keys):
    return start(folder, 1, fs_epoch=2, fs_lr=0.1, **keys)


@pytest.mark.parametrize("prototypes", ["real", "mixed"])  # mixed: generated images share in them
def test_prototypes_are_made_anew_after_a_session_that_trained(prototypes, tmp_path, monkeypatch):
    learner, task, images = start_session(tmp_path, prototypes=prototypes)
    if prototypes == "mixed":
        painted = learner.data.test_images((4, 5))
        monkeypatch.setattr(learner, "current_synthetic", lambda task: painted)
        images = images + painted
    learner.learn_task(task)
    expected = class_means(oracle(learner, images)[0], images.labels, (4, 5))
    assert_close(learner.network.head.weight[4:].data, expected, **CLOSE)


def test_trained_class_vectors_may_stay(tmp_path):
    learner, task, _ = start_session(tmp_path, prototypes="trained")
    learner.before_training(task)
    learner.train(task)
    before = snapshot(learner.network)
    learner.after_training(task)
    assert_close(snapshot(learner.network), before, **EXACT)


def test_old_prototypes_are_made_anew_from_replay_where_that_is_wanted(tmp_path):
    learner, task, _ = start_session(tmp_path)
    before = snapshot(learner.network)["head.weight"][:4]
    learner.past = learner.data.test_images(range(4))
    learner.after_training(task)
    assert_close(learner.network.head.weight[:4].data, before, **CLOSE)
    learner.config = learner.config.model_copy(update={"refresh_old_prototypes": True})
    learner.after_training(task)
    expected = class_means(oracle(learner, learner.past)[0], learner.past.labels, range(4))
    assert_close(learner.network.head.weight[:4].data, expected, **CLOSE)
