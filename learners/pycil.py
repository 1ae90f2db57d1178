"""PyCIL's optimisation keys, shared by the learners that come from there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from pydantic import Field

from learners.base import Learner
from utils.data.manager import Task
from utils.run.config import BatchSize, Decay, Factor, Milestones, Rate, RunConfig
from utils.training.schedule import TrainConfig


class FirstTaskConfig(RunConfig):
    """Keys of the first task's training, and those that later tasks share with it."""

    init_epoch: int = Field(200, ge=1, description="epochs of the first task")
    init_lr: Rate = Field(0.1, description="learning rate of the first task")
    init_milestones: Milestones = Field([60, 120, 170], description="epochs where init_lr decays")
    init_lr_decay: float = Field(0.1, gt=0, le=1, description="factor at init_milestones")
    init_weight_decay: Decay = Field(5e-4, description="weight decay of the first task")
    batch_size: BatchSize = Field(128, description="images per step, replay and exemplars included")
    scheduler: Literal["steplr", "cosine", "constant"] = Field("steplr", description="of the learning rate")
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD")
    clip_norm: Factor = Field(0.0, description="largest norm of the whole gradient; 0: any")

    def first_schedule(self) -> TrainConfig:
        """Return length, rate and optimiser of the first task's training."""
        schedule = "step" if self.scheduler == "steplr" else self.scheduler
        return TrainConfig(self.init_lr, self.init_epoch, schedule=schedule, milestones=tuple(self.init_milestones),
                           lr_decay=self.init_lr_decay, weight_decay=self.init_weight_decay, momentum=self.momentum,
                           clip_norm=self.clip_norm)  # fmt: skip


class PyCILLearner(Learner):
    """A learner that trains by SGD with two step schedules: one for the first task, one for all later ones.

    Zhou et al., "PyCIL: A Python Toolbox for Class-Incremental Learning", 2021, arXiv:2112.12533.
    """

    class Config(FirstTaskConfig):
        epochs: int = Field(170, ge=1, description="epochs of every later task")
        lrate: Rate = Field(0.1, description="learning rate of later tasks")
        milestones: Milestones = Field([80, 120], description="epochs where lrate decays")
        lrate_decay: float = Field(0.1, gt=0, le=1, description="factor at milestones")
        weight_decay: Decay = Field(2e-4, description="weight decay of later tasks")

    shares_first_task = True  # its training is cross-entropy alone, so it may be another learner's
    # Set by whoever runs it.
    first_training: Callable[[Task, Callable[[Task], None]], None] | None = None

    def train(self, task: Task) -> None:
        """Train; the first task may also be taken from another run (`init_from`)."""
        if task.index == 0 and self.shares_first_task and self.first_training is not None:
            return self.first_training(task, super().train)
        super().train(task)

    def train_config(self, task: Task) -> TrainConfig:
        """Return the first task's schedule, or the later tasks'."""
        config, first = self.config, self.config.first_schedule()
        if task.num_old == 0:
            return first
        return replace(first, epochs=config.epochs, lr=config.lrate, weight_decay=config.weight_decay,
                       milestones=tuple(config.milestones), lr_decay=config.lrate_decay)  # fmt: skip
