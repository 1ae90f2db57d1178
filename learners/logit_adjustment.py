"""Logit adjustment: what a class gains by being frequent is taken out of the logits."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from learners import LEARNERS
from learners.finetune import Finetune
from learners.losses import cross_entropy_from
from utils.data.batches import Batch
from utils.data.images import ImageSet
from utils.data.manager import Task
from utils.run.config import Factor


@LEARNERS.register("logit_adjustment")
class LogitAdjustment(Finetune):
    """Cross-entropy of logits + tau log prior, or plain cross-entropy and logits - tau log prior at prediction.

    Menon et al., "Long-tail Learning via Logit Adjustment", ICLR 2021, arXiv:2007.07314, Eq. 10 and Eq. 9. A class's
    prior is its share of what it was last trained with, replay included.
    """

    class Config(Finetune.Config):
        adjust: Literal["loss", "posthoc"] = Field("loss", description="add the prior in training, or subtract it then")
        tau: Factor = Field(1.0, description="how much of the prior's logarithm; 0 is plain cross-entropy")

    shares_first_task = False  # the loss differs in the first task already
    counts = torch.zeros(0)  # float (num_seen,), samples that each class was last trained with

    def train(self, task: Task) -> None:
        """Count what is trained with, then train."""
        labels = torch.cat([self.present.labels, self.past.labels])
        now = torch.bincount(labels, minlength=task.num_seen).float()  # (num_seen,)
        self.counts = torch.where(now > 0, now, torch.cat([self.counts, torch.zeros(task.num_seen - len(self.counts))]))
        super().train(task)

    def compute_loss(self, batch: Batch, task: Task) -> dict[str, Tensor]:
        logits = self.network(batch.images)  # (B, num_seen)
        if self.config.adjust == "loss":
            logits = logits + self.log_prior().to(logits.device)
        return {"cross_entropy": cross_entropy_from(self.first_output(task), logits, batch.labels)}

    def predict(self, images: ImageSet) -> dict[str, Tensor]:
        """Score every image; see `Learner.predict`."""
        scores = super().predict(images)
        return {"cnn": scores["cnn"] - self.log_prior()} if self.config.adjust == "posthoc" else scores

    def log_prior(self) -> Tensor:
        """Return tau log prior, (num_seen,)."""
        return self.config.tau * (self.counts / self.counts.sum()).log()

    def extra_state(self) -> dict[str, Tensor]:
        return {"counts": self.counts}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        self.counts = state["counts"]
