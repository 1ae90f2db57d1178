"""Losses that several learners share. Pure functions on logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def distillation_loss(logits: Tensor, old_logits: Tensor, temperature: float) -> Tensor:
    """Soft cross-entropy with the old network (Hinton et al. 2015, arXiv:1503.02531), as PyCIL and ESCORT use it.

    Mean over the batch of -sum_k softmax(old / T)_k log softmax(new / T)_k, without the factor T^2.

    Args:
        logits: (B, K), of the trained network, cut to the old network's classes.
        old_logits: (B, K), of the frozen one.
        temperature: T > 0.
    """
    targets = torch.softmax(old_logits / temperature, dim=1)
    return -(targets * F.log_softmax(logits / temperature, dim=1)).sum(1).mean()


def cross_entropy_from(first: int, logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy among the classes from ``first`` on: logits (B, num_seen), labels (B,) in [first, num_seen)."""
    return F.cross_entropy(logits[:, first:], labels - first)
