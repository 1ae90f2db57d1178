"""`outputs/<run>/` and its neighbours: who owns a folder, and the small files that describe it."""

from __future__ import annotations

import dataclasses
import json
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from utils.data.datasets import Dataset
from utils.data.images import ImageSet
from utils.data.manager import DataManager
from utils.run.config import RunConfig
from utils.run.errors import CheckpointError, ConfigError
from utils.training.checkpoint import write_json
from utils.training.runtime import Runtime

ENVIRONMENT = "environment.json"  # of a run: packages, device, threads, precision
DESCRIPTION = "data.json"  # of a seed: what its network expects of images


def bank_folder(config: RunConfig, name: str, seed: int) -> Path:
    """Where the replay images of this seed lie."""
    if config.synth.syn_image_path is not None:
        return Path(config.synth.syn_image_path)
    return Path(config.output_dir) / f"syn_image_{name}_{config.seed_tag(seed).replace('_', '', 1)}"


def claim_folder(config: RunConfig, name: str, overwrite: bool, flag: str = "--name") -> Path:
    """The run's folder with its config.json; a folder of another experiment is refused.

    Args:
        config: of the run.
        name: of the folder in ``output_dir``.
        overwrite: delete what is there.
        flag: what the user names the folder with, for messages.

    Raises:
        ConfigError: if the folder holds another setting; the keys that differ are named.
    """
    folder = Path(config.output_dir) / name
    if overwrite and folder.exists():
        if not (folder / "config.json").exists():
            raise ConfigError(f"{folder} is no run of Reprise, so --overwrite leaves it alone: give another {flag}")
        shutil.rmtree(folder)
        if config.synth is not None and config.synth.syn_image_path is None:
            for seed in config.seed:
                shutil.rmtree(bank_folder(config, name, seed), ignore_errors=True)
    path = folder / "config.json"
    if path.exists():
        try:
            stored = json.loads(path.read_text())["identity"]
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{path} is damaged: {error}; give --overwrite or another {flag}") from error
        stored, here = _flat(stored), _flat(config.identity())
        differ = [key for key in {**here, **stored} if here.get(key) != stored.get(key)]
        if differ:
            changes = ", ".join(f"{key} was {stored.get(key)!r} and is {here.get(key)!r}" for key in sorted(differ)[:4])
            raise ConfigError(f"{folder} holds another experiment: {changes}. Give another {flag}, or --overwrite")
    else:
        write_json(path, {"identity": config.identity(), "config": config.model_dump(mode="json")})
    return folder


def _flat(identity: dict[str, Any]) -> dict[str, Any]:
    """With the keys of `synth` beside the others, so that a difference is named by its key."""
    synth = identity.get("synth") or {}
    return {**identity, "synth": bool(synth), **{f"synth.{key}": value for key, value in synth.items()}}


def claim_machine(folder: Path, runtime: Runtime) -> None:
    """Write `environment.json` at the first start; later ones take its threads and precision, which fix the bits."""
    path = folder / ENVIRONMENT
    if path.exists():
        stored = json.loads(path.read_text())
        torch.set_num_threads(stored["threads"])
        runtime.bf16 = stored["precision"] == "bf16"
        return
    packages = ("torch", "torchvision", "timm", "diffusers", "accelerate", "numpy")
    environment = {
        "python": platform.python_version(), **{package: version(package) for package in packages},
        "machine": platform.machine(), "device": str(runtime.device), "threads": torch.get_num_threads(),
        "precision": "bf16" if runtime.bf16 else "fp32",
    }  # fmt: skip
    if runtime.device.type == "cuda":
        environment["gpu"] = torch.cuda.get_device_name(runtime.device)
    write_json(path, environment)


def describe_data(folder: Path, data: DataManager) -> None:
    """Write what classifying and drawing need to know of the data, so that the data itself need not be there."""
    fields = {field.name: getattr(data.dataset, field.name) for field in dataclasses.fields(Dataset)}
    plain = {name: value for name, value in fields.items() if not isinstance(value, ImageSet)}
    described = {"dataset": plain, "class_names": data.class_names, "class_order": data.class_order}
    write_json(folder / DESCRIPTION, described)


def finished_results(folder: Path) -> list[dict[str, Any]]:
    """The results of every finished seed of a run, by seed."""
    found = [json.loads(path.read_text()) for path in folder.glob("seed_*/results.json")]
    return sorted((results for results in found if results["finished"]), key=lambda results: results["seed"])
