"""Tiny experiments for tests: six classes of 8x8 stripes, networks and trainings that take a blink."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from learners import LEARNERS
from learners.run.configure import build_config
from learners.run.experiment import Experiment
from synth import SOURCES
from synth.escort.copies import Copied
from synth.replay import Replay
from tests.support.tiny_controlnet import tiny_controlnet_folders
from tests.support.tiny_ldm import tiny_ldm_folder
from utils.data.datasets import Dataset
from utils.data.images import ImageSet
from utils.run.config import RunConfig
from utils.run.errors import ConfigError
from utils.run.folder import claim_folder, claim_machine
from utils.training import seeding
from utils.training.runtime import Runtime

# The smallest settings of every source; a new source adds its own here and is then under contract.
TINY_SOURCES = {
    "controlnet": {
        "base": lambda: tiny_controlnet_folders()[0], "controlnet": lambda: tiny_controlnet_folders()[1],
        "short_side": 8, "grid": 8, "sample_steps": 2, "guidance": 2.0, "sample_batch": 4, "syn_per_class": 3,
    },
    "d4m": {
        "ldm_ckpt": tiny_ldm_folder, "ipc": 2, "sample_steps": 2, "guidance": 2.0, "sample_batch": 4,
        "syn_per_class": 3,
    },
    "ddpm": {
        "block_out_channels": [8, 8], "layers_per_block": 1, "attention_levels": [], "attention_head_dim": 8,
        "norm_num_groups": 4, "first_task_num_steps": 3, "num_steps": 3, "batch_size": 8, "ema_rate": 0.5,
        "timestep_respacing": "ddim2", "sample_batch": 4, "syn_per_class": 3,
    },
    "feature_diffusion": {
        "blocks": 1, "width": 16, "train_steps": 6, "batch_size": 8, "ema_rate": 0.5, "timestep_respacing": "ddim2",
        "omega": 0.5, "sample_batch": 4, "syn_per_class": 3,
    },
    "cbdm": {
        "block_out_channels": [8, 8], "layers_per_block": 1, "attention_levels": [1], "norm_num_groups": 4,
        "first_task_num_steps": 3, "num_steps": 3, "batch_size": 8, "warmup_steps": 1, "ema_rate": 0.5,
        "timestep_respacing": "3", "sample_batch": 4, "syn_per_class": 3,
    },
    "ldm": {
        "ldm_ckpt": tiny_ldm_folder,  # a function: the model is made when it is first asked for
        "samples_per_class": 12, "g_local_bs": 6, "sample_steps": 2, "guidance": 2.0, "sample_batch": 4,
        "syn_per_class": 3,
    },
    "small_controlnet": {
        "map_size": 16, "block_out_channels": [8, 8], "norm_num_groups": 4, "unet_steps": 3, "control_steps": 3,
        "batch_size": 8, "ema_rate": 0.5, "sample_steps": 2, "sample_batch": 4, "syn_per_class": 3,
    },
    "small_ldm": {
        "vae_channels": [8, 8], "vae_steps": 3, "vae_batch_size": 8, "block_out_channels": [8], "attention_levels": [0],
        "num_heads": 2, "norm_num_groups": 2, "vector_size": 8, "num_tokens": 2, "unet_steps": 3, "unet_batch_size": 8,
        "ema_rate": 0.5, "samples_per_class": 12, "g_local_bs": 6, "sample_steps": 2, "sample_batch": 4,
        "syn_per_class": 3,
    },
}  # fmt: skip
TINY_SOURCES["small_d4m"] = {**TINY_SOURCES["small_ldm"], "ipc": 2}
TINY_GUIDE = {
    "convnet_type": "resnet20", "classifier_init_lr": 0.05, "disjoint_classifier_init_num_steps": 30,
    "disjoint_classifier_num_steps": 4, "classifier_scale_min_new": 1.0, "guid_generation_interval": 3,
    "timestep_respacing": "ddim2", "classifier_augmentation": False,
}  # fmt: skip
# What learners need that resnet20 and `TINY_TRAINING` do not serve.
TINY_LEARNERS = {
    "asp": {
        "convnet_type": "vit_tiny_patch16_224", "pretrained": False,
        "backbone_args": {"patch_size": 2, "embed_dim": 48, "depth": 2, "num_heads": 2},
        "pretrain_epochs": 8, "pretrain_batch_size": 8, "tuned_epoch": 2, "fs_epoch": 2, "fs_batch_size": 8,
    },
    "dddr": {"com_round": 2, "local_ep": 1, "lr": 0.02, "scl_hidden": 8, "scl_size": 4},
    "guide": TINY_GUIDE,
    "guide_joint": TINY_GUIDE,
    "agem": {"memory_batch_size": 8},
    "crt": {"head_batch_size": 8, "head_lr": 0.05},
    "tdfa": {"head_batch_size": 8, "head_epochs": 2},
    "distilled": {"epochs": 20},
    "er": {"memory_batch_size": 8},
    "task_arithmetic": {"anchor": "first_task"},
    "fecam": {"pretrain_epochs": 8, "pretrain_batch_size": 8, "init_epoch": 0},
    "ranpac": {"pretrain_epochs": 8, "pretrain_batch_size": 8, "init_epoch": 0, "M": 64},
    "simplecil": {"pretrain_epochs": 8, "pretrain_batch_size": 8, "init_epoch": 0},
}  # fmt: skip
TINY_TRAINING = {"init_epoch": 2, "epochs": 2, "init_lr": 0.05, "lrate": 0.05, "batch_size": 16}


class Interrupted(Exception):
    """Stands for a kill."""


def interrupt(*call: Any, **keys: Any) -> None:
    """Stands where a run is to be killed."""
    raise Interrupted


def without_clock(results: dict[str, Any]) -> dict[str, Any]:
    """Results but for what two runs of the same bits may differ in."""
    counts = [{part: (each["evaluations"], each["flops"]) for part, each in costs.items()}
              for costs in results["cost"]["tasks"]]  # fmt: skip
    left_out = ("seconds", "train_seconds", "command", "cost")
    return {**{key: value for key, value in results.items() if key not in left_out}, "counts": counts}


def without_cost(results: dict[str, Any]) -> dict[str, Any]:
    """Results but for what two runs may differ in that get the same bits by another work."""
    return {key: value for key, value in without_clock(results).items() if key != "counts"}


def toy_images(per_class: int, num_classes: int, key: str) -> ImageSet:
    """Stripes whose row tells the class, under noise."""
    labels = torch.arange(num_classes).repeat_interleave(per_class)
    noise = torch.randint(0, 80, (len(labels), 1, 8, 8), generator=seeding.generator("toy", key))
    noise[torch.arange(len(labels)), 0, labels] += 170
    return ImageSet.of(noise.to(torch.uint8), labels)


def toy_dataset(num_classes: int = 6, per_class: int = 10) -> Dataset:
    """A data set that learners can really learn."""
    return Dataset(
        name="toy", train=toy_images(per_class, num_classes, "train"), test=toy_images(4, num_classes, "test"),
        class_names=[f"row {label}" for label in range(num_classes)], image_size=8, channels=1, in_memory=True,
        mean=(0.2, 0.2, 0.2), std=(0.3, 0.3, 0.3), augmentation="none", source="made for tests",
    )  # fmt: skip


def tiny_source(name: str) -> dict[str, Any]:
    """The nested object `synth` of a source's smallest settings."""
    settings = TINY_SOURCES[name].items()
    return {"name": name, **{key: value() if callable(value) else value for key, value in settings}}


