"""A classifier that gains a branch of its backbone with every task, and the head that reads all of them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from models.heads import LinearHead
from models.incremental import IncrementalNet
from models.resnet import CifarResNet
from utils.run.errors import ConfigError


class Branches(nn.Module):
    """A trunk that all tasks share and one branch per task on top of it; starts with the first task's branch.

    Args:
        trunk: images, float (B, 3, H, W), to what a branch takes; ``nn.Identity()`` where nothing is shared.
        branch: the first one, to features (B, D).
        width: D.
        train_trunk: whether the trunk learns on after the first task.
        train_old: whether the branches of earlier tasks do.
    """

    def __init__(self, trunk: nn.Module, branch: nn.Module, width: int, train_trunk: bool, train_old: bool):
        super().__init__()
        self.trunk, self.branches = trunk, nn.ModuleList([branch])
        self.width, self.train_trunk, self.train_old = width, train_trunk, train_old

    @property
    def num_features(self) -> int:
        """Count the features of all branches together."""
        return self.width * len(self.branches)

    def frozen(self) -> list[nn.Module]:
        """Return the parts that have stopped learning; none before the second branch."""
        *old, _ = self.branches
        return ([] if self.train_old else old) + ([] if self.train_trunk or not old else [self.trunk])

    def add(self) -> None:
        """Append a branch, which starts as a copy of the newest one, and freeze what stops learning then."""
        self.branches.append(copy.deepcopy(self.branches[-1]))
        self.zero_grad(set_to_none=True)  # neither copied nor frozen parts keep the last gradients
        self.train(self.training)

    def train(self, mode: bool = True) -> Branches:
        """Set the mode, but keep frozen parts constant: batches of new classes would move their BatchNorm."""
        super().train(mode)
        for part in self.frozen():
            part.eval().requires_grad_(False)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Map images, float (B, 3, H, W), to the features of all branches side by side, oldest first."""
        shared = self.trunk(x)
        return torch.cat([branch(shared) for branch in self.branches], dim=1)


class ExpandableNet(IncrementalNet):
    """The network of DER (arXiv:2103.16788) and MEMO (arXiv:2205.13218): a task adds classes and a branch.

    From the second task on, ``auxiliary`` tells the new classes apart, and all old ones as class 0, by the newest
    branch alone, so that it learns what the others lack. It serves the training; drop it afterwards.

    Args:
        trunk, branch, train_trunk, train_old: see `Branches`.
        head: built for the features of one branch; it has no class before the first `grow`.
    """

    def __init__(self, trunk: nn.Module, branch: nn.Module, head: LinearHead, train_trunk: bool, train_old: bool):
        super().__init__(Branches(trunk, branch, head.num_features, train_trunk, train_old), head)
        self.auxiliary: LinearHead | None = None

    def grow(self, num_classes: int, generator: torch.Generator | None = None) -> None:
        """Add outputs up to a total of ``num_classes``, and if there were some before, a branch to feed all of them.

        Old rows keep every bit where they read old branches. See `models.heads`.
        """
        num_old = self.num_classes
        if num_old == 0:
            return self.head.grow(num_classes, generator)
        self.backbone.add()
        self.head.widen(self.backbone.num_features, generator)
        self.head.grow(num_classes, generator)
        self.auxiliary = LinearHead(self.backbone.width).to(self.head.weight.device)
        self.auxiliary.grow(1 + num_classes - num_old, generator)

    def both_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map images, float (B, 3, H, W), to logits (B, num_classes) and those of ``auxiliary`` (B, 1 + num_new)."""
        features = self.features(x)
        return self.head(features), self.auxiliary(features[:, -self.backbone.width :])

    def layout(self) -> dict[str, Any]:
        return {**super().layout(), "num_branches": len(self.backbone.branches)}

    def rebuild(self, layout: dict[str, Any]) -> None:
        for _ in range(layout["num_branches"] - 1):
            self.backbone.add()
        self.head.widen(self.backbone.num_features)
        self.head.grow(layout["num_seen"])

    def constant_parts(self) -> list[nn.Module]:
        return self.backbone.frozen()


class ClassToken(nn.Module):
    """Tokens (B, N, D) to the features (B, D) of the first of them."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0]


def split_last_stage(backbone: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Cut a ResNet in front of its last stage, a ViT in front of its last block (ICLR 2023, arXiv:2205.13218).

    Args:
        backbone: a ResNet of ours or of torchvision, or a ViT of timm; its weights are shared, not copied.

    Returns:
        The trunk, images (B, 3, H, W) to maps (B, C, h, w) or tokens (B, N, D), and the last stage, those to features
        (B, D).

    Raises:
        ConfigError: for any other backbone.
    """
    from torchvision.models import ResNet

    vit = getattr(backbone, "network", None)
    # Told by its name, since importing timm takes seconds that a ResNet can save; its subclasses pool in other ways.
    if type(vit).__name__ == "VisionTransformer" and vit.global_pool == "token":
        last_stage = nn.Sequential(vit.blocks[-1], vit.norm, ClassToken())
        vit.blocks, vit.norm = vit.blocks[:-1], nn.Identity()
        vit.reset_classifier(0, "")  # without pooling it ends with all tokens, (B, N, D)
        return vit, last_stage
    if isinstance(backbone, CifarResNet):
        layers = [backbone.conv, backbone.bn, nn.ReLU(), *backbone.stages]
    elif isinstance(backbone, ResNet):
        layers = list(backbone.children())[:-2]  # without pool and classifier
    else:
        able = "resnet20, resnet32, resnet18, resnet34, resnet50 or a vision transformer of timm with a class token"
        refused = f"a {type(vit or backbone).__name__} cannot be cut in front of its last stage"
        raise ConfigError(f"{refused}: choose convnet_type={able}")
    return nn.Sequential(*layers[:-1]), nn.Sequential(layers[-1], nn.AdaptiveAvgPool2d(1), nn.Flatten())
