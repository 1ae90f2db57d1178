"""The life of ASP from session to session: checks 12 to 18 and 21 of its card, and what a base session goes through."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from learners.run.state import learner_state, restore_learner
from tests.support.tiny_asp import base_loss_as_tokens, prompted_as_tokens, tiny_vit_file
from tests.support.toy import TINY_LEARNERS, toy_experiment
from utils.data.batches import Batch, test_batches
from utils.data.images import ImageSet
from utils.training.fit import Step, Training

EXACT = {"rtol": 0, "atol": 0}


def make_learner(folder, **keys):
    """ASP on the toy data with a random ViT: four base classes, then one session of two classes with three shots."""
    file = tiny_vit_file(folder, TINY_LEARNERS["asp"]["convnet_type"], **TINY_LEARNERS["asp"]["backbone_args"])
    keys = {"backbone_weights": file, "pretrain_epochs": 0, "fs_epoch": 0, "precision": "fp32", **keys}
    keys = {"init_cls": 4, "kshot": 3, **keys}
    return toy_experiment("asp", folder, **keys).check()


def begin(learner, index=0):
    """The task of this index, those before it learned; the network has grown and training may begin."""
    for task in learner.data.tasks():
        if task.index < index:
            learner.learn_task(task)
            continue
        learner.grow_network(task)
        learner.present = learner.data.train_images(task)
        return task


def begin_epoch(learner, task, epoch=0):
    learner.before_epoch(Step(Training(learner.run, task, "train"), epoch, 0, []))


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


def snapshot(learner):
    return {name: value.clone() for name, value in learner.network.state_dict().items()}


# ---------------------------------------------------------------------- the base session


@pytest.mark.parametrize("batch_size", [16, 7])  # 40 images are not a multiple of it
def test_check_15_the_base_session_ends_with_means_over_all_its_images(batch_size, tmp_path):
    learner = make_learner(tmp_path, batch_size=batch_size)
    task = begin(learner)
    learner.learn_task(task)
    images = learner.data.train_images(task)
    features, mu = oracle(learner, images)
    assert_close(learner.backbone.average_prompt, mu.mean(0), rtol=0, atol=1e-5)
    assert_close(learner.network.head.weight.data, class_means(features, images.labels, range(4)), rtol=0, atol=1e-5)
    assert (features.norm(dim=1) > 1.5).all()  # so a mean of unit vectors would be another one


def test_check_14_the_base_session_trains_all_but_the_vit(tmp_path):
    learner = make_learner(tmp_path, tuned_epoch=10)
    task = begin(learner)
    before, vit = snapshot(learner), copy.deepcopy(learner.frozen.network.state_dict())
    learner.before_training(task)
    learner.train(task)
    assert [name for name, value in snapshot(learner).items() if torch.equal(value, before[name])] == []
    assert_close(learner.frozen.network.state_dict(), vit, **EXACT)
    tip = learner.backbone.tip
    assert_close(tip, tip[:, :1].expand_as(tip), rtol=0, atol=1e-6)


def test_check_21_anchors_are_the_images_nearest_to_their_class_means(tmp_path):
    learner = make_learner(tmp_path)
    task = begin(learner)
    learner.before_training(task)
    learner.backbone.tip.data.normal_()
    begin_epoch(learner, task)
    images = learner.data.train_images(task)
    expected = central_images(oracle(learner, images, torch.zeros(2, 3, 48))[0], images.labels)
    assert learner.anchors.tolist() == expected
    assert images.labels[expected].tolist() == [0, 1, 2, 3]
    assert_close(learner.anchor_images, views(learner, images)[expected], **EXACT)
    assert_close(learner.anchor_queries, learner.frozen(learner.anchor_images), rtol=0, atol=1e-5)


def central_images(features, labels) -> list[int]:
    """Of every class the image with the largest cosine to the mean of its features."""
    found = []
    for label, mean in enumerate(class_means(features, labels, range(4))):
        own = [i for i in range(len(labels)) if labels[i] == label]
        found.append(max(own, key=lambda i: F.cosine_similarity(features[i], mean, dim=0).item()))
    return found


def test_check_21_nearness_is_an_angle_and_lengths_count_in_the_mean(tmp_path, monkeypatch):
    learner = make_learner(tmp_path)
    task = begin(learner)
    learner.before_training(task)
    features = torch.randn(40, 48) * torch.logspace(-1, 1, 10).repeat(4)[:, None]
    monkeypatch.setattr(learner, "extract_features", lambda images: features)
    begin_epoch(learner, task)
    assert learner.anchors.tolist() == central_images(features, learner.base_images.labels)


def test_anchors_are_chosen_under_the_last_average_prompt_which_is_renewed_after_it(tmp_path, monkeypatch):
    learner, seen = make_learner(tmp_path), []
    task, extract, average = begin(learner), learner.extract_features, learner.backbone.average_prompt
    learner.before_training(task)
    last = torch.randn_like(average)
    average.copy_(last)
    monkeypatch.setattr(learner, "extract_features", lambda images: seen.append(average.clone()) or extract(images))
    begin_epoch(learner, task, 1)
    assert_close(seen, [last], **EXACT)
    assert_close(average, oracle(learner, learner.data.train_images(task))[1].mean(0), rtol=0, atol=1e-5)


# ---------------------------------------------------------------------- its loss


def base_batch(learner, task):
    """A batch with repeated classes, and one noise per image and per class's anchor, (B + 4, L * p * D)."""
    torch.manual_seed(3)
    learner.before_training(task)
    learner.backbone.tip.data.normal_()
    begin_epoch(learner, task)
    labels = torch.tensor([0, 2, 1, 2, 2, 0])
    batch = Batch(torch.rand(6, 3, 8, 8), labels, labels < 0)
    return batch, torch.randn(10, 2 * 144)