def goes_with(learner: type, source: type) -> bool:
    """Whether a learner can replay from a source."""
    if source.samples not in learner.accepts:
        return False
    try:
        (learner.replay_kind or Replay).check(SimpleNamespace(model_name="", synth=SimpleNamespace(name="")), source)
    except ConfigError:
        return False
    return True


def toy_raw(learner: str, folder: Path, source: str | None = None, **keys: Any) -> dict[str, Any]:
    """An experiment's JSON object."""
    raw = {
        "model_name": learner, "dataset": "toy", "init_cls": 2, "increment": 2, "convnet_type": "resnet20",
        "memory_size": 12, "device": "cpu", "precision": "fp32", "seed": 7, "output_dir": str(folder / "outputs"),
    }  # fmt: skip
    known = LEARNERS[learner].Config.model_fields
    raw |= {key: value for key, value in TINY_TRAINING.items() if key in known}
    raw |= TINY_LEARNERS.get(learner, {})
    if source is not None:
        raw["synth"] = tiny_source(source)
        if SOURCES[source].usual_replay is Copied:  # whose maps take their share of a fixed number per class
            raw |= {"fixed_memory": True, "memory_per_class": 3}
    return {**raw, **keys}


def toy_experiment(learner: str, folder: Path, source: str | None = None, data=None, **keys: Any) -> Experiment:
    """An experiment on the toy data, its folder claimed, ready to run; some source stands in where one is needed."""
    if source is None and LEARNERS[learner].needs_source:
        source = "ddpm" if "images" in LEARNERS[learner].accepts else "feature_diffusion"
    return experiment_of(build_config(toy_raw(learner, folder, source, **keys))[0], data)


def experiment_of(config: RunConfig, data: Dataset | None = None) -> Experiment:
    """An experiment of a config on the toy data, its folder claimed, ready to run."""
    runtime = Runtime(config.device, config.precision)
    claim_machine(claim_folder(config, "toy", overwrite=False), runtime)
    return Experiment(config, "toy", config.seed[0], data or toy_dataset(), runtime)
