"""A backbone with a head that grows."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.heads import Head
from utils.data.batches import Mixed
from utils.training.ledger import counted


class IncrementalNet(nn.Module):
    """The classifier of every learner.

    Args:
        backbone: has ``num_features`` = D and maps float (B, 3, H, W) to (B, D).
        head: built for D features; it has no class before the first `grow`.
    """

    def __init__(self, backbone: nn.Module, head: Head):
        super().__init__()
        assert backbone.num_features == head.num_features
        self.backbone = backbone
        self.head = head

    @property
    def num_classes(self) -> int:
        """Number of classes seen so far, the width of the logits."""
        return self.head.num_classes

    def grow(self, num_classes: int, generator: torch.Generator | None = None) -> None:
        """Add outputs up to a total of ``num_classes``; old rows keep every bit. See `models.heads`."""
        self.head.grow(num_classes, generator)

    @counted
    def features(self, x: Tensor | Mixed) -> Tensor:
        """Map images, float (B, 3, H, W) as the backbone wants them, to features (B, D).

        Features among the images (`Mixed`) pass by the backbone.
        """
        if isinstance(x, Mixed):
            return torch.cat([self.backbone(x.images), x.features]) if len(x.images) else x.features
        return self.backbone(x)

    def forward(self, x: Tensor) -> Tensor:
        """Map images, float (B, 3, H, W), to logits (B, num_classes)."""
        return self.head(self.features(x))

    def least_batch(self, side: int) -> int:
        """Return how many images of ``side`` pixels a step needs: 2 where BatchNorm sees one value of each, else 1."""
        if not any(isinstance(part, _BatchNorm) for part in self.backbone.modules()):
            return 1
        with suppress(ValueError), torch.no_grad():
            # A copy, since training moves BatchNorm's statistics.
            copy.deepcopy(self.backbone).train()(next(self.parameters()).new_zeros(1, 3, side, side))
            return 1
        return 2

    def layout(self) -> dict[str, Any]:
        """Return what `rebuild` needs to give a new network the shapes of this one, as JSON."""
        return {"num_seen": self.num_classes}

    def rebuild(self, layout: dict[str, Any]) -> None:
        """Take the shapes that ``layout`` tells, so that a state_dict fits; the network must be new."""
        self.grow(layout["num_seen"])

    def numbered_state(self) -> dict[str, Tensor]:
        """Return the state by place and kind of tensor: the same names, however a network is cut into modules."""
        named = enumerate(self.state_dict().items())
        return {f"{place}.{name.rpartition('.')[2]}": value for place, (name, value) in named}

    def load_numbered_state(self, state: dict[str, Tensor]) -> None:
        """Take over what ``numbered_state`` of a network with the same layers in the same order gave."""
        names = zip(self.numbered_state(), self.state_dict(), strict=True)
        self.load_state_dict({name: state[numbered] for numbered, name in names})

    def constant_parts(self) -> list[nn.Module]:
        """List the parts that no later task changes."""
        return []

    def frozen_copy(self) -> IncrementalNet:
        """Make a teacher in eval mode without gradients: a deep copy that shares what is constant."""
        teacher = copy.deepcopy(self, {id(part): part for part in self.constant_parts()}).eval().requires_grad_(False)
        teacher.zero_grad(set_to_none=True)  # a deep copy also carries the last gradients
        return teacher

    @torch.no_grad()
    def align_new_weights(self, num_old: int) -> float:
        """Give new class vectors the mean length of old ones (Zhao et al., CVPR 2020, arXiv:1911.07053, Eq. 7).

        Biases stay as they are. A second call changes nothing.

        Args:
            num_old: classes before this task, 0 < num_old < num_classes.

        Returns:
            The factor, mean ||w_old|| / mean ||w_new||.
        """
        assert 0 < num_old < self.num_classes, f"num_old={num_old} of {self.num_classes} classes"
        norms = self.head.weight.norm(dim=1)  # (num_classes,)
        factor = norms[:num_old].mean() / norms[num_old:].mean()
        self.head.weight[num_old:] *= factor
        return factor.item()
