"""SimpleCIL: class means on a frozen backbone, the baseline of every method that has one."""

from __future__ import annotations

from learners import LEARNERS
from learners.frozen_backbone import FrozenBackboneLearner
from utils.data.manager import Task
from utils.training.schedule import TrainConfig


@LEARNERS.register("simplecil")
class SimpleCIL(FrozenBackboneLearner):
    """Nothing is trained: a class is the mean feature of its images, and cosine decides.

    Zhou et al., "Revisiting Class-Incremental Learning with Pre-Trained Models: Generalizability and Adaptivity are
    All You Need", IJCV 2024, arXiv:2303.07338, section 4.1.
    """

    accepts = frozenset()

    def train_config(self, task: Task) -> TrainConfig:
        """Train no epoch."""
        return TrainConfig(epochs=0, lr=0.0)

    def after_training(self, task: Task) -> None:
        self.set_prototypes(self.present)
