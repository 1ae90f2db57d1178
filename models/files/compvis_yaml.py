"""The YAML beside a checkpoint of CompVis' code: what it says is honoured, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveFloat, PositiveInt, TypeAdapter, ValidationError, conlist

from utils.run.errors import ConfigError
from utils.run.registry import nearest
from utils.run.words import parse_yaml

# What model.params may say, by section: of which kind or value each named thing is, so that our networks and their
# noise are those of the original. Sizes and rates must be said. The UNet takes no other keys; elsewhere they change
# neither.
UNET, TEXT = "unet_config.params.", "cond_stage_config.params."
KEYS: dict[str, dict[Any, str]] = {
    UNET: {
        PositiveInt: "model_channels in_channels out_channels context_dim num_res_blocks num_heads transformer_depth",
        list[PositiveInt]: "attention_resolutions channel_mult", Literal[-1]: "num_head_channels", Literal[2]: "dims",
        Literal[True]: "use_spatial_transformer conv_resample", Literal[None]: "num_classes n_embed",
        Literal[False]: "use_scale_shift_norm resblock_updown use_fp16",
        Any: "image_size dropout use_checkpoint legacy num_heads_upsample use_new_attention_order",
    },
    "first_stage_config.params.ddconfig.": {
        PositiveInt: "ch in_channels z_channels num_res_blocks out_ch", list[PositiveInt]: "ch_mult",
        Literal[True]: "double_z resamp_with_conv", conlist(int, max_length=0): "attn_resolutions",
    },
    TEXT: {PositiveInt: "n_embed n_layer", Literal[77]: "max_seq_len", Literal[30522]: "vocab_size"},
    "": {
        PositiveFloat: "linear_start linear_end scale_factor", PositiveInt: "timesteps", Literal["l2"]: "loss_type",
        Literal[4]: "channels first_stage_config.params.embed_dim", Literal["crossattn"]: "conditioning_key",
        Literal["eps"]: "parameterization", Literal["linear"]: "beta_schedule", Literal[None]: "given_betas",
        Literal[0]: "original_elbo_weight logvar_init embedding_reg_weight", Literal[1]: "l_simple_weight",
        Literal[False]: "use_ema scale_by_std learn_logvar use_positional_encodings",
        Literal["ldm.models.autoencoder.AutoencoderKL"]: "first_stage_config.target",
        Literal["ldm.modules.encoders.modules.BERTEmbedder"]: "cond_stage_config.target",
    },
}  # fmt: skip
DEEPEST = 50  # sections in each other
NEEDED = (PositiveInt, list[PositiveInt], PositiveFloat)
KINDS = {f"model.params.{section}{name}": kind
         for section, kinds in KEYS.items() for kind, names in kinds.items() for name in names.split()}  # fmt: skip


def load_yaml(path: str) -> dict[str, Any]:
    """Read a YAML of sections.

    Raises:
        ConfigError: if there is no such file, or something else is in it.
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        depth = 0
        for event in yaml.parse(text):  # piece by piece, so that no file takes long
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("what *name stands for may be of any size: write it out")
            if depth > DEEPEST:
                raise ValueError("its sections lie too deep in each other")
        content = parse_yaml(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"yaml={path!r} is unreadable ({' '.join(str(error).split())}); see exps/ldm") from error
    if not isinstance(content, dict):
        raise ConfigError(f"yaml={path!r} holds a {type(content).__name__}, not sections such as the one in exps/ldm")
    return content


def flatten(content: Any, name: str = "") -> dict[str, Any]:
    """Return what a YAML says by dotted names, such as model.params.timesteps; an empty section says nothing."""
    if not isinstance(content, dict):
        return {name: content}
    inner = (flatten(value, f"{name}.{key}".lstrip(".")) for key, value in content.items())
    return {key: value for said in inner for key, value in said.items()}


def read_yaml(path: str | None) -> dict[str, Any]:
    """Read the section model.params of a CompVis YAML, with all that the conversion needs.

    Raises:
        ConfigError: if there is no such file, or a key is missing, unknown, or says what we cannot draw with.
    """
    if path is None:
        raise ConfigError("yaml is missing: a checkpoint file needs its CompVis YAML, such as the one in exps/ldm")
    content = load_yaml(path)
    said = flatten(content)
    if absent := [key for key, kind in KINDS.items() if kind in NEEDED and key not in said]:
        raise ConfigError(f"yaml={path!r}: {absent[0]} is missing; the one in exps/ldm shows all keys")
    for key, value in said.items():
        if UNET in key and key not in KINDS:
            raise ConfigError(f"yaml={path!r}: unknown key {key!r}{nearest(key, KINDS)}")
        try:
            TypeAdapter(KINDS.get(key, Any)).validate_python(value, strict=True)
        except ValidationError as error:
            raise ConfigError(f"yaml={path!r}: {key}: {value!r} is not ours: {error.errors()[0]['msg']}") from error
    return content["model"]["params"]
