"""A small latent diffusion model of our own, made to be trained from scratch: autoencoder, UNet, class vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from models.config import NetworkConfig
from models.latent.contract import NOISE, LatentDiffusion
from models.latent.own import OwnModel
from utils.run.config import Width
from utils.run.errors import ConfigError
from utils.training.ledger import counted


class Denoiser(nn.Module):
    """The noise predictor and one vector per class: all that is trained on latents.

    Attributes:
        unet: diffusers' ``UNet2DConditionModel``; None in a model that only encodes and decodes.
        table: float32 (K, D), a row per class.
    """

    def __init__(self, unet: nn.Module | None, num_classes: int, vector_size: int):
        super().__init__()
        self.unet = unet
        self.table = nn.Parameter(torch.randn(num_classes, vector_size))


class SmallLDMConfig(NetworkConfig):
    """Hyperparameters of a `SmallLDM`. Every level after the first halves the side of what it gets."""

    vae_channels: list[Width] = Field([16, 32], min_length=1, description="autoencoder's width per level")
    latent_channels: Width = Field(4, description="channels of a latent")
    block_out_channels: list[Width] = Field([64, 96], description="UNet's width per level; empty: there is none")
    layers_per_block: int = Field(1, ge=1, le=64, description="residual blocks per level of the UNet")
    attention_levels: list[int] = Field([1], description="levels of the UNet with attention, 0 is the finest")
    num_heads: Width = Field(4, description="attention heads")
    norm_num_groups: Width = Field(8, description="groups of every GroupNorm")
    vector_size: Width = Field(512, description="length of a class vector")
    num_tokens: Width = Field(16, description="parts of a class vector that attention chooses among")
    prediction_type: Literal["epsilon", "v_prediction"] = Field("v_prediction", description="of the UNet")

    def check(self, side: int) -> None:
        """Raise ConfigError if the sizes do not fit each other or images of this side."""
        self.require_multiples("vae_channels", of="norm_num_groups")
        self.require_multiples("block_out_channels", of="norm_num_groups")
        self.require_multiples("block_out_channels", of="num_heads")
        self.require_multiples("vector_size", of="num_tokens")
        self.require_side(side, "vae_channels", "block_out_channels")
        if levels := len(self.block_out_channels):
            self.require_levels("attention_levels", levels)


class SmallLDM(OwnModel, LatentDiffusion):
    """An autoencoder, and a UNet whose cross-attention reads the vector of a class, or zeros for no class.

    The vector is cut into a few tokens of the context. A single token would only add a constant to every place of the
    latent; among several, each place chooses, so that a new vector can put known strokes into a new arrangement.

    It is made in train mode with random weights; ``freeze`` makes it what `LatentDiffusion` promises.

    Args:
        image_shape: (C, S, S) of the images.
        class_names: of the rows of the table of vectors.
        config: hyperparameters.

    Raises:
        ConfigError: if the shapes do not fit each other.
    """

    Config = SmallLDMConfig

    def __init__(self, image_shape: Sequence[int], class_names: Sequence[str], config: SmallLDMConfig):
        from diffusers import AutoencoderKL

        super().__init__(config, image_shape=list(image_shape), class_names=list(class_names))
        self.image_channels, self.image_size, _ = image_shape
        config.check(self.image_size)
        vae_levels = len(config.vae_channels)
        side = self.image_size // 2 ** (vae_levels - 1)
        self.latent_shape = (config.latent_channels, side, side)
        self.vector_size, self.class_names = config.vector_size, list(class_names)
        self.schedule = {**NOISE, "prediction_type": config.prediction_type}
        self.vae = AutoencoderKL(
            in_channels=self.image_channels, out_channels=self.image_channels, latent_channels=config.latent_channels,
            down_block_types=("DownEncoderBlock2D",) * vae_levels, up_block_types=("UpDecoderBlock2D",) * vae_levels,
            block_out_channels=tuple(config.vae_channels), layers_per_block=1, norm_num_groups=config.norm_num_groups,
            mid_block_add_attention=False)  # fmt: skip
        levels = range(len(config.block_out_channels))
        unet = build_unet(
            self.latent_shape, config,
            down=["CrossAttnDownBlock2D" if level in config.attention_levels else "DownBlock2D" for level in levels],
            cross_attention_dim=config.vector_size // config.num_tokens,
            attention_head_dim=config.num_heads,  # what diffusers calls so is the number of heads
        ) if levels else None  # fmt: skip
        self.denoiser = Denoiser(unet, len(class_names), config.vector_size)
        self.register_buffer("scale", torch.ones(()))  # latents times this have unit spread

    # ------------------------------------------------------------------ LatentDiffusion

    def initial_vector(self, word: str) -> Tensor:
        """Return the mean of the known classes' vectors, whatever the word."""
        return self.denoiser.table.detach().mean(0)

    @counted
    def moments(self, images: Tensor) -> Tensor:
        latents = self.vae.encode(images.to(self.scale.device)).latent_dist
        return torch.cat([latents.mean, latents.std], 1).float() * self.scale

    @counted
    def reconstruct(self, images: Tensor) -> tuple[Tensor, Any]:
        """Return images from one draw of their latents, (B, C, S, S), and the latents' distribution, of diffusers."""
        posterior = self.vae.encode(images).latent_dist
        return self.vae.decode(posterior.sample(), return_dict=False)[0], posterior

    @counted
    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents.to(self.scale.device) / self.scale, return_dict=False)[0].float()

    def context(self, prompts: list[str], vectors: Tensor | None = None) -> Tensor:
        """Cut the vectors into tokens, (B, tokens, D / tokens); zeros where the prompt is empty."""
        if vectors is None and (text := next(filter(None, prompts), None)):
            remedy = "give it vectors, or choose a text-to-image model"
            raise ConfigError(f"this model reads no text, so {text!r} means nothing to it: {remedy}")
        told = torch.tensor([[bool(prompt)] for prompt in prompts], device=self.scale.device)
        vectors = torch.zeros(1, self.vector_size) if vectors is None else vectors
        return (vectors.to(self.scale.device) * told).unflatten(1, (self.config.num_tokens, -1))

    @counted
    def predict(self, zt: Tensor, t: Tensor, context: Tensor) -> Tensor:
        device = self.scale.device
        if self.denoiser.unet is None:
            raise ConfigError("this model has no UNet, so it decodes latents and denoises none: draw at strength=0")
        return self.denoiser.unet(zt.to(device), t.to(device), context.to(device), return_dict=False)[0].float()


def build_unet(shape: Sequence[int], config: NetworkConfig, down: list[str], **options: Any) -> nn.Module:
    """Build a UNet that predicts the noise of small images or latents.

    Args:
        shape: (C, S, S) of what it denoises.
        config: has block_out_channels, layers_per_block and norm_num_groups.
        down: diffusers' names of the blocks on the way down, one per level.
        options: more arguments of ``UNet2DConditionModel``.
    """
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=shape[1], in_channels=shape[0], out_channels=shape[0],
        block_out_channels=tuple(config.block_out_channels), down_block_types=tuple(down),
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
        layers_per_block=config.layers_per_block, norm_num_groups=config.norm_num_groups, **options)  # fmt: skip
