"""Residual networks (He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv:1512.03385)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from models import BACKBONES
from models.options import BackboneOptions


class _Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters (option A of section 3.3), or projected (option B)."""

    rectify = True  # False: the output has both signs

    def __init__(self, in_channels: int, channels: int, stride: int, project: bool = False):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.extra_channels, self.projection = stride, channels - in_channels, None
        if project and (stride > 1 or self.extra_channels):
            self.projection = Conv2dNormActivation(in_channels, channels, 1, stride, activation_layer=None)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.projection is not None:
            x = self.projection(x)
        elif self.stride > 1 or self.extra_channels:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra_channels))
        return F.relu(x + branch) if self.rectify else x + branch


class CifarResNet(nn.Module):
    """The CIFAR form of section 4.2: three stages of 16, 32 and 64 channels, any image side from 4 pixels.

    Args:
        blocks: residual blocks per stage; depth is 6 * blocks + 2.
        cosine: the form for a cosine head (Hou et al., LUCIR, CVPR 2019, section 3.2): shortcuts are projections, and
            the last block ends without ReLU, so that features have both signs.
    """

    num_features = 64

    def __init__(self, blocks: int, cosine: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.stages = build_stages(partial(_Block, project=cosine), 16, [16, 32, 64], blocks)
        self.stages[-1][-1].rectify = not cosine
        self.apply(init_conv)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W), mean 0 and deviation 1 per channel, to features (B, 64), >= 0 unless ``cosine``."""
        return self.stages(F.relu(self.bn(self.conv(x)))).mean(dim=(2, 3))


def build_stages(block: Callable[..., nn.Module], in_channels: int, widths: list[int], blocks: int) -> nn.Sequential:
    """Build stages of residual blocks, of which all but the first halve the side.

    Args:
        block: made of input channels, output channels and stride.
        in_channels: channels of the first block's input.
        widths: channels of every stage.
        blocks: per stage.
    """
    stages = nn.Sequential()
    for channels in widths:
        first = block(in_channels, channels, 2 if stages else 1)
        stages.append(nn.Sequential(first, *(block(channels, channels, 1) for _ in range(blocks - 1))))
        in_channels = channels
    return stages


def init_conv(module: nn.Module) -> None:
    """Start a convolution Kaiming-normal by its fan-out; for ``nn.Module.apply``, so other modules are left alone."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _cifar_resnet(blocks: int, options: BackboneOptions, cosine: bool = False) -> nn.Module:
    return CifarResNet(blocks, cosine)


def _torchvision_resnet(name: str, options: BackboneOptions) -> nn.Module:
    """Give torchvision's network another stem and take its classifier away; its own weight files still fit."""
    from torchvision.models import get_model

    network = get_model(name, weights=None)
    network.num_features = network.fc.in_features
    network.fc = nn.Identity()
    if options.stem != "imagenet":
        network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        init_conv(network.conv1)
    if options.stem == "cifar":
        network.maxpool = nn.Identity()
    return network


# Depth 32, with 463,504 parameters, is the field's network for CIFAR.
for _depth in (20, 32):
    BACKBONES.register(f"resnet{_depth}")(partial(_cifar_resnet, _depth // 6))
BACKBONES.register("cosine_resnet32")(partial(_cifar_resnet, 5, cosine=True))
for _name in ("resnet18", "resnet34", "resnet50"):
    BACKBONES.register(_name)(partial(_torchvision_resnet, _name))
