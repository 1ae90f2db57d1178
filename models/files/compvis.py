"""Checkpoints of CompVis' latent diffusion code, a .ckpt and its YAML, taken apart into diffusers' networks."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.files.diffusers_folder import LDM_SCHEDULE, check_tokenizer
from models.files.diffusers_parts import TextToImageParts, read_tokenizer
from models.files.weights import load_exactly, read_weights
from utils.run.errors import ConfigError, WeightsError

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
VAE_PARTS = tuple(VAE + part for part in ("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))  # no losses
TEXT_HEADS = 8  # BERTEmbedder's; shapes tell heads times width alone
# Side of the latents of text2img-large. The YAML's image_size is not read: it stands there with 8, 32 and 64.
LATENT_SIDE = 32

# What the conversion reads of the YAML, below model.params.
NEEDED = (
    *(f"unet_config.params.{key}" for key in (
        "model_channels", "in_channels", "out_channels", "context_dim", "attention_resolutions", "num_res_blocks",
        "channel_mult", "num_heads", "transformer_depth",
    )),
    *(f"first_stage_config.params.ddconfig.{key}" for key in (
        "ch", "in_channels", "z_channels", "ch_mult", "num_res_blocks", "out_ch",
    )),
    "cond_stage_config.params.n_embed", "cond_stage_config.params.n_layer", "linear_start", "linear_end", "timesteps",
    "scale_factor",
)  # fmt: skip
# One weight of each part, by which such a checkpoint is known.
SHOWN = (UNET + "out.2.weight", VAE + "post_quant_conv.weight", TEXT + "token_emb.weight")
# A key that gives another kind of model away.
FOREIGN = {
    "cond_stage_model.transformer.text_model.": "Stable Diffusion 1.x",
    "cond_stage_model.model.": "Stable Diffusion 2.x",
    "conditioner.embedders.": "Stable Diffusion XL",
    "denoise_fn.": "a diffusion model in pixels",
    "unet.": "a model in the names of diffusers",
}
# CompVis' names of the text encoder to those of LDMBertEncoder. Blocks 2i are attention, 2i + 1 feed-forward.
TEXT_NAMES = {"token_emb.": "embed_tokens.", "pos_emb.emb.": "embed_positions.", "norm.": "layer_norm."}
ATTENTION_NAMES = {
    "0.": "self_attn_layer_norm.",
    "1.to_q.": "self_attn.q_proj.",
    "1.to_k.": "self_attn.k_proj.",
    "1.to_v.": "self_attn.v_proj.",
    "1.to_out.": "self_attn.out_proj.",
}
FEED_FORWARD_NAMES = {"0.": "final_layer_norm.", "1.net.0.0.": "fc1.", "1.net.2.": "fc2."}


def check_checkpoint(path: str, yaml: str | None, tokenizer: str, offline: bool, key: str = "path") -> None:
    """See that checkpoint, YAML and tokenizer are there; no weights are read.

    Raises:
        WeightsError: if the checkpoint or the tokenizer is absent.
        ConfigError: if the YAML is absent or is none of a latent diffusion model.
    """
    if not Path(path).is_file():
        raise WeightsError(
            f"{key}={path!r}: there is no such file. Put text2img-large's model.ckpt there, or name the hub id "
            "CompVis/ldm-text2im-large-256, which needs no YAML"
        )
    read_yaml(yaml)
    check_tokenizer(tokenizer, "vocab.txt", "bert-base-uncased", offline)


def read_checkpoint(path: str, yaml: str | None, tokenizer: str, offline: bool) -> TextToImageParts:
    """Read and convert a checkpoint; every weight must find its place.

    Args:
        path: .ckpt or .safetensors with CompVis' names.
        yaml: that describes it.
        tokenizer: folder or hub id of the text encoder's BERT tokenizer.
        offline: fetch nothing.

    Raises:
        WeightsError: if a file is absent, is a pickle with code, or is of another architecture.
        ConfigError: if the YAML is wrong or contradicts the checkpoint.
    """
    check_checkpoint(path, yaml, tokenizer, offline)
    params = read_yaml(yaml)
    weights = read_weights(path)
    _check_architecture(weights, path)
    _check_buffers(params, weights, yaml)
    unet, vae = _convert_unet(params, weights, path), _convert_vae(params, weights, path)
    text_encoder = _convert_text_encoder(params, weights, path)
    return TextToImageParts(
        vae, text_encoder, read_tokenizer(tokenizer, "BertTokenizerFast", offline), unet, _schedule(params), LATENT_SIDE
    )


# ---------------------------------------------------------------------- the YAML


def read_yaml(path: str | None) -> dict[str, Any]:
    """The section model.params of a CompVis YAML, with all that the conversion needs.

    Raises:
        ConfigError: if there is no such file, or a key is missing.
    """
    import yaml

    if path is None:
        raise ConfigError("yaml is missing: a checkpoint file needs its CompVis YAML, such as the one in exps/ldm")
    try:
        params = yaml.safe_load(Path(path).read_text(encoding="utf-8"))["model"]["params"]
    except FileNotFoundError as error:
        raise ConfigError(f"yaml={path!r}: there is no such file; exps/ldm holds the one of text2img-large") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"yaml={path!r} cannot be read as YAML: {error}") from error
    except (KeyError, TypeError) as error:
        raise ConfigError(f"yaml={path!r} has no section model.params: is it in CompVis' form?") from error
    for key in NEEDED:
        _value(params, key, path)
    return params


def _value(params: Any, key: str, path: str) -> Any:
    for part in key.split("."):
        if not isinstance(params, dict) or part not in params:
            raise ConfigError(f"yaml={path!r}: model.params.{key} is missing; the one in exps/ldm shows all keys")
        params = params[part]
    return params


def _schedule(params: dict[str, Any]) -> dict[str, Any]:
    return LDM_SCHEDULE | {
        "num_train_timesteps": params["timesteps"],
        "beta_start": params["linear_start"],
        "beta_end": params["linear_end"],
    }


# ---------------------------------------------------------------------- the checkpoint against it


def _check_architecture(weights: dict[str, Tensor], path: str) -> None:
    absent = [key for key in SHOWN if key not in weights]
    if not absent:
        return
    kind = next((name for prefix, name in FOREIGN.items() if any(key.startswith(prefix) for key in weights)), None)
    raise WeightsError(
        f"{path} is {kind or 'no latent diffusion model with a BERT text encoder'}: it has {len(weights)} weights, but "
        f"lacks {absent[0]}. Use text2img-large's model.ckpt here; a Stable Diffusion is read from its hub id or from "
        "its diffusers folder"
    )


def _check_buffers(params: dict[str, Any], weights: dict[str, Tensor], path: str) -> None:
    """Compare the YAML's numbers with those that CompVis keeps beside the weights; no shape would show a mistake."""
    found = {}
    if (betas := weights.get("betas")) is not None:
        found = {
            "timesteps": (len(betas), f"betas ({len(betas)},)"),
            "linear_start": (betas[0].item(), "betas[0]"),
            "linear_end": (betas[-1].item(), "betas[-1]"),
        }
    if "scale_factor" in weights:
        found["scale_factor"] = (weights["scale_factor"].item(), "scale_factor")
    for key, (there, where) in found.items():
        claimed = params[key]
        if not isinstance(claimed, (int, float)) or abs(claimed - there) > 1e-4 * abs(there):
            raise ConfigError(
                f"yaml={path!r} does not belong to this checkpoint: it says model.params.{key}: {claimed}, the "
                f"checkpoint {there:.6g} ({where})"
            )


