"""Losses that several learners share. Pure functions on logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def distillation_loss(logits: Tensor, old_logits: Tensor, temperature: float) -> Tensor:
    """Compute the soft cross-entropy with the old network (Hinton et al. 2015, arXiv:1503.02531), as PyCIL uses it.

    Mean over the batch of -sum_k softmax(old / T)_k log softmax(new / T)_k, without the factor T^2.

    Args:
        logits: (B, K or more), of the trained network; its first K classes are those of the old one.
        old_logits: (B, K), of the frozen one.
        temperature: T > 0.
    """
    targets = torch.softmax(old_logits / temperature, dim=1)
    return -(targets * F.log_softmax(logits[:, : targets.shape[1]] / temperature, dim=1)).sum(1).mean()


def cross_entropy_from(first: int, logits: Tensor, labels: Tensor) -> Tensor:
    """Compute cross-entropy among the classes from ``first`` on.

    Args:
        first: class, 0 for all.
        logits: (B, num_seen).
        labels: (B,), in [first, num_seen).
    """
    return F.cross_entropy(logits[:, first:], labels - first)


def old_as_one_class(labels: Tensor, num_old: int) -> Tensor:
    """Return DER's auxiliary labels (arXiv:2103.16788, section 3.2): old classes are 0, new ones 1, 2, ..."""
    return (labels - num_old + 1).clamp(min=0)


def supervised_contrastive(z: Tensor, labels: Tensor, temperature: float = 0.07) -> Tensor:
    """Compute the supervised contrastive loss on one view (Khosla et al. 2020, arXiv:2004.11362, Eq. 2).

    An image without another of its class adds 0 and still counts in the mean, so a batch of one image gives 0.

    Args:
        z: (B, D), of unit length.
        labels: int64 (B,).
        temperature: > 0.
    """
    others = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    with torch.autocast(z.device.type, enabled=False):
        similarity = z.float() @ z.float().T / temperature
    similarity = similarity.masked_fill(~others, -1e9)  # finite, so that a row without others has a gradient
    positives = (labels[:, None] == labels[None]) & others
    log_share = similarity - similarity.logsumexp(1, keepdim=True)
    return -((log_share * positives).sum(1) / positives.sum(1).clamp(min=1)).mean()


def anchor_loss(features: Tensor, labels: Tensor, anchors: Tensor, anchor_labels: Tensor) -> Tensor:
    """Compute how far images are from the anchors of their classes (arXiv:2403.09857): a mean of 1 - cos.

    Each anchor of class k is compared with all images of class k in the batch; anchors count by the number of images
    that their class has, divided among the anchors of the class. Anchors get no gradient.

    Args:
        features: (B, D), of the batch.
        labels: int64 (B,).
        anchors: (A, D), every class of ``labels`` at least once: one each, or one for every image.
        anchor_labels: int64 (A,).
    """
    with torch.autocast(features.device.type, enabled=False):  # 1 - cos of near vectors needs all digits
        distance = 1 - F.normalize(anchors.detach(), eps=1e-6) @ F.normalize(features, eps=1e-6).T  # (A, B)
    same = (anchor_labels[:, None] == labels[None]).float()
    num_anchors = (anchor_labels[:, None] == anchor_labels[None]).sum(1, keepdim=True)  # of the anchor's class
    return (distance * same / num_anchors).sum() / len(labels)


def standard_normal_kl(mu: Tensor, sigma: Tensor, weights: Tensor) -> Tensor:
    """Compute KL(N(mu, sigma^2) || N(0, I)), summed over dimensions, weighted mean over rows.

    Args:
        mu, sigma: (R, K), sigma > 0.
        weights: (R,), what a row counts.
    """
    per_row = 0.5 * (mu.square() + sigma.square() - 2 * sigma.log() - 1).sum(1)
    return (per_row * weights).sum() / weights.sum()
