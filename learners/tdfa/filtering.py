"""Which generated features are believed: pure functions on features. The rule is our design; see `learner.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from learners.memory import class_mean

FEW = 20  # images below which a feature is not measured from a prototype that it is part of


def distance_range(features: Tensor, low: float, high: float) -> Tensor:
    """Return the quantiles of a class's cosine distances to its prototype, float (2,).

    Of fewer than 20 features each is measured from the prototype of the others, for it would pull its own near.

    Args:
        features: (N, D), real ones of the class; a single one has no distance, and the range is not a number.
        low, high: in [0, 1].
    """
    unit = F.normalize(features, dim=1)
    if len(unit) == 1:
        return torch.full((2,), torch.nan)
    prototypes = unit.mean(0) if len(unit) >= FEW else unit.sum(0) - unit  # (D,) or (N, D)
    return (1 - F.cosine_similarity(unit, prototypes.expand_as(unit), dim=1)).quantile(torch.tensor([low, high]))


def class_ranges(features: Tensor, labels: Tensor, classes: range, low: float, high: float) -> Tensor:
    """Return the range of every class, float (K, 2); a class of one image has the mean of the others."""
    ranges = torch.stack([distance_range(features[labels == label], low, high) for label in classes])
    others = ranges.nanmean(0).nan_to_num(0).where(~ranges.isnan().all(0), torch.tensor([0.0, 2.0]))
    return ranges.where(~ranges.isnan(), others)


def believable(features: Tensor, labels: Tensor, prototypes: Tensor, ranges: Tensor, margin: float) -> Tensor:
    """Say which features lie as far from their prototype as real ones do, and nowhere nearer to another's.

    Args:
        features: (N, D).
        labels: int64 (N,).
        prototypes: (K, D), of all classes, see `learners.memory.class_mean`.
        ranges: (K, 2), see `class_ranges`.
        margin: another prototype may be nearer by this share of the own distance.

    Returns:
        bool (N,).
    """
    distances = (1 - F.normalize(features, dim=1) @ prototypes.T).clamp(0, 2)  # (N, K); without rounding's excess
    own = distances.gather(1, labels[:, None])[:, 0]
    return (own >= ranges[labels, 0]) & (own <= ranges[labels, 1]) & (distances.min(1).values >= (1 - margin) * own)


def prototypes_of(features: Tensor, labels: Tensor, classes: range) -> dict[int, Tensor]:
    """Return the mean direction of every class, (D,)."""
    return {label: class_mean(features[labels == label]) for label in classes}
