"""Experiment files and `--set`: from JSON, in whichever project's words, to one object in ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from utils.run.config import SourceConfig
from utils.run.errors import ConfigError

ALIASES = {"backbone_type": "convnet_type"}
# Flat keys of the original projects: the source that they imply where they are on, and their name inside `synth`.
SOURCE_KEYS = {
    "need_syn_imgs": ("ldm", "need_syn_imgs"),
    "syn_image_path": ("ldm", "syn_image_path"),
    "ldm_ckpt": ("ldm", "ldm_ckpt"),
    "config": ("ldm", "yaml"),
    "diffusion_pretrained_dir": ("ddpm", "source_dir"),
    # GUIDE names these in the command of its classifier too.
    **{
        key: ("ddpm", key)
        for key in (
            "num_channels",
            "channel_mult",
            "num_res_blocks",
            "num_head_channels",
            "attention_resolutions",
            "resblock_updown",
            "diffusion_steps",
            "first_task_num_steps",
            "num_steps",
            "gr_n_generated_examples_per_task",
        )
    },
}
# ESCORT's keys for the images that it generates.
ESCORT_KEYS = ("augmentation_prob", "augmentations_per_image", "real_per_class", "syn_per_class")
SOURCE_KEYS |= {key: ("controlnet", key) for key in ESCORT_KEYS}
# Sources that take the keys of another one.
RELATIVES = {"controlnet": ("controlnet", "small_controlnet")}
# Keys that the files of PyCIL and FSCIL-ASP carry and nothing reads.
DEAD_KEYS = ("debug", "skip", "print_forget", "top_k", "model_prefix", "user_prefix", "base_model_path")


def read_experiment(path: str | Path) -> dict[str, Any]:
    """The JSON object in an experiment file, with PILOT's spellings replaced.

    Raises:
        ConfigError: if the file is absent, is not JSON (line and column named), or holds no object.
    """
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"no experiment file {path}; the ones that come with Reprise lie in exps/") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the experiment file {path}: {error}") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno}, column {error.colno}: {error.msg}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold one JSON object, not a {type(raw).__name__}")
    return raw


def apply_overrides(raw: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """The object with every `key=value` put in; dots reach into `synth`, values are JSON where they parse as such."""
    result = gather_keys(json.loads(json.dumps(raw)))
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise ConfigError(f"--set {override!r}: write --set key=value")
        *parents, key = path.strip().split(".")
        if not parents:
            key = ALIASES.get(key, key)
            inner = SOURCE_KEYS.get(key, ("", ""))[1]
            if inner in (result.get("synth") or {}):
                parents, key = ["synth"], inner
        target = result
        for parent in parents:
            if not isinstance(target.get(parent), dict):
                target[parent] = {}
            target = target[parent]
        try:
            target[key] = json.loads(text)
        except json.JSONDecodeError:
            target[key] = text
    return merge_aliases(result)


def merge_aliases(raw: dict[str, Any]) -> dict[str, Any]:
    """Replace other spellings of a key by ours; two spellings with different values are an error."""
    return _move_source_keys(_plain_escort(_rename(raw)))


def gather_keys(raw: dict[str, Any]) -> dict[str, Any]:
    """`merge_aliases` of keys to which others may still be added: ESCORT's stay as long as its method is off."""
    result = _rename(raw)
    return result if _plain_escort(result) is not result else _move_source_keys(result)


def _rename(raw: dict[str, Any]) -> dict[str, Any]:
    result = dict(raw)
    for alias, key in ALIASES.items():
        if alias in result:
            value = result.pop(alias)
            if value is None:
                continue
            if result.get(key) not in (None, value):
                raise ConfigError(f"{alias}={value!r} and {key}={result[key]!r} are one key: keep one of them")
            result[key] = value
    return result


def _plain_escort(raw: dict[str, Any]) -> dict[str, Any]:
    """ESCORT's file with its method off: ``real_per_class``, not ``memory_per_class``, is how many images it keeps."""
    given = {key: raw[key] for key in ESCORT_KEYS if key in raw}
    synth = raw.get("synth")
    if isinstance(synth, dict) and synth.get("name") in RELATIVES["controlnet"]:
        return raw
    if not given or given.get("augmentation_prob") or given.get("syn_per_class"):
        return raw
    result = {key: value for key, value in raw.items() if key not in ESCORT_KEYS}
    kept = given.get("real_per_class")
    return result if kept is None else {**result, "memory_per_class": kept}


def _move_source_keys(raw: dict[str, Any]) -> dict[str, Any]:
    """Move the originals' flat keys into `synth`; where all of them are off and there is no source, they stay."""
    result = {key: value for key, value in raw.items() if key not in SOURCE_KEYS}
    flat = {key: value for key, value in raw.items() if key in SOURCE_KEYS and value is not None}
    implied = next((SOURCE_KEYS[key][0] for key, value in flat.items() if _is_on(value)), None)
    given = raw.get("synth")
    if not flat or (given is None and implied is None) or not isinstance(given or {}, dict):
        return {**result, **flat}
    synth = {} if implied is None else {"name": implied}
    synth |= {key: value for key, value in (given or {}).items() if value is not None}
    for key, value in flat.items():
        source, inner = SOURCE_KEYS[key]
        # Keys that every source has, such as syn_image_path, name none; the others belong to theirs alone.
        named = str(synth.get("name", source)).lower()
        if inner not in SourceConfig.model_fields and named not in RELATIVES.get(source, (source,)):
            raise ConfigError(
                f"{key}={value!r} is of the source {source!r}, and synth.name={synth['name']!r}: keep one"
            )
        if str(synth.get(inner, value)).lower() != str(value).lower():  # "true" is true
            raise ConfigError(f"{key}={value!r} and synth.{inner}={synth[inner]!r} are one key: keep one of them")
        synth[inner] = value
    return {**result, "synth": synth}


def _is_on(value: Any) -> bool:
    return bool(value) and str(value).lower() != "false"
