"""Joint training: all real images of all seen classes, a declared upper bound."""

from __future__ import annotations

from pydantic import Field

from learners import LEARNERS
from learners.pycil import PyCILLearner
from utils.data.manager import Task
from utils.training.schedule import TrainConfig


@LEARNERS.register("joint")
class Joint(PyCILLearner):
    """Trains on the real images of every class seen so far; no memory limit, so no method competes with it."""

    class Config(PyCILLearner.Config):
        warm_start: bool = Field(False, description="go on from the last task's network instead of a new one")

    accepts = frozenset()
    upper_bound = True

    def grow_network(self, task: Task) -> None:
        if not self.config.warm_start:
            self.network = self.build_network()
        super().grow_network(task)

    def train_config(self, task: Task) -> TrainConfig:
        """Return the first task's schedule for every new network."""
        return super().train_config(task if self.config.warm_start else self.data.task(0))
