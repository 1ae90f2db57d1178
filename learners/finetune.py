"""Plain training on each new task: the lower bound, and with a source plain generative replay."""

from __future__ import annotations

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from learners import LEARNERS
from learners.losses import new_class_cross_entropy
from learners.pycil import PyCILLearner
from utils.batches import Batch
from utils.data_manager import Task


@LEARNERS.register("finetune")
class Finetune(PyCILLearner):
    """Cross-entropy among the classes that are in the data; nothing keeps the old ones.

    As in PyCIL, old outputs take no part in the loss unless replay brings their classes back. With one new class
    per task that loss is 0; ``loss_over: all`` trains then too.
    """

    class Config(PyCILLearner.Config):
        epochs: int = Field(80, ge=1, description="epochs of every later task")
        milestones: list[int] = Field([40, 70], description="epochs where lrate decays")
        loss_over: str = Field("new", pattern="^(new|all)$", description="outputs that compete in the loss")

    def compute_loss(self, batch: Batch, task: Task) -> dict[str, Tensor]:
        logits = self.network(batch.images)  # (B, num_seen)
        if self.config.loss_over == "all" or len(self.replay):
            return {"cross_entropy": F.cross_entropy(logits, batch.labels)}
        return {"cross_entropy": new_class_cross_entropy(logits, batch.labels, task.num_old)}
