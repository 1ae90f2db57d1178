"""`outputs/<run>/` and its neighbours: who owns a folder, and the small files that describe it."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from utils.data.datasets import Dataset
from utils.data.images import ImageSet
from utils.data.manager import DataManager
from utils.run.config import RunConfig
from utils.run.errors import CheckpointError, ConfigError
from utils.run.files import explained_refusal, read_json, require_writable, write_json
from utils.run.log import log
from utils.run.manifest import Manifest
from utils.training.runtime import Runtime
from utils.training.threads import set_threads, take_threads

CONFIG = "config.json"  # of a run: its manifest
DESCRIPTION = "data.json"  # of a seed: its manifest, and what its network expects of images
ENVIRONMENT = "environment.json"  # of a run: packages, device, threads, precision
RESULTS = "results.json"  # of a seed
PACKAGES = ("torch", "torchvision", "timm", "diffusers", "accelerate", "numpy")  # whose versions move last bits


def replay_folder(config: RunConfig, name: str, seed: int) -> Path:
    """Return where the replay images of this seed lie."""
    if config.synth is not None and config.synth.syn_image_path is not None:
        return Path(config.synth.syn_image_path)
    return Path(config.output_dir) / f"syn_image_{name}_{config.seed_tag(seed).replace('_', '', 1)}"


def require_places(config: RunConfig, name: str) -> None:
    """See that the folders which a run fills are there or can be made.

    Raises:
        RepriseError: naming the folder, and what stands in its way.
    """
    places = {"output_dir": Path(config.output_dir) / name}
    if config.synth is not None and config.synth.need_syn_imgs:
        places["synth.syn_image_path"] = replay_folder(config, name, config.seed[0])
    for key, folder in places.items():
        with explained_refusal(f"{key}={str(folder)!r}"):
            require_writable(folder)


def replay_manifest(folder: Path) -> Manifest:
    """Return the manifest by which a folder of replay images is known as this project's."""
    return Manifest(folder, "bank", {}, remedy="give another --name, or move the folder away")


def run_manifest(folder: Path, identity: dict[str, Any] | None, flag: str = "--name") -> Manifest:
    """Return the manifest of a run's folder; ``flag`` is what the user names it with."""
    remedy = f"Give another {flag}, or --overwrite; what is no whole run has to be deleted by hand"
    return Manifest(folder, "run", identity, remedy=remedy, name=CONFIG, error=ConfigError)


def claim_folder(config: RunConfig, name: str, overwrite: bool, flag: str = "--name") -> Path:
    """Make a folder in ``output_dir`` the run's own; a folder of another experiment is refused.

    Args:
        config: of the run.
        name: of the folder.
        overwrite: delete what this project wrote there before, replay images included.
        flag: what the user names the folder with, for messages.

    Raises:
        ConfigError: if the folder holds another setting (the first key that differs is named), or anything that is no
            run.
    """
    folder = Path(config.output_dir) / name
    manifest = run_manifest(folder, {"identity": config.identity()}, flag)
    # What a kill left while the manifest was written is nobody's.
    is_free = folder.is_dir() and all(path.suffix == ".tmp" for path in folder.iterdir())
    if not manifest.exists and os.path.lexists(folder) and not is_free:
        raise ConfigError(f"{folder} holds files, but is no run of Reprise, so it is left alone: give another {flag}")
    if overwrite and manifest.exists:
        draws = config.synth is not None and config.synth.syn_image_path is None
        drawn = [replay_manifest(replay_folder(config, name, seed)) for seed in config.seed if draws]
        ours = [manifest, *(images for images in drawn if images.exists)]
        for each in ours:
            each.read()  # what is foreign or damaged is refused before anything is lost
        for each in ours:
            each.delete()
    manifest.claim(config=config.model_dump(mode="json"))
    return folder


