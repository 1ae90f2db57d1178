"""ControlNet's own files, such as control_sd15_canny.pth: Stable Diffusion 1.x and the control network in one."""

from __future__ import annotations

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
SHOWN = {"control": CONTROL + "input_blocks.0.0.weight", "unet": UNET + "input_blocks.0.0.weight",
         "context": UNET + "middle_block.1.transformer_blocks.0.attn2.to_k.weight",
         "vae": VAE + "encoder.conv_in.weight", "words": CLIP + "embeddings.token_embedding.weight",
         "positions": CLIP + "embeddings.position_embedding.weight",
         "feed_forward": CLIP + "encoder.layers.0.mlp.fc1.weight"}  # fmt: skip


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
    advice = "Use control_sd15_canny.pth here; other models are read from their hub id or folder"
    shape = checkpoint.shapes(SHOWN, "no Stable Diffusion 1.x with a ControlNet", advice)
    vae_widths, unet_widths = ([shape[part][0] * factor for factor in LEVELS] for part in ("vae", "unet"))
    unet_config = {"block_out_channels": unet_widths, "cross_attention_dim": shape["context"][1]}
    with torch.device("meta"):
        down, up = (["DownEncoderBlock2D"] * len(LEVELS), ["UpDecoderBlock2D"] * len(LEVELS))
        vae = AutoencoderKL(down_block_types=down, up_block_types=up, block_out_channels=vae_widths,
                            layers_per_block=LAYERS)  # fmt: skip
        unet, control = UNet2DConditionModel(**unet_config), ControlNetModel(**unet_config)
    checkpoint.fill(vae, names.convert_ldm_vae_checkpoint, VAE_PARTS)
    checkpoint.fill(unet, names.convert_ldm_unet_checkpoint, UNET)
    checkpoint.fill(control, names.convert_controlnet_checkpoint, CONTROL)
    text_encoder, words = _read_text_encoder(checkpoint, shape), read_tokenizer(tokenizer, "CLIPTokenizerFast", offline)
    return TextToImageParts(vae, text_encoder, words, unet, dict(LDM_SCHEDULE), LATENT_SIDE), control


def _read_text_encoder(checkpoint: Checkpoint, shape: dict[str, torch.Size]) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    vocabulary, width = shape["words"]
    network = CLIPTextModel(CLIPTextConfig(  # on the CPU, for the sake of a constant, its position_ids
        vocab_size=vocabulary, hidden_size=width, intermediate_size=shape["feed_forward"][0],
        num_hidden_layers=sum(key.endswith(".layer_norm1.weight") for key in checkpoint.section(CLIP)),
        num_attention_heads=width // HEAD_WIDTH, max_position_embeddings=shape["positions"][0]))  # fmt: skip
    # Versions of transformers put the model's own name before its weights, or not; some store the constant too.
    names = {CLIP + key.removeprefix("text_model."): key for key in network.state_dict()}

    def rename(section: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
        return {names[key]: value for key, value in section.items() if key in names}

    checkpoint.fill(network, rename, CLIP, unused=CLIP + "embeddings.position_ids")
    return network
