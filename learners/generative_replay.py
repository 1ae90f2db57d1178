"""Deep generative replay: no real image of the past, a generator plays it back."""

from __future__ import annotations

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from learners import LEARNERS
from learners.losses import distillation_loss
from learners.pycil import PyCILLearner
from utils.data.batches import Batch
from utils.data.manager import Task
from utils.run.config import Factor, Milestones, Softness


@LEARNERS.register("generative_replay")
class GenerativeReplay(PyCILLearner):
    """Cross-entropy over all seen classes on real new and generated old images.

    Shin et al., "Continual Learning with Deep Generative Replay", NeurIPS 2017, arXiv:1705.08690. The old network
    may also say what it sees in the generated images (van de Ven et al., 2020, "DGR+distill").
    """

    class Config(PyCILLearner.Config):
        epochs: int = Field(70, ge=1, description="epochs of every later task")
        milestones: Milestones = Field([30, 50], description="epochs where lrate decays")
        w_kd: Factor = Field(0.0, description="weight of distillation on replayed images; 0 turns it off")
        T: Softness = Field(2.0, description="softens both outputs of the distillation term")

    needs_source = True

    def compute_loss(self, batch: Batch, task: Task) -> dict[str, Tensor]:
        logits = self.network(batch.images)  # (B, num_seen)
        terms = {"cross_entropy": F.cross_entropy(logits, batch.labels)}
        if self.config.w_kd and self.old_network is not None and batch.is_replay.any():
            old_logits = self.old_network(batch.images[batch.is_replay])  # (R, num_old)
            terms["distill"] = self.config.w_kd * distillation_loss(logits[batch.is_replay], old_logits, self.config.T)
        return terms
