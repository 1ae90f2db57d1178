"""Weight Aligning: distillation, and a classifier without a preference for new classes."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from learners import LEARNERS
from learners.icarl import ICaRL
from utils.data.batches import Batch
from utils.data.manager import Task
from utils.run.config import Milestones


@LEARNERS.register("wa")
class WeightAligning(ICaRL):
    """iCaRL's terms by the share of old classes, then new-class weights rescaled to the length of old ones.

    Zhao et al., "Maintaining Discrimination and Fairness in Class Incremental Learning", CVPR 2020, arXiv:1911.07053.
    """

    class Config(ICaRL.Config):
        milestones: Milestones = Field([60, 100, 140], description="epochs where lrate decays")

    def compute_loss(self, batch: Batch, task: Task) -> dict[str, Tensor]:
        old_share = task.num_old / task.num_seen
        weights = {"cross_entropy": 1 - old_share, "distill": old_share}
        return {name: weights[name] * term for name, term in super().compute_loss(batch, task).items()}

    def after_training(self, task: Task) -> None:
        # Old classes are rarer in training, so their weights end up shorter and lose close calls.
        if task.num_old > 0:
            self.network.align_new_weights(task.num_old)
        super().after_training(task)
