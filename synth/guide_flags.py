"""GUIDE's command-line flags as keys of an experiment file, in the words of its diffusion run and ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from utils.errors import ConfigError


def is_true(value: Any) -> bool:
    """A flag as a boolean or as the word that a command line has for one.

    Raises:
        ValueError: for any other word.
    """
    word = str(value).lower()
    if word not in ("true", "false", "1", "0", "yes", "no"):
        raise ValueError("use true or false")
    return word in ("true", "1", "yes")


# Their flag: our key, and how its value reads there.
RENAMED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "num_res_blocks": ("layers_per_block", int),
    "num_head_channels": ("attention_head_dim", int),
    "resblock_updown": ("resample", lambda value: "resnet" if is_true(value) else "conv"),
    "train_aug": ("flip", is_true),
    "use_ddim": ("sampler", lambda value: "ddim" if is_true(value) else "ddpm"),
}
# Switches of which every published command takes one value, the only one that there is here.
FIXED = {
    "embedding_kind": "concat_time_1hot", "use_scale_shift_norm": "true", "learn_sigma": "false",
    "noise_schedule": "linear", "predict_xstart": "false", "rescale_timesteps": "false", "class_cond": "true",
    "clip_denoised": "true",
}  # fmt: skip
# Of no effect on results: where and how often is written, memory layout, the switch between its two programs.
IDLE = {
    "use_new_attention_order", "use_checkpoint", "save_interval", "log_interval", "cl_method",
    "train_with_disjoint_classifier", "wandb_experiment_name", "wandb_project_name", "wandb_online", "microbatch",
}  # fmt: skip


def translate(raw: dict[str, Any]) -> dict[str, Any]:
    """The keys of a diffusion run with GUIDE's names replaced by ours.

    Raises:
        ConfigError: if a flag and our key for it are both given with different values, if a switch has a value that
            is not there, or if ``num_channels`` comes without ``channel_mult``.
    """
    kept = drop_switches(raw)
    for flag, (key, read) in RENAMED.items():
        if kept.get(flag) is not None:
            _put(kept, flag, key, _read(flag, kept[flag], read))
        kept.pop(flag, None)
    width, factors = kept.pop("num_channels", None), kept.pop("channel_mult", None)
    if width is not None or factors is not None:
        if width is None or factors is None:
            raise ConfigError("synth.num_channels and synth.channel_mult go together: give both or block_out_channels")
        widths = [int(width) * int(factor) for factor in _items(factors)]
        kept["num_channels"] = width
        _put(kept, "num_channels", "block_out_channels", widths)
        del kept["num_channels"]
    return kept


def drop_switches(raw: dict[str, Any], own: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The keys without those of no effect and those that have one value alone.

    Args:
        raw: keys of a diffusion or a classifier run.
        own: keys that mean something to the caller.

    Raises:
        ConfigError: if a switch has another value.
    """
    for flag in FIXED.keys() & raw.keys() - own:
        if raw[flag] is not None and str(raw[flag]).lower() != FIXED[flag]:
            raise ConfigError(f"{flag}={raw[flag]!r}: only {FIXED[flag]!r} is there, as in all published settings")
    return {key: value for key, value in raw.items() if key in own or key not in {*FIXED, *IDLE}}


def _read(flag: str, value: Any, read: Callable[[Any], Any]) -> Any:
    try:
        return read(value)
    except ValueError as error:
        raise ConfigError(f"synth.{flag}={value!r}: {error}") from error


def _put(kept: dict[str, Any], flag: str, key: str, value: Any) -> None:
    if kept.get(key) not in (None, value):
        raise ConfigError(f"synth.{flag}={kept[flag]!r} and synth.{key}={kept[key]!r} are one key: keep one of them")
    kept[key] = value


def _items(values: Any) -> list[Any]:
    return values.split(",") if isinstance(values, str) else list(values)
