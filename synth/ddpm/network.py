"""Class-conditional noise predictor: an adapter over diffusers' ``UNet2DModel``."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from models.config import NetworkConfig
from utils.run.config import Width
from utils.run.errors import ConfigError
from utils.training.ledger import counted

# From this many channels per group on, GroupNorm on CPUs is as fast in channels_last as in plain order, and the bf16
# convolutions around it are 1.4 to 2 times faster; below, its backward pass is up to 25 times slower.
CHANNELS_LAST_FROM = 16


class _PaddedLinear(nn.Linear):
    """A linear layer whose last ``padding`` outputs are zero, to be filled with the one-hot class.

    The rows of these outputs exist, as zeros, so that the state dict stays that of ``UNet2DModel``. They take no part
    in the forward pass, hence get a zero gradient in every deep copy, and weight decay keeps zero at zero.
    """

    def __init__(self, in_features: int, out_features: int, padding: int):
        super().__init__(in_features, out_features)
        self.padding = padding
        with torch.no_grad():
            self.weight[-padding:] = 0
            self.bias[-padding:] = 0

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(F.linear(x, self.weight[: -self.padding], self.bias[: -self.padding]), (0, self.padding))


class ClassUNetConfig(NetworkConfig):
    """Hyperparameters of a `ClassUNet`; the defaults are GUIDE's CIFAR network."""

    block_out_channels: list[Width] = Field([128, 256, 256, 256], min_length=1, description="UNet width per level")
    layers_per_block: int = Field(3, ge=1, le=64, description="residual blocks per level")
    attention_levels: list[int] = Field([1, 2], description="levels with attention, 0 is the finest")
    attention_head_dim: Width = Field(64, description="channels per attention head")
    norm_num_groups: Width = Field(32, description="groups of every GroupNorm")
    dropout: float = Field(0.1, ge=0, lt=1, description="inside the residual blocks")
    resample: Literal["conv", "resnet"] = Field("conv", description="between levels: convolution or residual block")
    gradient_checkpointing: bool = Field(False, description="recompute blocks going backward: less memory, more time")

    def check(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        """Raise ConfigError if the sizes do not fit each other, the images or the classes."""
        widths, head = self.block_out_channels, self.attention_head_dim
        for side in image_shape[1:]:
            self.require_side(side, "block_out_channels")
        if not 1 <= num_classes < 4 * widths[0]:  # the places of the embedding
            raise ConfigError(f"{num_classes} classes need block_out_channels[0] > {num_classes // 4}, not {widths[0]}")
        self.require_levels("attention_levels", len(widths))
        self.require_multiples("block_out_channels", of="norm_num_groups")
        for level in {*self.attention_levels, len(widths) - 1}:  # the middle block has the width of the last level
            if widths[level] % head:
                where = f"block_out_channels[{level}]={widths[level]}"
                raise ConfigError(f"{where} has attention, so it must be a multiple of attention_head_dim={head}")

    def new_unet(self, image_shape: tuple[int, int, int], **extras):
        """Build the ``UNet2DModel`` of this size, which adds a vector per image to its time embedding.

        Args:
            image_shape: (C, H, W) of the images.
            extras: further arguments of ``UNet2DModel``.
        """
        from diffusers import UNet2DModel

        plain = {"conv": "Down", "resnet": "ResnetDownsample"}[self.resample]  # DownBlock2D ignores downsample_type
        levels = range(len(self.block_out_channels))
        down = tuple(f"{'AttnDown' if level in self.attention_levels else plain}Block2D" for level in levels)
        channels, *size = image_shape
        unet = UNet2DModel(
            sample_size=tuple(size), in_channels=channels, out_channels=channels, class_embed_type="identity",
            block_out_channels=tuple(self.block_out_channels), layers_per_block=self.layers_per_block,
            down_block_types=down, up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
            dropout=self.dropout, downsample_type=self.resample, upsample_type=self.resample,
            attention_head_dim=self.attention_head_dim, norm_num_groups=self.norm_num_groups, **extras,
        )  # fmt: skip
        if self.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        return unet


class ClassUNet(nn.Module):
    """The UNet of guided diffusion (Dhariwal and Nichol, 2021, arXiv:2105.05233), told the class as a one-hot vector.

    GUIDE's network (Cywinski et al., 2024, arXiv:2403.03938): scale-shift norm, and the raw one-hot vector of the
    class behind the time embedding. Every residual block then owns one vector per class, and the vector of a class
    that is absent from the batch gets a gradient of exactly zero.

    Args:
        image_shape: (C, H, W) of the images; the side is halved between two levels.
        num_classes: K, all classes that will ever come: K of the 4 * block_out_channels[0] places of the embedding.
        config: hyperparameters. With 16 channels per group or more the network works in channels_last, which on CPUs
            is a third faster in bf16.

    Raises:
        ConfigError: if the shapes do not fit each other; the message says what would.
    """

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, config: ClassUNetConfig):
        super().__init__()
        config.check(image_shape, num_classes)
        widths = config.block_out_channels
        self.num_classes, self.embedding_dim = num_classes, 4 * widths[0]
        # With scale-shift and the default None, the middle attention would have no GroupNorm at all.
        extras = {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": config.norm_num_groups}
        self.unet = config.new_unet(image_shape, **extras)
        self.unet.time_embedding.linear_2 = _PaddedLinear(self.embedding_dim, self.embedding_dim, num_classes)
        _zero_residual_branches(self.unet)
        wide_groups = min(widths) // config.norm_num_groups >= CHANNELS_LAST_FROM
        self.memory_format = torch.channels_last if wide_groups else torch.contiguous_format
        self.to(memory_format=self.memory_format)

    def train(self, mode: bool = True) -> ClassUNet:
        """Switch dropout on or off, as ever, but leave the blocks around it in eval mode.

        Their own flag does one thing: in train mode each copies its input to the plain memory order before the
        shortcut, a tenth of a training step in channels_last.
        """
        from diffusers.models.resnet import ResnetBlock2D

        super().train(mode)
        for module in self.modules():
            if isinstance(module, ResnetBlock2D):
                module.training = False
        return self

    @counted
    def forward(self, xt: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Predict the noise in ``xt``.

        Args:
            xt: noisy images, float (B, C, H, W), of unit scale.
            t: int64 (B,), steps of the unrespaced process (0..999).
            labels: int64 (B,), in [0, num_classes), or -1 for no class (the all-zero vector).

        Returns:
            Noise, float (B, C, H, W).
        """
        # One place more, for -1, lets one_hot see labels that are out of range.
        one_hot = F.one_hot(labels + 1, self.num_classes + 1)[:, 1:]  # (B, K)
        class_embedding = F.pad(one_hot.float(), (self.embedding_dim - self.num_classes, 0))  # (B, 4C)
        xt = xt.contiguous(memory_format=self.memory_format)
        return self.unet(xt, t, class_labels=class_embedding, return_dict=False)[0]


def _zero_residual_branches(unet: nn.Module) -> None:
    """Start as the identity: diffusers leaves the last layer of each branch and the output at random."""
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D

    last = [unet.conv_out]
    last += [module.conv2 for module in unet.modules() if isinstance(module, ResnetBlock2D)]
    last += [module.to_out[0] for module in unet.modules() if isinstance(module, Attention)]
    for parameter in nn.ModuleList(last).parameters():
        nn.init.zeros_(parameter)
