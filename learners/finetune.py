"""Plain training on each new task: the lower bound, and with a source plain generative replay."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from learners import LEARNERS
from learners.losses import cross_entropy_from
from learners.pycil import PyCILLearner
from utils.data.batches import Batch
from utils.data.manager import Task
from utils.run.config import Milestones


@LEARNERS.register("finetune")
class Finetune(PyCILLearner):
    """Cross-entropy among the classes that are in the data; nothing keeps the old ones.

    As in PyCIL, old outputs take no part in the loss unless replay brings their classes back. With one new class
    per task that loss is 0; ``loss_over: all`` trains then too.
    """

    class Config(PyCILLearner.Config):
        epochs: int = Field(80, ge=1, description="epochs of every later task")
        milestones: Milestones = Field([40, 70], description="epochs where lrate decays")
        loss_over: Literal["new", "all"] = Field("new", description="outputs that compete in the loss")

    def compute_loss(self, batch: Batch, task: Task) -> dict[str, Tensor]:
        logits = self.network(batch.images)  # (B, num_seen)
        return {"cross_entropy": cross_entropy_from(self.first_output(task), logits, batch.labels)}

    def first_output(self, task: Task) -> int:
        """Return the first class that competes in the loss."""
        return 0 if self.config.loss_over == "all" or len(self.past) else task.num_old
