"""Residual networks of units that normalise before they convolve.

He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016, arXiv:1603.05027.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models import BACKBONES
from models.options import BackboneOptions
from models.resnet import build_stages, init_conv

EPS = 1e-6  # of every normalisation


def _unit(in_channels: int, channels: int, kernel: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, channels, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(nn.BatchNorm2d(in_channels, eps=EPS), nn.ReLU(inplace=True), conv)


class _Block(nn.Module):
    """Two 3x3 units beside a shortcut, which is a 1x1 unit with its own normalisation where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.branch = nn.Sequential(_unit(in_channels, channels, 3, stride), _unit(channels, channels, 3, 1))
        self.shortcut = nn.Identity() if in_channels == channels else _unit(in_channels, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + self.shortcut(x)


class PreactResNet(nn.Module):
    """The classifier of Cywinski et al. (2024, arXiv:2403.03938): four groups of 64 to 512 channels.

    Args:
        blocks: residual blocks per group; depth is 8 * blocks + 2.
    """

    num_features = 512

    def __init__(self, blocks: int):
        super().__init__()
        # The stem is a unit as well: it starts blind to what is darker than the average pixel.
        self.stem = _unit(3, 64, 3, 1)
        self.groups = build_stages(_Block, 64, [64, 128, 256, 512], blocks)
        self.norm = nn.BatchNorm1d(self.num_features, eps=EPS)
        self.apply(init_conv)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to non-negative features (B, 512); in training mode, B > 1."""
        x = self.groups(self.stem(x))
        # The residual sum is pooled as it is: normalisation and ReLU follow on the means, not on the maps.
        return F.relu(self.norm(x.mean(dim=(2, 3))))


@BACKBONES.register("preact_resnet18")
def preact_resnet18(options: BackboneOptions) -> nn.Module:
    """Depth 18, 512 features, 11,167,942 parameters: for CIFAR and for ImageNet at 64 pixels."""
    return PreactResNet(blocks=2)
