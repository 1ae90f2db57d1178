"""A tiny checkpoint and its YAML as CompVis' code writes them: diffusers' weights under CompVis' names."""

import re
from pathlib import Path

import torch
import yaml
from torch import Tensor

from tests.support.tiny_ldm import BERT_WORDS

LAYERS = 1  # residual blocks per level, of UNet and VAE
LEVELS = 2  # of the UNet
VAE_LEVELS = 4

RESNET = {
    "norm1.": "in_layers.0.", "conv1.": "in_layers.2.", "time_emb_proj.": "emb_layers.1.", "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.", "conv_shortcut.": "skip_connection.",
}  # fmt: skip
UNET_ENDS = {
    "conv_in.": "input_blocks.0.0.", "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.", "conv_norm_out.": "out.0.", "conv_out.": "out.2.",
    "mid_block.resnets.0.": "middle_block.0.", "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.",
}  # fmt: skip
VAE_NAMES = {
    "mid_block.resnets.0.": "mid.block_1.", "mid_block.resnets.1.": "mid.block_2.",
    "mid_block.attentions.0.": "mid.attn_1.", "conv_norm_out.": "norm_out.", "conv_shortcut.": "nin_shortcut.",
    "group_norm.": "norm.", "to_q.": "q.", "to_k.": "k.", "to_v.": "v.", "to_out.0.": "proj_out.",
    "downsamplers.0.": "downsample.", "upsamplers.0.": "upsample.", "resnets.": "block.",
}  # fmt: skip
TEXT_NAMES = {
    "embed_tokens.": "token_emb.", "embed_positions.": "pos_emb.emb.", "layer_norm.": "norm.",
    "self_attn_layer_norm.": "{a}.0.", "self_attn.q_proj.": "{a}.1.to_q.", "self_attn.k_proj.": "{a}.1.to_k.",
    "self_attn.v_proj.": "{a}.1.to_v.", "self_attn.out_proj.": "{a}.1.to_out.", "final_layer_norm.": "{f}.0.",
    "fc1.": "{f}.1.net.0.0.", "fc2.": "{f}.1.net.2.",
}  # fmt: skip


def compvis_weights(pipeline) -> dict[str, Tensor]:
    """A pipeline's weights under the names of the original code, with what else such a file holds."""
    text = {f"cond_stage_model.transformer.{text_name(k)}": value for k, value in pipeline.bert.state_dict().items()}
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    unread = {"betas": betas, "logvar": torch.zeros(1000), "first_stage_model.loss.logvar": torch.zeros(1)}
    return image_weights(pipeline.unet, pipeline.vqvae, LAYERS) | text | unread


def image_weights(unet, vae, layers: int) -> dict[str, Tensor]:
    """Weights of UNet and VAE under the names of the original code."""
    first = {f"model.diffusion_model.{unet_name(key, layers)}": value for key, value in unet.state_dict().items()}
    second = {f"first_stage_model.{vae_name(key)}": as_compvis(key, value) for key, value in vae.state_dict().items()}
    return first | second


def unet_name(key: str, layers: int) -> str:
    """Blocks are counted through all levels: the input convolution first, then residual blocks and resamplers."""
    for old, new in UNET_ENDS.items():
        if key.startswith(old):
            rest = key.removeprefix(old)
            return new + (renamed(rest, RESNET) if "resnets" in old else rest)
    side, level, kind, index, rest = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", key).groups()
    block = int(level) * (layers + 1) + int(index)
    if kind == "downsamplers":
        return f"input_blocks.{(int(level) + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":  # behind the last residual block of its level, and the attention where it has one
        return f"output_blocks.{int(level) * (layers + 1) + layers}.{1 + (int(level) > 0)}.{rest}"
    place = f"input_blocks.{block + 1}" if side == "down" else f"output_blocks.{block}"
    return f"{place}.{int(kind == 'attentions')}.{renamed(rest, RESNET) if kind == 'resnets' else rest}"


def vae_name(key: str) -> str:
    key = renamed(key, VAE_NAMES)
    key = re.sub(r"up_blocks\.(\d)", lambda match: f"up.{VAE_LEVELS - 1 - int(match[1])}", key)  # counted from below
    return key.replace("down_blocks.", "down.")


def as_compvis(key: str, value: Tensor) -> Tensor:
    """Attention of CompVis' VAE is made of 1x1 convolutions."""
    return value[:, :, None, None] if ".attentions." in key and value.ndim == 2 else value


def text_name(key: str) -> str:
    """Attention and feed-forward are blocks of their own, counted together."""
    layer = re.match(r"model\.layers\.(\d)\.", key)
    if layer is None:
        return renamed(key.removeprefix("model."), TEXT_NAMES)
    attention = 2 * int(layer[1])
    rest = renamed(key[layer.end() :], TEXT_NAMES)
    return "attn_layers.layers." + rest.format(a=attention, f=attention + 1)


def renamed(key: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        key = re.sub(rf"(^|\.){re.escape(old)}", rf"\g<1>{new}", key)
    return key


def compvis_yaml() -> dict:
    """What describes `tiny_ldm(text_heads=8)`."""
    vae = {"double_z": True, "z_channels": 4, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1] * VAE_LEVELS,
           "num_res_blocks": LAYERS, "attn_resolutions": []}  # fmt: skip
    unet = {"image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "attention_resolutions": [1],
            "num_res_blocks": LAYERS, "channel_mult": [1, 2], "num_heads": 4, "use_spatial_transformer": True,
            "transformer_depth": 1, "context_dim": 32, "legacy": False}  # fmt: skip
    params = {
        "linear_start": 0.00085, "linear_end": 0.012, "timesteps": 1000, "image_size": 8, "scale_factor": 0.18215,
        "unet_config": {"params": unet},
        "first_stage_config": {"params": {"embed_dim": 4, "ddconfig": vae}},
        "cond_stage_config": {"params": {"n_embed": 32, "n_layer": 2}},
    }  # fmt: skip
    return {"model": {"params": params}}


def write_compvis(path: Path, weights: dict[str, Tensor], description: dict) -> dict[str, str]:
    """model.ckpt, model.yaml and the tokenizer's folder: arguments of `load_text_to_image`."""
    torch.save({"state_dict": weights, "global_step": 3}, path / "model.ckpt")
    (path / "model.yaml").write_text(yaml.safe_dump(description))
    (path / "bert").mkdir()
    (path / "bert" / "vocab.txt").write_text("\n".join(BERT_WORDS) + "\n")
    return {"source": str(path / "model.ckpt"), "yaml": str(path / "model.yaml"), "tokenizer": str(path / "bert")}
