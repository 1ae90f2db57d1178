"""iCaRL: exemplars, distillation and nearest-mean classification."""

from __future__ import annotations

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from learners import LEARNERS
from learners.losses import distillation_loss
from learners.memory import keep_exemplars
from learners.pycil import PyCILLearner
from utils.data.batches import Batch
from utils.data.manager import Task
from utils.run.config import Softness


@LEARNERS.register("icarl")
class ICaRL(PyCILLearner):
    """Cross-entropy and distillation on new images and herded exemplars; CNN and nearest-mean (NME) predictions.

    Rebuffi et al., "iCaRL: Incremental Classifier and Representation Learning", CVPR 2017, arXiv:1611.07725, in the
    softmax form of PyCIL.
    """

    class Config(PyCILLearner.Config):
        T: Softness = Field(2.0, description="softens both outputs of the distillation term")

    uses_exemplars = True

    def compute_loss(self, batch: Batch, task: Task) -> dict[str, Tensor]:
        logits = self.network(batch.images)  # (B, num_seen)
        terms = {"cross_entropy": F.cross_entropy(logits, batch.labels)}
        if self.old_network is not None:
            terms["distill"] = distillation_loss(logits, self.old_network(batch.images), self.config.T)
        return terms

    def after_training(self, task: Task) -> None:
        keep_exemplars(self, task, class_means=True)
