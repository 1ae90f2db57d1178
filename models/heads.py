"""Classifier heads that gain rows as classes come. All start without any class."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Head(nn.Module):
    """logits = W f with class vectors as rows of ``weight``, float (num_classes, D).

    Attributes:
        spread: new rows are uniform in +-sqrt(spread / D). Here as those of ``torch.nn.Linear``.
    """

    spread = 1

    def __init__(self, num_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(0, num_features))
        self.register_parameter("bias", None)

    @property
    def num_features(self) -> int:
        return self.weight.shape[1]

    @property
    def num_classes(self) -> int:
        return self.weight.shape[0]

    def grow(self, num_classes: int, generator: torch.Generator | None = None) -> None:
        """Add rows up to a total of ``num_classes``; the old rows keep every bit.

        Parameters are replaced, so make the optimiser afterwards.

        Args:
            num_classes: the new total, at least the present one.
            generator: CPU generator of the new rows; None draws from torch's global one.
        """
        assert num_classes >= self.num_classes, f"a head of {self.num_classes} classes cannot shrink to {num_classes}"
        rows = self._draw(num_classes - self.num_classes, self.weight.shape[1], generator)
        self.weight = nn.Parameter(torch.cat([self.weight.data, rows]))

    def widen(self, num_features: int, generator: torch.Generator | None = None) -> None:
        """Take longer features: add columns up to a total of ``num_features``; the old columns keep every bit.

        New entries start as those of a new row of the new length. Parameters are replaced, as by `grow`.

        Args:
            num_features: the new D, at least the present one.
            generator: as for `grow`.
        """
        assert num_features >= self.num_features, f"features of {self.num_features} cannot shrink to {num_features}"
        rows = self._draw(self.num_classes, num_features, generator)
        rows[:, : self.num_features] = self.weight.data
        self.weight = nn.Parameter(rows)

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, D) to logits (B, num_classes)."""
        return F.linear(features, self.weight, self.bias)

    def _draw(self, count: int, num_features: int, generator: torch.Generator | None) -> Tensor:
        bound = math.sqrt(self.spread / num_features)
        # Drawn on the CPU: a seed then means the same rows on every device.
        return nn.init.uniform_(torch.empty(count, num_features), -bound, bound, generator).to(self.weight)


class LinearHead(Head):
    """logits = W f + b; rows start Kaiming-uniform for a linear layer, biases at zero, as in PyCIL."""

    spread = 3

    def __init__(self, num_features: int):
        super().__init__(num_features)
        self.bias = nn.Parameter(torch.empty(0))

    def grow(self, num_classes: int, generator: torch.Generator | None = None) -> None:
        """Add rows and zero biases up to a total of ``num_classes``; see `Head.grow`."""
        super().grow(num_classes, generator)
        self.bias = nn.Parameter(F.pad(self.bias.data, (0, num_classes - len(self.bias))))


class CosineHead(Head):
    """logits = s * cos(w, f) with a learned scale s (Hou et al., LUCIR, CVPR 2019, Eq. 4); rows start as in PyCIL.

    Args:
        num_features: D.
        scale: where s starts.
    """

    def __init__(self, num_features: int, scale: float = 1.0):
        super().__init__(num_features)
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, D) of any length to logits (B, num_classes) in [-s, s]."""
        return self.scale * F.linear(F.normalize(features), F.normalize(self.weight))


# Without a bias as in Cywinski et al. (arXiv:2403.03938).
HEADS = {"linear": LinearHead, "cosine": CosineHead, "plain": Head}
