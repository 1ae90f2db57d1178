"""A small latent diffusion model of our own, made to be trained from scratch: autoencoder, UNet, class vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.latent.contract import LatentDiffusion
from models.latent.own import OwnModel
from utils.run.errors import ConfigError

# The noise of latent diffusion (Rombach et al., CVPR 2022, arXiv:2112.10752).
NOISE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


class Denoiser(nn.Module):
    """What is trained on latents: the noise predictor and one vector per class.

    Attributes:
        unet: diffusers' ``UNet2DConditionModel``.
        table: float32 (K, D), a row per class.
    """

    def __init__(self, unet: nn.Module, num_classes: int, vector_size: int):
        super().__init__()
        self.unet = unet
        self.table = nn.Parameter(torch.randn(num_classes, vector_size))


class SmallLDM(OwnModel, LatentDiffusion):
    """An autoencoder, and a UNet whose cross-attention reads the vector of a class, or zeros for no class.

    The vector is cut into a few tokens of the context. A single token would only add a constant to every place of the
    latent; among several, each place chooses, so that a new vector can put known strokes into a new arrangement.

    It is made in train mode with random weights; ``freeze`` makes it what `LatentDiffusion` promises.

    Args:
        image_shape: (C, S, S) of the images.
        class_names: of the rows of the table of vectors.
        vae_channels: width of each level of the autoencoder; every level after the first halves the side.
        latent_channels: c of a latent.
        block_out_channels: width of each level of the UNet; every level after the first halves the side.
        layers_per_block: residual blocks per level of the UNet on the way down; the way up has one more.
        attention_levels: levels of the UNet, from 0, that have attention; its middle always has.
        num_heads: attention heads wherever there is attention.
        norm_num_groups: groups of every GroupNorm.
        vector_size: D of a class vector.
        num_tokens: of the context that a vector is cut into.
        prediction_type: "epsilon" or "v_prediction".

    Raises:
        ConfigError: if the shapes do not fit each other.
    """

    reads_text = False
    source = "small_ldm"

    def __init__(
        self,
        image_shape: Sequence[int],
        class_names: Sequence[str],
        *,
        vae_channels: Sequence[int] = (16, 32),
        latent_channels: int = 4,
        block_out_channels: Sequence[int] = (64, 96),
        layers_per_block: int = 1,
        attention_levels: Sequence[int] = (1,),
        num_heads: int = 4,
        norm_num_groups: int = 8,
        vector_size: int = 512,
        num_tokens: int = 16,
        prediction_type: str = "v_prediction",
    ):
        super().__init__()
        self.arguments: dict[str, Any] = {
            "image_shape": list(image_shape), "class_names": list(class_names), "vae_channels": list(vae_channels),
            "latent_channels": latent_channels, "block_out_channels": list(block_out_channels),
            "layers_per_block": layers_per_block, "attention_levels": list(attention_levels), "num_heads": num_heads,
            "norm_num_groups": norm_num_groups, "vector_size": vector_size, "num_tokens": num_tokens,
            "prediction_type": prediction_type,
        }  # fmt: skip
        _check_shapes(self.arguments)
        self.image_channels, self.image_size, _ = image_shape
        side = self.image_size // 2 ** (len(vae_channels) - 1)
        self.latent_shape = (latent_channels, side, side)
        self.vector_size, self.num_tokens, self.class_names = vector_size, num_tokens, list(class_names)
        self.schedule = {**NOISE, "prediction_type": prediction_type}
        self.vae = _autoencoder(self.image_channels, vae_channels, latent_channels, norm_num_groups)
        unet = _unet(self.latent_shape, block_out_channels, layers_per_block, attention_levels, num_heads,
                     norm_num_groups, vector_size // num_tokens)  # fmt: skip
        self.denoiser = Denoiser(unet, len(class_names), vector_size)
        self.register_buffer("scale", torch.ones(()))  # latents times this have unit spread

    # ------------------------------------------------------------------ LatentDiffusion

    def initial_vector(self, word: str) -> Tensor:
        """The mean of the known classes' vectors, whatever the word."""
        return self.denoiser.table.detach().mean(0)

    def moments(self, images: Tensor) -> Tensor:
        latents = self.vae.encode(images.to(self.scale.device)).latent_dist
        return torch.cat([latents.mean, latents.std], 1).float() * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents.to(self.scale.device) / self.scale, return_dict=False)[0].float()

    def context(self, prompts: list[str], vectors: Tensor | None = None) -> Tensor:
        """The vectors cut into tokens, (B, tokens, D / tokens); zeros where the prompt is empty."""
        if vectors is None and any(prompts):
            raise ConfigError(
                f"this model reads no text, so {next(filter(None, prompts))!r} means nothing to it: leave "
                "synth.inversion true, or choose a text-to-image model"
            )
        told = torch.tensor([[bool(prompt)] for prompt in prompts], device=self.scale.device)
        vectors = torch.zeros(1, self.vector_size) if vectors is None else vectors
        return (vectors.to(self.scale.device) * told).unflatten(1, (self.num_tokens, -1))

    def predict(self, zt: Tensor, t: Tensor, context: Tensor) -> Tensor:
        device = self.scale.device
        return self.denoiser.unet(zt.to(device), t.to(device), context.to(device), return_dict=False)[0].float()


def _autoencoder(channels: int, widths: Sequence[int], latent_channels: int, groups: int) -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=channels, out_channels=channels, latent_channels=latent_channels,
        down_block_types=("DownEncoderBlock2D",) * len(widths), up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=tuple(widths), layers_per_block=1, norm_num_groups=groups, mid_block_add_attention=False,
    )  # fmt: skip


def _unet(shape, widths: Sequence[int], layers: int, attention, heads: int, groups: int, token_size: int) -> nn.Module:
    from diffusers import UNet2DConditionModel

    down = ["CrossAttnDownBlock2D" if level in attention else "DownBlock2D" for level in range(len(widths))]
    return UNet2DConditionModel(
        sample_size=shape[1], in_channels=shape[0], out_channels=shape[0], block_out_channels=tuple(widths),
        down_block_types=tuple(down), up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
        layers_per_block=layers, norm_num_groups=groups, cross_attention_dim=token_size,
        attention_head_dim=heads,  # what diffusers calls so is the number of heads
    )  # fmt: skip


def _check_shapes(given: dict[str, Any]) -> None:
    vae, unet, size = given["vae_channels"], given["block_out_channels"], given["image_shape"][1]
    factor = 2 ** (len(vae) + len(unet) - 2)
    if size % factor:
        raise ConfigError(
            f"{len(vae)} vae_channels and {len(unet)} block_out_channels halve an image {factor.bit_length() - 1} "
            f"times, so its side must be a multiple of {factor}, not {size}: give fewer of them"
        )
    require_multiples(given, "vae_channels", "norm_num_groups")
    require_multiples(given, "block_out_channels", "norm_num_groups")
    require_multiples(given, "block_out_channels", "num_heads")
    require_multiples(given, "vector_size", "num_tokens")
    absent = [level for level in given["attention_levels"] if not 0 <= level < len(unet)]
    if absent:
        raise ConfigError(f"attention_levels={absent} do not exist: levels are 0 to {len(unet) - 1}")


def require_multiples(given: dict[str, Any], key: str, of: str) -> None:
    values = given[key] if isinstance(given[key], list) else [given[key]]
    for value in values:
        if value % given[of]:
            raise ConfigError(f"{key}={given[key]}: {value} is not a multiple of {of}={given[of]}")
