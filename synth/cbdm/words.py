"""CBDM's command-line flags as keys of an experiment file, or as a flagfile of absl that is given in its place.

A file that has one of its telling flags is a command of CBDM's: a generator that learns a long tail. Here it fills that
tail for a classifier too (``fill``). What the file says in our own words inside `synth` wins.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from synth.ddpm.words import drop_switches, is_true, whole
from utils.run.errors import ConfigError
from utils.run.registry import shown
from utils.run.words import WORDS, Words, put_once

NAME = "cbdm"
FLAGS = yaml.safe_load(Path(__file__).with_name("flags.yaml").read_text(encoding="utf-8"))


def read_flags(raw: dict[str, Any]) -> dict[str, Any]:
    """Turn a file in CBDM's words into an experiment on its data set with the source `cbdm`; leave any other alone.

    Raises:
        ConfigError: if a flag cannot be read, a switch has a value that is not there, flags contradict each other or
            `synth` names another source.
    """
    synth = raw.get("synth") or {}
    if not {*FLAGS["telling"]} & raw.keys() or not isinstance(synth, dict):
        return raw
    if str(synth.get("name", NAME)).lower() != NAME:
        said = next(f"{flag}={shown(raw[flag])}" for flag in FLAGS["telling"] if flag in raw)
        raise ConfigError(f"{said} is of the source {NAME!r}, and synth.name={shown(synth['name'])}: keep one")
    flags = {flag: value for flag, value in raw.items() if value is not None and flag not in FLAGS["idle"]}
    flags = drop_switches({flag: value for flag, value in flags.items() if flag != "synth"}, FLAGS["fixed"])
    told = {"name": NAME, "fill": True, "counts": "reference", "cfg_dropout": "batch", **_switches(flags)}
    told |= _widths(flags) | _start(flags)
    told |= {key: flags.pop(flag) for flag, key in FLAGS["renamed"].items() if flag in flags}
    if (root := flags.pop("root", None)) is not None:
        put_once(flags, "data_dir", root, f"root={shown(root)}", "data_dir")
    return {"model_name": "finetune", "shuffle": False, **_data(flags), "synth": told | synth}


def _take(flags: dict[str, Any], flag: str, default: Any, read: Callable[[Any], Any]) -> Any:
    """Take a flag out and read it."""
    value = flags.pop(flag, default)
    try:
        return read(value)
    except ValueError as error:
        raise ConfigError(f"{flag}={shown(value)}: {error}") from error


def _switches(flags: dict[str, Any]) -> dict[str, Any]:
    cb, cfg, augm, finetune = (_take(flags, name, False, is_true) for name in ("cb", "cfg", "augm", "finetune"))
    return {"cb": cb, "label_dropout": 0.1 if cfg or cb else 0, "label_prior": "uniform" if finetune else "train",
            "augmentation_probability": 0.12 if augm else 0}  # fmt: skip


def _widths(flags: dict[str, Any]) -> dict[str, Any]:
    factors = flags.pop("ch_mult", [1, 2, 2, 2])
    items = factors if isinstance(factors, list) else str(factors).split(",")
    width = _take(flags, "ch", 128, whole)
    return {"block_out_channels": [width * _take({"ch_mult": item}, "ch_mult", None, whole) for item in items]}


def _start(flags: dict[str, Any]) -> dict[str, Any]:
    """Say where training starts: at the average of a folder of ours, which holds its weights at that step."""
    step, folder = _take(flags, "ckpt_step", 0, whole), flags.pop("finetuned_logdir", "")
    return {"init_weights": folder, "start_step": step} if step and folder else {}  # else the step is evaluation's


def _data(flags: dict[str, Any]) -> dict[str, Any]:
    """Say which data set, in one task of all its classes."""
    if (named := flags.pop("data_type", None)) is None and "dataset" in flags:
        return flags
    sets = FLAGS["data_sets"]
    if (kind := str(named or "cifar100").lower()) not in sets:
        raise ConfigError(f"data_type={shown(named)}: use {', '.join(sets)}, or the key dataset, with init_cls")
    name, is_long_tailed, classes = sets[kind]
    put_once(flags, "dataset", name, f"data_type={shown(kind)}", "dataset")
    tail = flags.pop("imb_factor", 0.01) if is_long_tailed else 1.0
    return {"init_cls": classes, "increment": classes, **flags, "imb_factor": tail}


WORDS.append(Words(NAME, dict(zip(FLAGS["telling"], FLAGS["telling"])), read=read_flags))