# ---------------------------------------------------------------------- conversion


def _convert_unet(params: dict[str, Any], weights: dict[str, Tensor], path: str) -> nn.Module:
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, create_unet_diffusers_config_from_ldm

    section = {key: value for key, value in weights.items() if key.startswith(UNET)}
    config = create_unet_diffusers_config_from_ldm({"model": {"params": params}}, section)
    # The library takes every checkpoint for one of 512 pixels.
    config["sample_size"] = LATENT_SIDE
    return fill(lambda: UNet2DConditionModel.from_config(config), convert_ldm_unet_checkpoint, config, section, path)


def _convert_vae(params: dict[str, Any], weights: dict[str, Tensor], path: str) -> nn.Module:
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint, create_vae_diffusers_config_from_ldm

    section = {key: value for key, value in weights.items() if key.startswith(VAE_PARTS)}
    config = create_vae_diffusers_config_from_ldm({"model": {"params": params}}, section)
    return fill(lambda: AutoencoderKL.from_config(config), convert_ldm_vae_checkpoint, config, section, path)


def _convert_text_encoder(params: dict[str, Any], weights: dict[str, Tensor], path: str) -> nn.Module:
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertEncoder

    head = TEXT + "to_logits."  # a vocabulary head that nobody uses
    section = {key: value for key, value in weights.items() if key.startswith(TEXT) and not key.startswith(head)}
    text = params["cond_stage_config"]["params"]
    try:
        config = LDMBertConfig(
            vocab_size=len(section[TEXT + "token_emb.weight"]), d_model=text["n_embed"], encoder_layers=text["n_layer"],
            dropout=0.0,
            max_position_embeddings=len(section[TEXT + "pos_emb.emb.weight"]), encoder_attention_heads=TEXT_HEADS,
            head_dim=len(section[TEXT + "attn_layers.layers.0.1.to_q.weight"]) // TEXT_HEADS,
            encoder_ffn_dim=len(section[TEXT + "attn_layers.layers.1.1.net.0.0.weight"]),
        )  # fmt: skip
    except KeyError as error:
        raise _lacks(path, error) from error
    return fill(lambda: LDMBertEncoder(config), _rename_text, config, section, path)


