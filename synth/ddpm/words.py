"""GUIDE's command-line flags as keys of an experiment file, in the words of its diffusion run and ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from utils.run.errors import ConfigError
from utils.run.words import WORDS, Words


def is_true(value: Any) -> bool:
    """Read a flag that is a boolean or the word that a command line has for one.

    Raises:
        ValueError: for any other word.
    """
    word = str(value).lower()
    if word not in ("true", "false", "1", "0", "yes", "no"):
        raise ValueError("use true or false")
    return word in ("true", "1", "yes")


def whole(value: Any) -> int:
    """Read a flag that is a whole number.

    Raises:
        ValueError: for anything else.
    """
    if not str(value).strip().isdigit():
        raise ValueError("use a whole number")
    return int(value)


# Their flag: our key, and how its value reads there.
RENAMED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "num_res_blocks": ("layers_per_block", whole),
    "num_head_channels": ("attention_head_dim", whole),
    "resblock_updown": ("resample", lambda value: "resnet" if is_true(value) else "conv"),
    "train_aug": ("flip", is_true),
    "use_checkpoint": ("gradient_checkpointing", is_true),
    "use_ddim": ("sampler", lambda value: "ddim" if is_true(value) else "ddpm"),
}
# Switches of which every published command takes the same values, the only ones that there are here.
FIXED = {
    "embedding_kind": ("concat_time_1hot",), "use_scale_shift_norm": ("true",), "learn_sigma": ("false",),
    "noise_schedule": ("linear",), "predict_xstart": ("false",), "rescale_timesteps": ("false",),
    "class_cond": ("true",), "clip_denoised": ("true",),
    "cl_method": ("generative_replay", "generative_replay_disjoint_classifier_guidance"),
}  # fmt: skip
# Of no effect on results: where and how often is written, memory layout, the switch between its two programs.
IDLE = frozenset({
    "use_new_attention_order", "save_interval", "log_interval", "train_with_disjoint_classifier",
    "wandb_experiment_name", "wandb_project_name", "wandb_online", "microbatch",
})  # fmt: skip
# Flags of the diffusion run that GUIDE names in the command of its classifier too.
SHARED = (
    "num_channels", "channel_mult", "num_res_blocks", "num_head_channels", "attention_resolutions", "resblock_updown",
    "diffusion_steps", "first_task_num_steps", "num_steps", "gr_n_generated_examples_per_task",
)  # fmt: skip

WORDS.append(Words("ddpm", {"diffusion_pretrained_dir": "source_dir", **dict(zip(SHARED, SHARED))}, idle=IDLE))


def translate(raw: dict[str, Any]) -> dict[str, Any]:
    """Replace GUIDE's names in the keys of a diffusion run by ours.

    Raises:
        ConfigError: if a flag cannot be read, if it and our key for it have different values, if a switch has a value
            that is not there, or if ``num_channels`` comes without ``channel_mult``.
    """
    kept = {key: value for key, value in drop_switches(raw).items() if value is not None and key not in IDLE}
    for flag, (key, read) in RENAMED.items():
        if (value := kept.pop(flag, None)) is not None:
            _put(kept, flag, value, key, _read(flag, value, read))
    width, factors = kept.pop("num_channels", None), kept.pop("channel_mult", None)
    if (width is None) != (factors is None):
        raise ConfigError("synth.num_channels and synth.channel_mult go together: give both or block_out_channels")
    if width is not None:
        items = factors if isinstance(factors, list) else str(factors).split(",")
        base = _read("num_channels", width, whole)
        widths = [base * _read("channel_mult", item, whole) for item in items]
        _put(kept, "num_channels", width, "block_out_channels", widths)
    return kept


def drop_switches(raw: dict[str, Any]) -> dict[str, Any]:
    """Leave out of a diffusion or classifier run's keys the switches that have one setting alone.

    Raises:
        ConfigError: if a switch has another value.
    """
    for flag, allowed in FIXED.items():
        if raw.get(flag) is not None and str(raw[flag]).lower() not in allowed:
            raise ConfigError(f"{flag}={raw[flag]!r}: only {' and '.join(allowed)} is there, as in published settings")
    return {key: value for key, value in raw.items() if key not in FIXED}


def _read(flag: str, value: Any, read: Callable[[Any], Any]) -> Any:
    try:
        return read(value)
    except ValueError as error:
        raise ConfigError(f"synth.{flag}={value!r}: {error}") from error


def _put(kept: dict[str, Any], flag: str, given: Any, key: str, value: Any) -> None:
    if kept.get(key) not in (None, value):
        raise ConfigError(f"synth.{flag}={given!r} and synth.{key}={kept[key]!r} are one key: keep one of them")
    kept[key] = value
