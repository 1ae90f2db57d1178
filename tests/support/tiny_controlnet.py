"""Stable Diffusion with a ControlNet, of random weights in the real file formats, small enough for tests."""

import functools
from pathlib import Path

import torch
from torch import Tensor

from tests.support.tiny_compvis import image_weights, renamed, unet_name
from tests.support.tiny_ldm import UNCHECKED, clip_encoder, clip_tokenizer, folder, tiny_stable_diffusion, tiny_unet

HINT_NAMES = {"controlnet_cond_embedding.conv_in.": "input_hint_block.0.",
              "controlnet_cond_embedding.conv_out.": "input_hint_block.14."}  # fmt: skip
LAYERS = 2  # residual blocks per level of Stable Diffusion 1.x


@functools.cache
def tiny_controlnet_folders() -> tuple[str, str]:
    """Base and control in diffusers' folders; two pixels per latent, so that 8x8 pixels can be drawn."""
    from diffusers import PNDMScheduler

    base = tiny_stable_diffusion("epsilon")
    base.unet = tiny_unet(8)
    base.scheduler = PNDMScheduler(  # as in the published folder
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    return save(base, tiny_control(base.unet, hint_widths=(16, 32)))


def tiny_control(unet, hint_widths: tuple[int, ...]):
    """A ControlNet whose edges count; a new one adds nothing, for its last layers are zero."""
    from diffusers import ControlNetModel

    torch.manual_seed(1)
    control = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=hint_widths)
    for name, value in control.named_parameters():
        if name.startswith(("controlnet_down", "controlnet_mid", "controlnet_cond_embedding.conv_out")):
            torch.nn.init.normal_(value, std=0.1)
    return control.eval()


def save(base, control) -> tuple[str, str]:
    path = folder()
    base.save_pretrained(path / "base")
    control.save_pretrained(path / "control")
    return str(path / "base"), str(path / "control")


# ---------------------------------------------------------------------- one file, in the names of the original code


def narrow_stable_diffusion():
    """Every layer of Stable Diffusion 1.x and of its ControlNet, a tenth as wide."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    widths, tokenizer = (32, 64, 128, 128), clip_tokenizer(folder())
    vae = AutoencoderKL(block_out_channels=widths, layers_per_block=LAYERS, down_block_types=["DownEncoderBlock2D"] * 4,
                        up_block_types=["UpDecoderBlock2D"] * 4)  # fmt: skip
    unet = UNet2DConditionModel(sample_size=64, block_out_channels=widths, cross_attention_dim=64)
    scheduler = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    encoder = clip_encoder(tokenizer, width=64, heads=1)
    base = StableDiffusionPipeline(vae, encoder, tokenizer, unet, scheduler, **UNCHECKED)
    return base, tiny_control(unet, hint_widths=(16, 32, 96, 256))


def file_weights(base, control) -> dict[str, Tensor]:
    """What control_sd15_canny.pth would hold for these networks, with what else there is in it."""
    text = base.text_encoder.state_dict() | {"embeddings.position_ids": torch.arange(77)[None]}
    text = {f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}": text[key] for key in text}
    edges = {f"control_model.{control_name(key)}": value for key, value in control.state_dict().items()}
    unread = {"betas": torch.zeros(1000), "logvar": torch.zeros(1000)}
    return edges | image_weights(base.unet, base.vae, LAYERS) | text | unread


def control_name(key: str) -> str:
    """The UNet's own names for what was copied from it; those of the control's own layers."""
    if not key.startswith("controlnet_"):
        return unet_name(key, LAYERS)
    kind, place, *rest = key.split(".")
    if kind == "controlnet_mid_block":
        return f"middle_block_out.0.{place}"
    if kind == "controlnet_down_blocks":
        return f"zero_convs.{place}.0.{rest[0]}"
    # Between two convolutions of the edges' encoder lies an activation.
    return f"input_hint_block.{2 * int(rest[0]) + 2}.{rest[1]}" if place == "blocks" else renamed(key, HINT_NAMES)


def write_file(path: Path, weights: dict[str, Tensor]) -> dict[str, str]:
    """control_sd15_canny.pth and the tokenizer's folder: arguments of `load_controlnet`."""
    torch.save(weights, path / "control_sd15_canny.pth")
    (path / "clip").mkdir()
    clip_tokenizer(path / "clip").save_pretrained(path / "clip")
    return {"base": str(path / "control_sd15_canny.pth"), "tokenizer": str(path / "clip")}