@pytest.mark.parametrize("deduplicate", [False, True])
def test_the_base_loss_is_the_cards_whether_anchors_come_once_or_as_copies(deduplicate, tmp_path, monkeypatch):
    learner = make_learner(tmp_path, deduplicate_anchors=deduplicate, anchor_lambda=0.5, kl_weight=0.01)
    batch, noise = base_batch(learner, begin(learner))
    picks = batch.labels.unique() if deduplicate else batch.labels
    drawn = torch.cat([noise[:6], noise[6 + picks]])  # equal for the copies of an anchor
    monkeypatch.setattr(learner, "noise", lambda num_images: drawn.view(num_images * 2, 144))
    terms = learner.base_loss(batch)
    noise = torch.cat([noise[:6], noise[6 + batch.labels]]).view(12, 2, 144)
    expected = base_loss_as_tokens(learner.network, batch.images, batch.labels, learner.anchor_images, noise)
    expected = {name: {"anchor": 0.5, "kl": 0.01}.get(name, 1) * term for name, term in expected.items()}
    assert_close(terms, expected, rtol=1e-5, atol=1e-5)
    parameters = list(learner.network.parameters())
    gradients, by_hand = (torch.autograd.grad(sum(loss.values()), parameters) for loss in (terms, expected))
    assert_close(gradients, by_hand, rtol=1e-3, atol=1e-5)


def test_copies_of_an_anchor_may_differ_in_their_noise(tmp_path, monkeypatch):
    learner = make_learner(tmp_path)
    batch, _ = base_batch(learner, begin(learner))
    noise = torch.randn(12, 2, 144)
    monkeypatch.setattr(learner, "noise", lambda num_images: noise.view(num_images * 2, 144))
    expected = base_loss_as_tokens(learner.network, batch.images, batch.labels, learner.anchor_images, noise)
    assert_close(learner.base_loss(batch)["anchor"], 0.1 * expected["anchor"], rtol=1e-4, atol=1e-6)


def test_anchors_once_per_class_are_fewer_images(tmp_path, monkeypatch):
    learner, sizes = make_learner(tmp_path, deduplicate_anchors=True), []
    batch, _ = base_batch(learner, begin(learner))
    prompted = learner.backbone.prompted
    monkeypatch.setattr(learner.backbone, "prompted", lambda x, *rest: sizes.append(len(x)) or prompted(x, *rest))
    learner.base_loss(batch)
    assert sum(sizes) == 6 + 3


@pytest.mark.parametrize(
    ("term", "moved"),
    [
        ("cross_entropy", {"backbone.tip", "f_mu", "f_sigma", "head.weight", "head.scale"}),
        ("anchor", {"backbone.tip", "f_mu", "f_sigma"}),
        ("kl", {"f_mu", "f_sigma"}),
    ],
)
def test_check_12_each_term_moves_its_own_parameters(term, moved, tmp_path):
    learner = make_learner(tmp_path)
    batch, _ = base_batch(learner, begin(learner))
    learner.base_loss(batch)[term].backward()
    found = {name for name, parameter in learner.network.named_parameters() if parameter.grad is not None}
    assert {name.split(".")[1] if ".f_" in name else name for name in found} == moved