def claim_machine(folder: Path, runtime: Runtime, count_flops: Callable[[], int | None] = lambda: None) -> None:
    """Write `environment.json` at the first start; later ones take its threads and precision, which fix the bits.

    Args:
        folder: of the run.
        runtime: of this process.
        count_flops: of a forward pass of one batch, by which the first start on a CPU chooses its threads.

    Raises:
        CheckpointError: if the file is damaged.
    """
    if not (folder / ENVIRONMENT).exists():
        if runtime.device.type == "cpu":
            take_threads(count_flops())
        return write_json(folder / ENVIRONMENT, describe_machine(runtime))
    stored = read_environment(folder)
    set_threads(stored["threads"])
    runtime.bf16 = stored["precision"] == "bf16"
    here = describe_machine(runtime).items()
    if changed := ", ".join(f"{key} was {stored.get(key)}, is {now}" for key, now in here if stored.get(key) != now):
        log.warning("This run began on another machine or with other packages (%s): its last bits may differ", changed)


def follow_machine(folder: Path) -> None:
    """Take the threads of the run whose folder this is or lies in, so that what is drawn from it has the run's bits.

    Raises:
        CheckpointError: if its `environment.json` is damaged.
    """
    for home in (folder, *folder.parents):
        if (home / ENVIRONMENT).exists():
            return set_threads(read_environment(home)["threads"])


def read_environment(folder: Path) -> dict[str, Any]:
    """Read `environment.json` of a run.

    Raises:
        CheckpointError: if it is damaged.
    """
    remedy = "delete it, and the same command goes on with this machine's threads and precision"
    stored = read_json(folder / ENVIRONMENT, remedy)
    if type(stored.get("threads")) is not int or stored["threads"] < 1 or "precision" not in stored:
        raise CheckpointError(f"{folder / ENVIRONMENT} is damaged (no threads or precision): {remedy}")
    return stored


def describe_machine(runtime: Runtime) -> dict[str, Any]:
    """Say what may move the last bits of a run."""
    gpu = {"gpu": torch.cuda.get_device_name(runtime.device)} if runtime.device.type == "cuda" else {}
    return {"python": platform.python_version(), **{package: version(package) for package in PACKAGES},
            "machine": platform.machine(), "cpu": torch.backends.cpu.get_cpu_capability(),
            "device": str(runtime.device), "threads": torch.get_num_threads(),
            "precision": "bf16" if runtime.bf16 else "fp32", **gpu}  # fmt: skip


def claim_data(folder: Path, data: DataManager, write: bool = True) -> None:
    """See that a seed's folder was begun with this very data, and write what its network expects of images.

    Raises:
        CheckpointError: if class order, classes or images were others when the run began.
    """
    remedy = "Put the data back as it was, or give --overwrite or another --name"
    plain = {key: value for key, value in vars(data.dataset).items() if key not in ("train", "test", "root")}
    manifest = Manifest(folder, "seed", data.fingerprint(), remedy=remedy, name=DESCRIPTION)
    manifest.claim(write=write, view=plain)


def read_data(folder: Path) -> tuple[Dataset, list[str], list[int]]:
    """Read what a seed's folder says of its data: the data set without its images, class names, class order.

    Raises:
        CheckpointError: if it is damaged or absent.
    """
    remedy = "repeat the run with --overwrite"
    stored = Manifest(folder, "seed", remedy=remedy, name=DESCRIPTION).read()
    try:
        dataset = Dataset(**stored["view"], train=ImageSet(), test=ImageSet())
        return dataset, stored["class_names"], stored["class_order"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / DESCRIPTION} is damaged ({error!r}): {remedy}") from error


def read_results(folder: Path) -> dict[str, Any] | None:
    """Read the results of a seed; None if it has none yet, or is not finished.

    Raises:
        CheckpointError: if the file is damaged.
    """
    path = folder / RESULTS
    if not os.path.lexists(path):
        return None
    results = read_json(path, "delete it, and the same command goes on from the last checkpoint")
    return results if results.get("finished") else None


def finished_results(folder: Path) -> list[dict[str, Any]]:
    """Read the results of every finished seed of a run, by seed."""
    found = (read_results(path) for path in folder.glob("seed_*") if path.is_dir())
    return sorted((results for results in found if results is not None), key=lambda results: results["seed"])
