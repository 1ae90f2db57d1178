"""The loss that balances classes: the noise under a label is drawn toward the noise under another.

Qin et al., "Class-Balancing Diffusion Models", CVPR 2023, arXiv:2305.00562.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

# (rows, labels) to eps: which images of the batch, int64 (R,), under which labels, int64 (R,); -1 is no class.
Predict = Callable[[Tensor, Tensor], Tensor]


class Balance(NamedTuple):
    """How strongly two labels are drawn together.

    Attributes:
        weight: w_t = tau t / T of each image, (B,). The paper's tau multiplies t itself, so it is tau / T here.
        commitment: gamma, the share of the term that moves the prediction under the other label.
    """

    weight: Tensor
    commitment: float = 0.25


def class_prior(labels: Tensor, num_classes: int, kind: Literal["train", "uniform"]) -> Tensor:
    """Return the distribution that other labels are drawn from, float (K,), a class without images having 0.

    Args:
        labels: int64 (N,), of all training images.
        num_classes: K.
        kind: "train" is the share of the images, "uniform" the same for every class that has some.
    """
    counts = torch.bincount(labels.cpu(), minlength=num_classes)
    counts = counts.sign() if kind == "uniform" else counts
    return counts / counts.sum()


def balancing_loss(h: Tensor, other: Tensor, weight: Tensor, commitment: float) -> Tensor:
    """Compute mean w_t (h - sg(h'))^2 + gamma mean w_t (sg(h) - h')^2, where sg passes no gradient; a scalar.

    Args:
        h: eps under the true labels, (R, C, H, W).
        other: h', eps under the other labels.
        weight: w_t, (R,).
        commitment: gamma.
    """
    weight = weight.view(-1, *[1] * (h.ndim - 1))
    towards = (weight * (h - other.detach()).square()).mean()
    return towards + commitment * (weight * (h.detach() - other).square()).mean()


def class_balanced_loss(predict: Predict, eps: Tensor, labels: Tensor, others: Tensor, kept: Tensor,
                        balance: Balance) -> dict[str, Tensor]:  # fmt: skip
    """Compute the noise prediction error and, of images with a label, the balancing loss, as named terms.

    Both predictions come from one call, for two of half the size take longer.

    Args:
        predict: eps of images of the batch under labels.
        eps: noise in the images, (B, C, H, W).
        labels: int64 (B,), -1 where the label is hidden.
        others: y', int64 (B,).
        kept: which rows have a label, int64 (R,); of others the balancing loss is 0. R = 0 leaves it out.
        balance: weights of the balancing loss.
    """
    rows = torch.arange(len(eps), device=eps.device)
    predicted = predict(torch.cat([rows, kept]), torch.cat([labels, others[kept]])).float()
    h, other = predicted[: len(eps)], predicted[len(eps) :]
    terms = {"mse": (h - eps).square().mean()}
    if len(kept):
        balancing = balancing_loss(h[kept], other, balance.weight[kept], balance.commitment)
        terms["balancing"] = balancing * (len(kept) / len(eps))  # a mean over the whole batch
    return terms
