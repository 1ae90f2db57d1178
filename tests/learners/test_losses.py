"""Losses that learners share, against closed forms, loops and torch's own distributions."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from learners.losses import (
    anchor_loss,
    cross_entropy_from,
    distillation_loss,
    standard_normal_kl,
    supervised_contrastive,
)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def contrast_by_hand(z: list[list[float]], labels: list[int], temperature: float) -> float:
    """The formula with loops: mean over i of the mean over its positives p of -log softmax_{j != i}(z_i z_j / T)_p."""
    similarity = [[sum(a * b for a, b in zip(u, v)) / temperature for v in z] for u in z]
    total = 0.0
    for i, own in enumerate(labels):
        others = [j for j in range(len(z)) if j != i]
        positives = [j for j in others if labels[j] == own]
        log_sum = math.log(sum(math.exp(similarity[i][j]) for j in others)) if others else 0.0
        total -= sum(similarity[i][p] - log_sum for p in positives) / max(1, len(positives))
    return total / len(z)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("labels", [[0, 1, 0, 2, 1, 0], [3, 3, 3, 3, 3, 3], [0, 1, 2, 3, 4, 4], [0, 0, 1]])
def test_supervised_contrast_is_its_closed_form_in_which_lone_images_count(labels, temperature):
    z = F.normalize(randn(len(labels), 5).double())
    loss = supervised_contrastive(z, torch.tensor(labels), temperature)
    assert loss.item() == pytest.approx(contrast_by_hand(z.tolist(), labels, temperature), abs=2e-5)


@pytest.mark.parametrize("size", [1, 6])
def test_images_without_another_of_their_class_give_no_contrast_and_a_finite_gradient(size):
    x = randn(size, 5).requires_grad_()
    loss = supervised_contrastive(F.normalize(x), torch.arange(size))
    loss.backward()
    assert loss.item() == 0
    assert not x.grad.any() and x.grad.isfinite().all()


def test_contrast_keeps_its_digits_under_autocast():
    z, labels = F.normalize(randn(8, 16)), torch.arange(8) % 3
    expected = supervised_contrastive(z, labels)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(supervised_contrastive(z, labels), expected, rtol=0, atol=0)


def test_distillation_less_the_teachers_entropy_is_the_divergence():
    student, teacher = randn(5, 4), randn(5, 4, seed=1)
    target = (teacher / 2).softmax(1)
    entropy = -(target * target.log()).sum(1).mean()
    divergence = F.kl_div((student / 2).log_softmax(1), target, reduction="batchmean")
    assert_close(distillation_loss(student, teacher, 2.0) - entropy, divergence)


def test_raising_an_old_logit_of_a_current_image_leaves_the_split_cross_entropy_unchanged():
    logits, labels = randn(5, 6), torch.tensor([4, 5, 4, 5, 5])
    raised = logits.clone()
    raised[2, 1] += 100
    assert cross_entropy_from(4, raised, labels) == cross_entropy_from(4, logits, labels)
    assert cross_entropy_from(0, raised, labels) > cross_entropy_from(0, logits, labels)


LABELS = torch.tensor([0, 1, 1, 2, 3, 0])


def mean_distance(features, own_anchors):
    """Plain mean of 1 - cos over the images, each to the anchor of its class."""
    cosines = [F.cosine_similarity(f, a, dim=0, eps=1e-6) for f, a in zip(features, own_anchors)]
    return torch.stack([1 - cosine for cosine in cosines]).mean()


@pytest.mark.parametrize("picks", [torch.arange(4), LABELS])  # one anchor per class, or one copy per image
def test_with_equal_copies_the_anchor_loss_is_the_mean_distance_to_the_own_anchor(picks):
    features, of_class = randn(6, 5), randn(4, 5, seed=1)
    loss = anchor_loss(features, LABELS, of_class[picks], picks)
    assert_close(loss, mean_distance(features, of_class[LABELS]))
    multiples = torch.tensor([[0.1], [2.0], [7.0], [1.0], [30.0], [0.5]]) * of_class[LABELS]
    assert_close(anchor_loss(multiples, LABELS, of_class[picks], picks), torch.tensor(0.0), rtol=0, atol=1e-6)


def test_unequal_copies_of_an_anchor_are_each_compared_with_all_images_of_their_class():
    features, copies = randn(6, 5), randn(6, 5, seed=1)
    by_loop = torch.zeros(())
    for b in range(6):
        mates = [j for j in range(6) if LABELS[j] == LABELS[b]]
        by_loop += mean_distance(features[mates], copies[b].expand(len(mates), -1)) / 6
    assert_close(anchor_loss(features, LABELS, copies, LABELS), by_loop)


def test_anchors_get_no_gradient():
    features, anchors = randn(6, 5).requires_grad_(), randn(4, 5, seed=1).requires_grad_()
    anchor_loss(features, LABELS, anchors, torch.arange(4)).backward()
    assert anchors.grad is None and features.grad.any()


def test_the_divergence_of_prompts_is_that_of_torchs_distributions_weighted_by_row():
    mu, sigma, weights = randn(7, 5), randn(7, 5, seed=1).exp(), torch.tensor([1.0, 3.0, 0.0, 1.0, 0.5, 2.0, 1.0])
    per_row = kl_divergence(Normal(mu, sigma), Normal(0.0, 1.0)).sum(1)
    assert_close(standard_normal_kl(mu, sigma, torch.ones(7)), per_row.mean())
    assert_close(standard_normal_kl(mu, sigma, weights), (weights * per_row).sum() / weights.sum())
