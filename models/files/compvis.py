"""Checkpoints of CompVis' latent diffusion code, a .ckpt and its YAML, taken apart into diffusers' networks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from operator import getitem
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
SCHEDULE_KEYS = {"num_train_timesteps": "timesteps", "beta_start": "linear_start", "beta_end": "linear_end"}
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
# CompVis' names of the text encoder's layers to those of LDMBertEncoder. Even blocks (0.) are attention, odd ones (1.)
# feed-forward.
TEXT_NAMES = {
    "token_emb": "embed_tokens", "pos_emb.emb": "embed_positions", "norm": "layer_norm",
    "0.0": "self_attn_layer_norm", "0.1.to_q": "self_attn.q_proj", "0.1.to_k": "self_attn.k_proj",
    "0.1.to_v": "self_attn.v_proj", "0.1.to_out": "self_attn.out_proj",
    "1.0": "final_layer_norm", "1.1.net.0.0": "fc1", "1.1.net.2": "fc2",
}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """Weights of several networks in one file, under CompVis' names, from which diffusers' networks are filled.

    Attributes:
        path: where they come from, for messages.
        weights: by name.
        wanted: which networks they must be of, for messages.
        hint: what the user may do, for messages.
    """

    path: str
    weights: dict[str, Tensor]
    wanted: str = "that the YAML describes"
    hint: str = "Use the YAML that came with the checkpoint, or fetch the checkpoint again"

    def require(self, shown: Iterable[str], kind: str, advice: str) -> None:
        """See that it holds these weights; else it is of another kind.

        Raises:
            WeightsError: if it lacks one.
        """
        if absent := [key for key in shown if key not in self.weights]:
            raise WeightsError(
                f"{self.path} is {kind}: it has {len(self.weights)} weights, but lacks {absent[0]}. {advice}"
            )

    def section(self, prefix: str | tuple[str, ...]) -> dict[str, Tensor]:
        """Return the weights whose names begin so."""
        return {key: value for key, value in self.weights.items() if key.startswith(prefix)}

    def fill(self, network: nn.Module, convert: Callable, section: dict[str, Tensor]) -> nn.Module:
        """Put the converted weights of a section into a network; each of them must be used.

        diffusers' own ``from_single_file`` would not say which weights are missing, nor that some were left over, and
        would fetch its config from the hub.

        Args:
            network: takes the very tensors; build it on the meta device, so that no weight is drawn at random first.
            convert: gives diffusers' names to a section, by the network's config.
            section: weights under CompVis' names.

        Raises:
            WeightsError: if a weight is missing, misshapen or left over.
        """
        try:
            converted = {key: value for key, value in convert(section, network.config).items() if value is not None}
        except KeyError as error:
            raise self.lacks(error.args[0]) from error
        used = {tensor.data_ptr() for tensor in converted.values()}
        left_over = {key: tensor for key, tensor in section.items() if tensor.data_ptr() not in used}
        what = f"the {type(network).__name__} {self.wanted}"
        load_exactly(network, converted | left_over, self.path, what, self.hint, assign=True)
        return network

    def lacks(self, key: str) -> WeightsError:
        """Return the error for a weight that was looked up in vain."""
        return WeightsError(f"{self.path} lacks the weight {key}: fetch the checkpoint again")


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
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders import single_file_utils as names

    check_checkpoint(path, yaml, tokenizer, offline)
    params = read_yaml(yaml)
    checkpoint = Checkpoint(path, read_weights(path))
    _check_architecture(checkpoint)
    _check_buffers(params, checkpoint.weights, yaml)
    original = {"model": {"params": params}}
    unet_config = names.create_unet_diffusers_config_from_ldm(original, checkpoint.section(UNET))
    unet_config["sample_size"] = LATENT_SIDE  # the library takes every checkpoint for one of 512 pixels
    vae_config = names.create_vae_diffusers_config_from_ldm(original, checkpoint.section(VAE_PARTS))
    with torch.device("meta"):
        networks = [
            UNet2DConditionModel(**unet_config), AutoencoderKL(**vae_config), _text_encoder(params, checkpoint)
        ]  # fmt: skip
    head = TEXT + "to_logits."  # a vocabulary head that nobody uses
    text = {key: value for key, value in checkpoint.section(TEXT).items() if not key.startswith(head)}
    unet = checkpoint.fill(networks[0], names.convert_ldm_unet_checkpoint, checkpoint.section(UNET))
    vae = checkpoint.fill(networks[1], names.convert_ldm_vae_checkpoint, checkpoint.section(VAE_PARTS))
    text_encoder = checkpoint.fill(networks[2], _rename_text, text)
    schedule = LDM_SCHEDULE | {name: params[key] for name, key in SCHEDULE_KEYS.items()}
    words = read_tokenizer(tokenizer, "BertTokenizerFast", offline)
    return TextToImageParts(vae, text_encoder, words, unet, schedule, LATENT_SIDE)


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
        try:
            reduce(getitem, key.split("."), params)
        except (LookupError, TypeError) as error:
            raise ConfigError(
                f"yaml={path!r}: model.params.{key} is missing; the one in exps/ldm shows all keys"
            ) from error
    return params


# ---------------------------------------------------------------------- the checkpoint against it


def _check_architecture(checkpoint: Checkpoint) -> None:
    kinds = (kind for prefix, kind in FOREIGN.items() if checkpoint.section(prefix))
    checkpoint.require(
        SHOWN,
        next(kinds, "no latent diffusion model with a BERT text encoder"),
        "Use text2img-large's model.ckpt here; a Stable Diffusion is read from its hub id or from its diffusers folder",
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


# ---------------------------------------------------------------------- the text encoder


def _text_encoder(params: dict[str, Any], checkpoint: Checkpoint) -> nn.Module:
    """A text encoder of the YAML's and the weights' sizes, not yet filled."""
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertEncoder

    text = params["cond_stage_config"]["params"]
    length = {key.removeprefix(TEXT): len(value) for key, value in checkpoint.section(TEXT).items() if value.ndim}
    try:
        config = LDMBertConfig(
            vocab_size=length["token_emb.weight"], d_model=text["n_embed"], encoder_layers=text["n_layer"], dropout=0.0,
            max_position_embeddings=length["pos_emb.emb.weight"], encoder_attention_heads=TEXT_HEADS,
            head_dim=length["attn_layers.layers.0.1.to_q.weight"] // TEXT_HEADS,
            encoder_ffn_dim=length["attn_layers.layers.1.1.net.0.0.weight"],
        )  # fmt: skip
    except KeyError as error:
        raise checkpoint.lacks(TEXT + error.args[0]) from error
    return LDMBertEncoder(config)


def _rename_text(section: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    return {_text_name(key.removeprefix(TEXT)): value for key, value in section.items()}


def _text_name(key: str) -> str:
    layer, (name, _, kind) = "", key.rpartition(".")  # kind: weight or bias
    if block := re.fullmatch(r"attn_layers\.layers\.(\d+)\.(.*)", name):
        index = int(block[1])
        layer, name = f"layers.{index // 2}.", f"{index % 2}.{block[2]}"
    # A name that is nobody's stays; it is counted as unexpected.
    return f"{layer}{TEXT_NAMES[name]}.{kind}" if name in TEXT_NAMES else key
