"""Translation of features from classes with many images to classes with few: pure functions on tensors.

Kim et al., "M2m: Imbalanced Classification via Major-to-minor Translation", CVPR 2020, arXiv:2004.00431, which
translates images; that features are translated here is our design.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def source_chances(counts: Tensor, label: int, beta: float) -> Tensor:
    """Return Q(s|k), how likely each class s is what class k is translated from (M2m, section 3.3).

    Q is proportional to 1 - beta^max(n_s - n_k, 0): 0 for classes that are no larger than k.

    Args:
        counts: (K,), images per class.
        label: k.
        beta: in [0, 1); near 1, Q grows with the difference.

    Returns:
        float64 (K,), which sums to 1; all 0 where no class is larger.
    """
    chances = 1 - beta ** (counts - counts[label]).clamp(min=0).double()
    return chances / chances.sum().clamp(min=1e-12)


def translate(head: Callable[[Tensor], Tensor], z: Tensor, sources: Tensor, target: int, walk: tuple[int, float, float]
) -> Tensor:  # fmt: skip
    """Walk down CE(g(z), k) + lambda f_s(z) by steps of one length (M2m, Eq. 2).

    M2m has a frozen g and the f in training; here both are the head g of the trained classifier.

    Args:
        head: z to logits (N, num_seen).
        z: float (N, D), where to start.
        sources: int64 (N,), s: the class that each row comes from.
        target: k.
        walk: number of steps, their length, lambda.

    Returns:
        float (N, D).
    """
    steps, length, weight = walk
    targets = torch.full_like(sources, target)
    for _ in range(steps):
        z = z.detach().requires_grad_(True)
        logits = head(z)
        cost = F.cross_entropy(logits, targets, reduction="sum") + weight * logits.gather(1, sources[:, None]).sum()
        (gradient,) = torch.autograd.grad(cost, z)
        z = z - length * F.normalize(gradient, dim=1)
    return z.detach()
