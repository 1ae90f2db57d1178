"""Learning without Forgetting: the old network's answers on new images stand for the past."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from learners import LEARNERS
from learners.losses import cross_entropy_from, distillation_loss
from learners.pycil import PyCILLearner
from utils.data.batches import Batch
from utils.data.manager import Task
from utils.run.config import Factor, Milestones, Softness


@LEARNERS.register("lwf")
class LearningWithoutForgetting(PyCILLearner):
    """Distillation of the old outputs on whatever is trained on, no exemplars.

    Li and Hoiem, "Learning without Forgetting", TPAMI 2017, arXiv:1606.09282.
    """

    class Config(PyCILLearner.Config):
        init_milestones: Milestones = Field([60, 120, 160], description="epochs where init_lr decays")
        epochs: int = Field(250, ge=1, description="epochs of every later task")
        milestones: Milestones = Field([60, 120, 180, 220], description="epochs where lrate decays")
        T: Softness = Field(2.0, description="softens both outputs of the distillation term")
        lamda: Factor = Field(3.0, description="weight of the distillation term")

    def compute_loss(self, batch: Batch, task: Task) -> dict[str, Tensor]:
        config, logits = self.config, self.network(batch.images)  # (B, num_seen)
        first = 0 if len(self.past) else task.num_old
        terms = {"cross_entropy": cross_entropy_from(first, logits, batch.labels)}
        if self.old_network is not None:
            terms["distill"] = config.lamda * distillation_loss(logits, self.old_network(batch.images), config.T)
        return terms
