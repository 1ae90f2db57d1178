"""Weight Aligning: distillation, and a classifier without a preference for new classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from learners import LEARNERS
from learners.losses import distillation_loss
from learners.pycil import PyCILLearner
from utils.batches import Batch
from utils.data_manager import Task


@LEARNERS.register("wa")
class WeightAligning(PyCILLearner):
    """Distillation on new images and herded exemplars, then new-class weights rescaled to the length of old ones.

    Zhao et al., "Maintaining Discrimination and Fairness in Class Incremental Learning", CVPR 2020, arXiv:1911.07053.
    """

    class Config(PyCILLearner.Config):
        milestones: list[int] = Field([60, 100, 140], description="epochs where lrate decays")
        T: float = Field(2.0, gt=0, description="softens both outputs of the distillation term")

    uses_exemplars = True

    def compute_loss(self, batch: Batch, task: Task) -> dict[str, Tensor]:
        logits = self.network(batch.images)  # (B, num_seen)
        cross_entropy = F.cross_entropy(logits, batch.labels)
        if self.old_network is None:
            return {"cross_entropy": cross_entropy}
        with torch.no_grad():
            old_logits = self.old_network(batch.images)  # (B, num_old)
        distill = distillation_loss(logits[:, : task.num_old], old_logits, self.config.T)
        old_share = task.num_old / task.num_seen
        return {"cross_entropy": (1 - old_share) * cross_entropy, "distill": old_share * distill}

    def after_training(self, task: Task) -> None:
        # Old classes are rarer in training, so their weights end up shorter and lose close calls.
        if task.num_old > 0:
            self.network.align_new_weights(task.num_old)
        self.keep_herded_exemplars(task)
        self.update_class_means()
