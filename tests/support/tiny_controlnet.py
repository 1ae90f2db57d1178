"""Stable Diffusion with a ControlNet, of random weights in the real file formats, small enough for tests."""

import functools
from pathlib import Path

import torch
from torch import Tensor

from tests.support.tiny_compvis import as_compvis, renamed, unet_name, vae_name
from tests.support.tiny_ldm import clip_tokenizer, folder, tiny_stable_diffusion, tiny_unet

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
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    widths, tokenizer = (32, 64, 128, 128), clip_tokenizer(folder())
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=1,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=widths, layers_per_block=LAYERS, down_block_types=["DownEncoderBlock2D"] * 4,
                        up_block_types=["UpDecoderBlock2D"] * 4)  # fmt: skip
    unet = UNet2DConditionModel(sample_size=64, block_out_channels=widths, cross_attention_dim=64)
    scheduler = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    base = StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return base, tiny_control(unet, hint_widths=(16, 32, 96, 256))


def file_weights(base, control) -> dict[str, Tensor]:
    """What control_sd15_canny.pth would hold for these networks, with what else there is in it."""
    text = {key.removeprefix("text_model."): value for key, value in base.text_encoder.state_dict().items()}
    vae = {vae_name(key): as_compvis(key, value) for key, value in base.vae.state_dict().items()}
    sections = {
        "control_model.": {control_name(key): value for key, value in control.state_dict().items()},
        "model.diffusion_model.": {unet_name(key, LAYERS): value for key, value in base.unet.state_dict().items()},
        "first_stage_model.": vae,
        "cond_stage_model.transformer.text_model.": text | {"embeddings.position_ids": torch.arange(77)[None]},
    }
    named = {prefix + key: value for prefix, section in sections.items() for key, value in section.items()}
    return named | {"betas": torch.zeros(1000), "logvar": torch.zeros(1000)}


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
