"""DER: a feature extractor for every task, the old ones frozen."""

from __future__ import annotations

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from learners import LEARNERS
from learners.expandable.network import ExpandableNet
from learners.losses import old_as_one_class
from learners.memory import keep_exemplars
from learners.pycil import PyCILLearner
from models.frozen import weight_bytes
from utils.data.batches import Batch
from utils.data.manager import Task
from utils.run.carried import Carried
from utils.run.config import Factor, Milestones


@LEARNERS.register("der")
class DynamicallyExpandableRepresentation(PyCILLearner):
    """A backbone per task side by side, cross-entropy on new images and herded exemplars, aligned weights.

    Yan et al., "DER: Dynamically Expandable Representation for Class Incremental Learning", CVPR 2021,
    arXiv:2103.16788, in PyCIL's form: without the paper's masks and pruning, and with the weight alignment of
    Zhao et al. (arXiv:1911.07053) in place of its second stage, a balanced training of the classifier.
    """

    class Config(PyCILLearner.Config):
        milestones: Milestones = Field([80, 120, 150], description="epochs where lrate decays")
        alpha_aux: Factor = Field(1.0, description="weight of the auxiliary loss on the newest branch")

    accepts = frozenset({"images"})  # features of an earlier task are shorter
    uses_exemplars = True

    def build_network(self) -> ExpandableNet:
        network = super().build_network()
        return ExpandableNet(nn.Identity(), network.backbone, network.head, train_trunk=True, train_old=False).eval()

    def compute_loss(self, batch: Batch, task: Task) -> dict[str, Tensor]:
        if task.num_old == 0:
            return {"cross_entropy": F.cross_entropy(self.network(batch.images), batch.labels)}
        logits, auxiliary = self.network.both_logits(batch.images)  # (B, num_seen), (B, 1 + num_new)
        newest = F.cross_entropy(auxiliary, old_as_one_class(batch.labels, task.num_old))
        return {"cross_entropy": F.cross_entropy(logits, batch.labels), "auxiliary": self.config.alpha_aux * newest}

    def after_training(self, task: Task) -> None:
        if task.num_old > 0:
            self.network.align_new_weights(task.num_old)
        self.network.auxiliary = None  # the next task has its own
        keep_exemplars(self, task, class_means=True)

    def carried(self) -> list[Carried]:
        """Name the old branches apart from the rest of the network's file."""
        old = sum(map(weight_bytes, self.network.backbone.branches[:-1]))
        return [*super().carried(), Carried("old_branches", nbytes=old), Carried("network", nbytes=-old)]
