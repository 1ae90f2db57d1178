"""SimpleCIL: class means on a frozen backbone, the baseline of every method that has one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pydantic import Field

from learners import LEARNERS
from learners.frozen_backbone import FrozenBackboneLearner
from learners.pycil import FirstTaskConfig
from models.heads import CosineHead
from utils.data.manager import Task
from utils.run.config import BatchSize
from utils.run.log import log
from utils.training.schedule import TrainConfig


@LEARNERS.register("simplecil")
class SimpleCIL(FrozenBackboneLearner):
    """Nothing but perhaps the first task is trained: a class is the mean feature of its images, and cosine decides.

    Zhou et al., "Revisiting Class-Incremental Learning with Pre-Trained Models: Generalizability and Adaptivity are
    All You Need", IJCV 2024, arXiv:2303.07338, section 4.1. In PILOT's file the backbone has weights and keeps them; in
    PyCIL's it has none, and the first task trains it for ``init_epoch`` epochs.
    """

    class Config(FrozenBackboneLearner.Config, FirstTaskConfig):
        init_epoch: int = Field(0, ge=0, description="epochs of the first task that train a backbone without weights")
        batch_size: BatchSize = Field(128, description="images per step there")

        @classmethod
        def translate(cls, raw: dict[str, Any]) -> dict[str, Any]:
            # Whoever trains as in PyCIL normalises as there; PILOT's data sets know no normalisation.
            return {"normalize": "dataset", **raw} if raw.get("init_epoch") else raw

    accepts = frozenset()

    def train_config(self, task: Task) -> TrainConfig:
        """Return PyCIL's schedule where the first task trains the backbone by it, else no epoch."""
        trains = task.index == 0 and self.frozen.learned and not self.config.pretrain_epochs
        return replace(self.config.first_schedule(), epochs=self.config.init_epoch if trains else 0)

    def before_training(self, task: Task) -> None:
        """Train the backbone if it has no weights; of PyCIL's cosine head class means then take the place."""
        schedule, config = self.train_config(task), self.config
        if schedule.epochs:
            return self.pretrain(task, schedule, config.batch_size, CosineHead)
        if task.index == 0 and config.init_epoch:
            log.info("init_epoch=%d trains nothing: the backbone has weights, or pretrain_epochs", config.init_epoch)
        super().before_training(task)

    def train(self, task: Task) -> None:
        """Train nothing more."""

    def after_training(self, task: Task) -> None:
        self.set_prototypes(self.present)
