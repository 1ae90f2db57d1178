"""ControlNet's own files, such as control_sd15_canny.pth: Stable Diffusion 1.x and the control network in one."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from models.files.compvis import TEXT, UNET, VAE, VAE_PARTS, Checkpoint
from models.files.diffusers_folder import LDM_SCHEDULE
from models.files.diffusers_parts import TextToImageParts, read_tokenizer
from models.files.weights import read_weights

CONTROL, CLIP = "control_model.", TEXT + "text_model."
# All files of this kind are of one architecture. Depths and heads are its own, which are diffusers' defaults as well;
# widths are read from the weights.
LEVELS = (1, 2, 4, 4)  # widths of the UNet's and of the VAE's levels
LAYERS = 2  # residual blocks per level
HEAD_WIDTH = 64  # of CLIP's heads
LATENT_SIDE = 64  # of a latent of 512 pixels
# One weight of each part: one from which a width is read, if there is one.
SHOWN = {
    "control": CONTROL + "input_blocks.0.0.weight",
    "unet": UNET + "input_blocks.0.0.weight",
    "context": UNET + "middle_block.1.transformer_blocks.0.attn2.to_k.weight",
    "vae": VAE + "encoder.conv_in.weight",
    "words": CLIP + "embeddings.token_embedding.weight",
    "positions": CLIP + "embeddings.position_embedding.weight",
    "feed_forward": CLIP + "encoder.layers.0.mlp.fc1.weight",
}


def read_controlnet_file(path: str, tokenizer: str, offline: bool) -> tuple[TextToImageParts, nn.Module]:
    """Read a file and take it apart into diffusers' networks; every weight must find its place.

    Args:
        path: .pth or .safetensors with CompVis' names.
        tokenizer: folder or hub id of CLIP's tokenizer.
        offline: fetch nothing.

    Returns:
        Stable Diffusion, and its ControlNetModel.

    Raises:
        WeightsError: if a file is absent, is a pickle with code, or is of another architecture.
    """
    from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
    from diffusers.loaders import single_file_utils as names

    checkpoint = Checkpoint(path, read_weights(path), wanted="of Stable Diffusion 1.x", hint="Fetch the file again")
    checkpoint.require(
        SHOWN.values(),
        "no Stable Diffusion 1.x with a ControlNet",
        "Use control_sd15_canny.pth here; other models are read from their hub id or folder",
    )
    shape = {name: checkpoint.weights[key].shape for name, key in SHOWN.items()}
    unet_config = {"block_out_channels": _widths(shape["unet"][0]), "cross_attention_dim": shape["context"][1]}
    vae_config = {
        "block_out_channels": _widths(shape["vae"][0]), "layers_per_block": LAYERS,
        "down_block_types": ["DownEncoderBlock2D"] * len(LEVELS), "up_block_types": ["UpDecoderBlock2D"] * len(LEVELS),
    }  # fmt: skip
    with torch.device("meta"):
        networks = AutoencoderKL(**vae_config), UNet2DConditionModel(**unet_config), ControlNetModel(**unet_config)
    vae = checkpoint.fill(networks[0], names.convert_ldm_vae_checkpoint, checkpoint.section(VAE_PARTS))
    unet = checkpoint.fill(networks[1], names.convert_ldm_unet_checkpoint, checkpoint.section(UNET))
    control = checkpoint.fill(networks[2], names.convert_controlnet_checkpoint, checkpoint.section(CONTROL))
    text_encoder, words = _read_text_encoder(checkpoint, shape), read_tokenizer(tokenizer, "CLIPTokenizerFast", offline)
    return TextToImageParts(vae, text_encoder, words, unet, dict(LDM_SCHEDULE), LATENT_SIDE), control


def _widths(first: int) -> list[int]:
    return [first * factor for factor in LEVELS]


def _read_text_encoder(checkpoint: Checkpoint, shape: dict[str, torch.Size]) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    vocabulary, width = shape["words"]
    section = checkpoint.section(CLIP)
    section.pop(CLIP + "embeddings.position_ids", None)  # a constant that later versions no longer store
    layer = re.compile(re.escape(CLIP) + r"encoder\.layers\.\d+\.layer_norm1\.weight")
    config = CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=shape["feed_forward"][0],
        num_hidden_layers=len(list(filter(layer.fullmatch, section))), num_attention_heads=width // HEAD_WIDTH,
        max_position_embeddings=shape["positions"][0],
    )  # fmt: skip
    network = CLIPTextModel(config)  # on the CPU, for the sake of that constant
    # Versions of transformers put the model's own name before its weights, or not.
    names = {CLIP + key.removeprefix("text_model."): key for key in network.state_dict()}

    def rename(section: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
        return {names[key]: value for key, value in section.items() if key in names}

    return checkpoint.fill(network, rename, section)
