"""The weights after the first task, kept by every run that can share them and taken by others with `init_from`.

Many learners train the first task in the very same way. What made the weights, their recipe, is the identity of their
folder; weights of another recipe are refused, so a run that takes them ends with the same bits as one that trains them
itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from learners.base import Learner
from models.options import backbone_options
from utils.data.manager import Task
from utils.run.errors import CheckpointError, ConfigError
from utils.run.files import file_hash, load_tensors, save_tensors, whole_folder
from utils.run.log import log
from utils.run.manifest import Manifest

INITIAL, NETWORK = "initial", "network.safetensors"
REMEDY = "Set the key as it was there, name another init_from, or leave it out to train"


def train_or_take(learner: Learner, task: Task, train: Callable[[Task], None]) -> None:
    """Train the first task, or take the weights that `init_from` names; keep them for others."""
    made_on = here = _machine(learner)
    if learner.config.init_from is None:
        train(task)
    else:
        manifest = require_initial(learner)
        learner.network.load_numbered_state(load_tensors(manifest.folder / NETWORK))
        made_on = manifest.read()["made_on"]
        log.info("Task 0: the weights are those of %s", manifest.folder)
    if made_on != here:
        log.warning("They were made on %s, this run is on %s: training here may move their last bits", made_on, here)
    if learner.run.runtime.is_main:
        with whole_folder(learner.run.folder / INITIAL) as temporary:
            save_tensors(temporary / NETWORK, learner.network.numbered_state())
            _manifest(temporary, learner).seal(made_on=made_on)


def require_initial(learner: Learner) -> Manifest:
    """Find the weights that `init_from` names; they are whole and fit.

    Args:
        learner: new; its config's ``init_from`` is a folder of a run or of its seed.

    Raises:
        ConfigError: if ``init_from`` is no other run's folder.
        CheckpointError: if the weights are absent or damaged, or something else made them; the first difference is
            named.
    """
    init_from, own = learner.config.init_from, learner.run.folder
    given = Path(init_from)
    if not given.is_dir():
        raise ConfigError(f"init_from={init_from!r}: no such folder; name that of a run or of one of its seeds")
    seed_folder = given / own.name if any(given.glob("seed_*")) else given
    if seed_folder.resolve() == own.resolve():
        raise ConfigError(f"init_from={init_from!r} is this very run: name another, or leave the key out to train")
    manifest = _manifest(seed_folder / INITIAL, learner)
    if not manifest.folder.exists():
        raise CheckpointError(
            f"no weights of a first task to start from: {manifest.folder} is not there. A run whose learner can share "
            "them (init_from in the README) writes it; an older one must be repeated with --overwrite and this seed"
        )
    manifest.verify()
    manifest.claim(write=False)
    return manifest


def recipe_of(learner: Learner) -> dict[str, Any]:
    """List everything that the weights after the first task depend on, but for the machine."""
    config, data, task = learner.config, learner.data, learner.data.task(0)
    options = asdict(backbone_options(config, data.dataset))
    weights = options.pop("weights")  # its place says nothing, and neither does `offline`
    del options["offline"]
    return {
        "dataset": data.dataset.name, "init_cls": task.num_seen,
        "classes": dict(enumerate(task.class_names)),  # by place: a difference is then one class, not two long lists
        "images": data.images_hash(task.classes), "seed": learner.run.seed, "loss": "cross_entropy",
        "convnet_type": config.convnet_type,
        "backbone": {**options, "weights": None if weights is None else file_hash(weights)},
        "head": learner.head, "training": asdict(learner.train_config(task)), "batch_size": config.batch_size,
        "augmentation": learner.transform.describe(), "synth": learner.replay.first_task_settings(),
    }  # fmt: skip


def _manifest(folder: Path, learner: Learner) -> Manifest:
    return Manifest(folder, "initial", recipe_of(learner), remedy=REMEDY)


def _machine(learner: Learner) -> dict[str, Any]:
    """Say what may move the last bits of a training and is no part of a recipe."""
    runtime = learner.run.runtime
    return {"device": runtime.device.type, "precision": "bf16" if runtime.bf16 else "fp32",
            "threads": torch.get_num_threads(), "processes": runtime.shard[1]}  # fmt: skip