@pytest.mark.parametrize(("perturb_var", "spread"), [(0.0, 0.0), (1.0, 1.0), (2.0, 2.0)])
def test_training_noise_is_scaled_by_perturb_var(perturb_var, spread, tmp_path):
    noise = make_learner(tmp_path, perturb_var=perturb_var).noise(50)
    assert noise.shape == (100, 144)
    assert noise.std().item() == pytest.approx(spread, rel=0.05)


# ---------------------------------------------------------------------- later sessions


def test_check_16_a_session_changes_the_average_prompt_and_new_rows_alone(tmp_path, monkeypatch):
    learner = make_learner(tmp_path)
    task = begin(learner, 1)
    before = snapshot(learner)
    monkeypatch.setattr("learners.base.fit", None)  # no step may be taken
    learner.learn_task(task)
    after = snapshot(learner)
    assert {name for name in after if not torch.equal(after[name], before[name])} == {
        "backbone.average_prompt",
        "head.weight",
    }
    assert_close(after["head.weight"][:4], before["head.weight"][:4], **EXACT)


@pytest.mark.parametrize("beta", [0.99, 0.5])
def test_check_17_the_average_prompt_moves_first_and_then_come_the_prototypes(beta, tmp_path):
    learner = make_learner(tmp_path, EMA_beta=beta)
    task = begin(learner, 1)
    old = learner.backbone.average_prompt.clone()
    learner.learn_task(task)
    shots = learner.data.train_images(task)
    features, mu = oracle(learner, shots)
    assert len(shots) == 6
    assert_close(learner.backbone.average_prompt, beta * old + (1 - beta) * mu.mean(0), rtol=0, atol=1e-6)
    assert_close(learner.network.head.weight[4:].data, class_means(features, shots.labels, (4, 5)), rtol=0, atol=1e-5)
    stale = class_means(oracle(learner, shots, old)[0], shots.labels, (4, 5))
    assert (learner.network.head.weight[4:] - stale).abs().max() > 2e-5


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


def test_inference_is_the_argmax_of_the_cosine_without_noise(tmp_path):
    learner = make_learner(tmp_path)
    learner.learn_task(begin(learner))
    images = learner.data.test_images(range(4))
    cosines = F.normalize(oracle(learner, images)[0]) @ F.normalize(learner.network.head.weight.data).T
    assert_close(learner.predict(images)["cnn"], learner.network.head.scale.detach() * cosines, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------- later sessions that train


def learned_session(folder, **keys):
    learner = make_learner(folder, fs_epoch=2, fs_lr=0.1, **keys)
    return learner, begin(learner, 1)


def test_prototypes_are_made_anew_after_a_session_that_trained(tmp_path):
    learner, task = learned_session(tmp_path)
    learner.learn_task(task)
    shots = learner.data.train_images(task)
    expected = class_means(oracle(learner, shots)[0], shots.labels, (4, 5))
    assert_close(learner.network.head.weight[4:].data, expected, rtol=0, atol=1e-5)


def test_trained_class_vectors_may_stay(tmp_path):
    learner, task = learned_session(tmp_path, prototypes="trained")
    learner.before_training(task)
    learner.train(task)
    before = snapshot(learner)
    learner.after_training(task)
    assert_close(snapshot(learner), before, **EXACT)


def test_generated_images_may_share_in_the_prototypes(tmp_path, monkeypatch):
    learner, task = learned_session(tmp_path, prototypes="mixed")
    shots, painted = learner.data.train_images(task), learner.data.test_images((4, 5))
    monkeypatch.setattr(learner, "current_synthetic", lambda task: painted)
    learner.learn_task(task)
    both = shots + painted
    expected = class_means(oracle(learner, both)[0], both.labels, (4, 5))
    assert_close(learner.network.head.weight[4:].data, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("refresh", [False, True])
def test_old_prototypes_are_made_anew_from_replay_where_that_is_wanted(refresh, tmp_path):
    learner, task = learned_session(tmp_path)
    learner.config = learner.config.model_copy(update={"refresh_old_prototypes": refresh})
    before = snapshot(learner)["head.weight"]
    learner.past = learner.data.test_images(range(4))
    learner.after_training(task)
    expected = class_means(oracle(learner, learner.past)[0], learner.past.labels, range(4)) if refresh else before[:4]
    assert_close(learner.network.head.weight[:4].data, expected, rtol=0, atol=1e-5)