def fill(
    build: Callable[[], nn.Module],
    convert: Callable,
    config: Any,
    section: dict[str, Tensor],
    path: str,
    wanted: str = "that the YAML describes",
    hint: str = "Use the YAML that came with the checkpoint, or fetch the checkpoint again",
) -> nn.Module:
    """A network with the converted weights of one section of a checkpoint, each of which must have been used.

    diffusers' own ``from_single_file`` would not say which weights are missing, nor that some were left over.

    Args:
        build: makes the network, on the meta device unless it says otherwise.
        convert: gives diffusers' names to a section of this config.
        config: of the network.
        section: weights under CompVis' names.
        path: where they come from, for the message.
        wanted: which network it must be, for the message.
        hint: what the user may do.

    Raises:
        WeightsError: if a weight is missing, misshapen or left over.
    """
    try:
        converted = {key: value for key, value in convert(section, config).items() if value is not None}
    except KeyError as error:
        raise _lacks(path, error) from error
    used = {tensor.data_ptr() for tensor in converted.values()}
    left_over = {key: tensor for key, tensor in section.items() if tensor.data_ptr() not in used}
    with torch.device("meta"):  # nothing is drawn at random first, and no weight is there twice
        network = build()
    load_exactly(
        network, converted | left_over, path, what=f"the {type(network).__name__} {wanted}", hint=hint, assign=True
    )
    return network


def _lacks(path: str, error: KeyError) -> WeightsError:
    return WeightsError(f"{path} lacks the weight {error.args[0]}: fetch the checkpoint again")


def _rename_text(section: dict[str, Tensor], _config: Any) -> dict[str, Tensor]:
    return {_text_name(key.removeprefix(TEXT)): value for key, value in section.items()}


def _text_name(key: str) -> str:
    block = re.match(r"attn_layers\.layers\.(\d+)\.", key)
    index = int(block[1]) if block else 0
    names = (FEED_FORWARD_NAMES if index % 2 else ATTENTION_NAMES) if block else TEXT_NAMES
    rest = key[block.end() :] if block else key
    for old, new in names.items():
        if rest.startswith(old):
            return (f"layers.{index // 2}." if block else "") + new + rest.removeprefix(old)
    return key  # nobody's; it is counted as unexpected
