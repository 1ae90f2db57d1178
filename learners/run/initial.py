"""The weights after the first task, kept by every run that can share them and taken by others with `init_from`.

Many learners train the first task in the very same way. What made the weights, their recipe, is written beside them
and named by its hash; weights of another recipe are refused, so a run that takes them ends with the same bits as one
that trains them itself.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from learners import LEARNERS
from learners.backbones import backbone_options
from synth.drawing import first_difference
from utils.data.manager import Task
from utils.run.errors import CheckpointError, ConfigError
from utils.training.checkpoint import file_hash, load_tensors, save_tensors, whole_folder, write_json

if TYPE_CHECKING:
    from learners.base import Learner

log = logging.getLogger("reprise")

INITIAL = "initial"
NETWORK, RECIPE = "network.safetensors", "recipe.json"


def train_or_take(learner: Learner, task: Task) -> None:
    """Train a task; of the first one, take the weights that `init_from` names instead, and keep them for others."""
    if task.index > 0:
        return learner.train(task)
    if learner.config.init_from is None:
        learner.train(task)
        made_on = _machine(learner)
    else:
        made_on = _take(learner)
    if learner.first_loss is not None and learner.run.runtime.is_main:
        _keep(learner, made_on)


def require_initial(learner: Learner) -> tuple[Path, dict[str, Any]]:
    """The folder of the weights that `init_from` names and what is written of them; they are whole and fit.

    Args:
        learner: new; its config's ``init_from`` is a folder of a run or of its seed.

    Raises:
        ConfigError: if the learner cannot start from another's weights, or ``init_from`` is no other run's folder.
        CheckpointError: if the weights are absent or damaged, or something else made them; the first difference is
            named.
    """
    folder = _find(learner)
    stored = _read(folder)
    here = recipe_of(learner)
    if difference := first_difference(stored["recipe"], here, here):
        raise CheckpointError(
            f"the weights in {folder} are not those of this run's first task: {difference}. Set the key as it was "
            "there, name another init_from, or leave it out to train"
        )
    return folder, stored


def recipe_of(learner: Learner) -> dict[str, Any]:
    """Everything that the weights after the first task depend on, but for the machine, as JSON has it."""
    config, data, task = learner.config, learner.data, learner.data.task(0)
    options, transform = asdict(backbone_options(config, data.dataset)), learner.transform
    weights = options.pop("weights")  # its place says nothing, and neither does `offline`
    del options["offline"]
    recipe = {
        "dataset": data.dataset.name,
        "init_cls": task.num_seen,
        "classes": dict(enumerate(task.class_names)),  # by place: a difference is then one class, not two long lists
        "images": data.images_hash(task.classes),
        "seed": learner.run.seed,
        "first_loss": learner.first_loss,
        "convnet_type": config.convnet_type,
        "backbone": {**options, "weights": None if weights is None else file_hash(weights)},
        "head": learner.head,
        "training": asdict(learner.train_config(task)),
        "batch_size": config.batch_size,
        "augmentation": {
            **asdict(transform.augmentation), "size": transform.size, "resize": transform.resize,
            "mean": transform.mean.tolist(), "std": transform.std.tolist(),
        },
        "synth": {} if learner.source is None else learner.source.first_task_settings(),
    }  # fmt: skip
    return json.loads(json.dumps(recipe))


def recipe_hash(recipe: dict[str, Any]) -> str:
    """SHA-256 of a recipe, in hexadecimal."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def _machine(learner: Learner) -> dict[str, Any]:
    """What may move the last bits of a training and is no part of a recipe."""
    runtime = learner.run.runtime
    return {
        "device": runtime.device.type, "precision": "bf16" if runtime.bf16 else "fp32",
        "threads": torch.get_num_threads(), "processes": runtime.shard[1],
    }  # fmt: skip


def _keep(learner: Learner, made_on: dict[str, Any]) -> None:
    recipe = recipe_of(learner)
    with whole_folder(learner.run.folder / INITIAL) as temporary:
        save_tensors(temporary / NETWORK, learner.network.numbered_state())
        hashes = {"recipe_hash": recipe_hash(recipe), "network_hash": file_hash(temporary / NETWORK)}
        write_json(temporary / RECIPE, {"recipe": recipe, **hashes, "made_on": made_on})


def _take(learner: Learner) -> dict[str, Any]:
    """Load the weights into the learner's network; returns what they were made on."""
    folder, stored = require_initial(learner)
    learner.network.load_numbered_state(load_tensors(folder / NETWORK))
    made_on = stored["made_on"]
    log.info("Task 0: the weights are those of %s, recipe %s", folder, stored["recipe_hash"])
    if made_on != (here := _machine(learner)):
        log.warning("They were made on %s, this run is on %s: to train them here may move their last bits",
                    made_on, here)  # fmt: skip
    return made_on


def _find(learner: Learner) -> Path:
    """The folder of the weights that `init_from` names, or where they should be."""
    init_from, own = learner.config.init_from, learner.run.folder
    given = Path(init_from)
    if learner.first_loss is None:
        able = ", ".join(name for name in LEARNERS.names() if LEARNERS[name].first_loss is not None)
        raise ConfigError(
            f"init_from={init_from!r}: the learner {learner.config.model_name!r} trains the first task in a way of its "
            f"own and cannot start from another run's weights; leave the key out, or choose model_name={able}"
        )
    if not given.is_dir():
        raise ConfigError(f"init_from={init_from!r}: no such folder; name that of a run or of one of its seeds")
    seed_folder = given / own.name if any(given.glob("seed_*")) else given
    if seed_folder.resolve() == own.resolve():
        raise ConfigError(f"init_from={init_from!r} is this very run: name another, or leave the key out to train")
    return seed_folder / INITIAL


def _read(folder: Path) -> dict[str, Any]:
    """What is written of the weights in a folder, all of it checked against its hashes."""
    try:
        stored = json.loads((folder / RECIPE).read_text())
        whole = stored["recipe_hash"] == recipe_hash(stored["recipe"])
        whole = whole and stored["network_hash"] == file_hash(folder / NETWORK) and "made_on" in stored
    except (OSError, ValueError, KeyError, TypeError) as error:
        if not folder.exists():
            raise CheckpointError(
                f"no weights of a first task to start from: {folder} is not there. A run writes it when its first "
                "task is trained, if its learner can share it (init_from in the README); one that has no such folder "
                "must be repeated with --overwrite, and with this seed"
            ) from error
        whole = False
    if not whole:
        raise CheckpointError(
            f"{folder} is damaged: its hashes differ from what was written. Repeat the run that made it with "
            "--overwrite, name another init_from, or leave it out to train"
        )
    return stored
