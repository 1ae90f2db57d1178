"""GUIDE's command-line flags as keys of an experiment file, in the words of its diffusion run and ours.

The part of a file that has ``cl_method`` is a command of GUIDE's: the top its classifier's, `synth` its diffusion
model's. Flags that a command leaves out have GUIDE's defaults there; in any other file they have ours.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from utils.run.config import RunConfig
from utils.run.errors import ConfigError
from utils.run.folder import run_manifest
from utils.run.words import ALIASES, WORDS, Words, put_once


def is_true(value: Any) -> bool:
    """Read a flag that is a boolean or the word that a command line has for one.

    Raises:
        ValueError: for any other word.
    """
    word = str(value).lower()
    if word not in ("true", "t", "yes", "y", "1", "false", "f", "no", "n", "0"):
        raise ValueError("use true or false")
    return word in ("true", "t", "yes", "y", "1")


def whole(value: Any) -> int:
    """Read a flag that is a whole number.

    Raises:
        ValueError: for anything else.
    """
    if not str(value).strip().isdecimal():
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
# The table of all other flags, and what a command means by those that it leaves out.
FLAGS = yaml.safe_load(Path(__file__).with_name("flags.yaml").read_text(encoding="utf-8"))


def read_commands(raw: dict[str, Any]) -> dict[str, Any]:
    """Sort the flags of a file with a command of GUIDE's: those of the data to the top, the diffusion run's to `synth`.

    Raises:
        ConfigError: if a flag has two values, or ``num_tasks`` does not cut one of GUIDE's data sets evenly.
    """
    if not isinstance(raw.get("synth") or {}, dict):
        return raw  # what it should be is said later
    top, synth, of_the_data = dict(raw), dict(raw.get("synth") or {}), FLAGS["of_the_data"]
    if str(top.get("cl_method")).lower() == "generative_replay":  # the diffusion run is all that the file has
        synth = {key: top.pop(key) for key in raw if key not in (*RunConfig.model_fields, *of_the_data)} | synth
    dataset = str(top.get("dataset", synth.get("dataset"))).lower()
    name, num_classes, factors = FLAGS["data_sets"].get(dataset, (None, 0, None))
    if any(part.get("cl_method") is not None for part in (top, synth)):
        learner = {"model_name": "guide"} if top.get("cl_method") is not None else {}
        top = {**learner, "shuffle": False, **_stated(top, "classifier")}
        synth = {"name": "ddpm", "cl_method": "generative_replay", **_stated(synth, "diffusion")}
        for key in [key for key in of_the_data if key in synth]:
            put_once(top, ALIASES.get(key, key), synth[key], f"synth.{key}={synth.pop(key)!r}", key)
        top["dataset"] = name or top.get("dataset")
        if not {"channel_mult", "block_out_channels"} & {*top, *synth}:
            synth["channel_mult"] = factors
        top.setdefault("num_tasks", None if "init_cls" in top else "")
        top["synth"] = None if raw.get("synth", synth) is None else synth  # null: no generator, which is finetuning
    if (num_tasks := top.pop("num_tasks", None)) is not None:
        even = [str(count) for count in range(1, num_classes + 1) if num_classes % count == 0]
        if str(num_tasks) not in even or "init_cls" in top:
            raise ConfigError(f"num_tasks={num_tasks!r}: give init_cls and increment in its place, classes / num_tasks")
        top |= dict.fromkeys(("init_cls", "increment"), num_classes // int(num_tasks))
    return top


def translate(raw: dict[str, Any]) -> dict[str, Any]:
    """Replace GUIDE's names in the keys of a diffusion run by ours.

    Raises:
        ConfigError: if a flag cannot be read, if it and our key for it have different values, if a switch has a value
            that is not there, or if a flag lacks another one.
    """
    kept = {key: value for key, value in drop_switches(raw).items() if value is not None and key not in FLAGS["idle"]}
    command, folder = raw.get("cl_method") is not None, kept.get("source_dir")
    if command and folder is not None and (trained := run_manifest(Path(str(folder)), None)).exists:
        # A classifier's command says how the network is built that it loads, and not how that was trained.
        kept = (trained.read()["config"]["synth"] or {}) | kept
    for flag, (key, read) in RENAMED.items():
        if (value := kept.pop(flag, None)) is not None:
            put_once(kept, key, _read(flag, value, read), f"synth.{flag}={value!r}", f"synth.{key}")
    if command:
        width = {"num_channels": 128} if "channel_mult" in kept or "block_out_channels" not in kept else {}
        kept = complete(width | kept, "diffusion", "synth.")
        kept.setdefault("train_respacing", kept["timestep_respacing"])  # it trains on the steps that it draws with
    width, factors = kept.pop("num_channels", None), kept.pop("channel_mult", None)
    if (width is None) != (factors is None):
        raise ConfigError("synth.num_channels and synth.channel_mult go together: give both or block_out_channels")
    if width is not None:
        items = factors if isinstance(factors, list) else str(factors).split(",")
        widths = [_read("num_channels", width, whole) * _read("channel_mult", item, whole) for item in items]
        put_once(kept, "block_out_channels", widths, f"synth.num_channels={width!r}", "synth.block_out_channels")
    # Of its four heads, each has 64 channels in this UNet; in others, 64 or another number, on every level its own.
    usual = {"block_out_channels": [128, 256, 256, 256], "attention_resolutions": "16,8"}
    if command and "attention_head_dim" not in kept and not usual.items() <= kept.items():
        raise ConfigError("synth.num_head_channels is missing: GUIDE's num_heads=4 is there for its CIFAR UNet alone")
    if "diffusion_steps" in kept and not {"beta_start", "beta_end"} & kept.keys():
        # GUIDE's schedule ends in as much noise, however many steps it has: from 1 / steps to 20 / steps.
        if (steps := _read("diffusion_steps", kept["diffusion_steps"], whole)) <= 20:
            raise ConfigError(f"synth.diffusion_steps={steps}: use 21 or more, or give beta_start and beta_end too")
        kept |= {"beta_start": 1e-3 * (1000 / steps), "beta_end": 2e-2 * (1000 / steps)}
    return kept


def complete(flags: dict[str, Any], program: str, where: str = "") -> dict[str, Any]:
    """Add what GUIDE means by flags that a command of its "classifier" or "diffusion" leaves out.

    Raises:
        ConfigError: if the default of one of these is not known here.
    """
    filled, names = FLAGS[program]["defaults"] | flags, {key: flag for flag, (key, _) in RENAMED.items()}
    missing = [where + names.get(key, key) for key, value in filled.items() if value is None and key != "synth"]
    if missing and "source_dir" not in flags:  # what is loaded was trained in some way or other
        raise ConfigError(f"a command of GUIDE's, which is one by its cl_method, has to say {', '.join(missing)}")
    return filled


def drop_switches(raw: dict[str, Any], fixed: dict[str, list] = FLAGS["fixed"]) -> dict[str, Any]:
    """Leave out of a diffusion or classifier run's keys the switches that have one setting alone.

    Raises:
        ConfigError: if a switch has another value.
    """
    for flag, values in fixed.items():
        allowed = [str(value).lower() for value in values]
        if raw.get(flag) is not None and str(raw[flag]).lower() not in allowed:
            raise ConfigError(f"{flag}={raw[flag]!r}: only {' and '.join(allowed) or 'none'} is there, as published")
    return {key: value for key, value in raw.items() if key not in fixed}


def _stated(flags: dict[str, Any], program: str) -> dict[str, Any]:
    """Leave out flags of a command that its program does not read, or that say that they are not there."""
    kept = drop_switches(flags, FLAGS[program]["fixed"]).items()
    absent, idle = FLAGS["absent"], FLAGS[program]["idle"]
    return {key: value for key, value in kept if key not in idle and str(value) not in ("None", absent.get(key))}


def _read(flag: str, value: Any, read: Callable[[Any], Any]) -> Any:
    try:
        return read(value)
    except ValueError as error:
        raise ConfigError(f"synth.{flag}={value!r}: {error}") from error


ALIASES["dataroot"] = "data_dir"
KEYS = {"diffusion_pretrained_dir": "source_dir", **dict(zip(FLAGS["shared"], FLAGS["shared"]))}
WORDS.append(Words("ddpm", KEYS, idle=frozenset(FLAGS["idle"]), read=read_commands))
