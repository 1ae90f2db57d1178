"""A student that is trained on distilled images alone, to see in them what a teacher sees."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from learners import LEARNERS
from learners.base import Learner
from utils.data.batches import Batch
from utils.data.manager import Task
from utils.data.transforms import ClassifierTransform, classifier_transform
from utils.run.config import BatchSize, Decay, Rate, RunConfig, Softness
from utils.training.schedule import TrainConfig


def matching_loss(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Compute KL(teacher || student) at a temperature, mean over the batch, without the factor T^2.

    Args:
        logits: (B, K), of the student.
        targets: (B, K), the teacher's probabilities, softened by the same temperature.
        temperature: T > 0.
    """
    return F.kl_div(F.log_softmax(logits / temperature, dim=1), targets, reduction="batchmean")


@LEARNERS.register("distilled")
class DistilledStudent(Learner):
    """Trains a new network by training-time matching (D4M, Su et al., CVPR 2024, arXiv:2407.15138, section 3.3).

    With ``init_cls`` all classes it measures what a distilled data set is worth: a student learns from it and is tested
    on real images. Where the source gives no soft labels, its loss is cross-entropy, so that real images or a random
    subset of them can be compared under the same schedule.
    """

    class Config(RunConfig):
        epochs: int = Field(300, ge=1, description="epochs of every task")
        init_lr: Rate = Field(1e-3, description="AdamW's rate, with cosine decay by epoch to 0")
        weight_decay: Decay = Field(0.01, description="AdamW's, on matrices and filters alone")
        batch_size: BatchSize = Field(1024, description="images per step")
        T: Softness = Field(20.0, description="softens teacher and student")
        augmentation: Literal["dataset", "resized_crop"] = Field(
            "dataset", description="of training images; resized_crop: D4M's, 8 % of the area or more, and mirrored"
        )
        warm_start: bool = Field(False, description="go on from the last task's network instead of a new one")

    accepts = frozenset({"images"})  # a new network has other features than the one before

    def build_transform(self) -> ClassifierTransform:
        dataset = self.data.dataset
        if self.config.augmentation == "resized_crop":
            dataset = replace(dataset, augmentation="imagenet")
        return classifier_transform(dataset, self.config.replay_resize)

    def grow_network(self, task: Task) -> None:
        if task.num_old and not self.config.warm_start:
            self.network = self.build_network()
        super().grow_network(task)

    def train_config(self, task: Task) -> TrainConfig:
        config = self.config
        return TrainConfig(config.init_lr, config.epochs, optimizer="adamw", schedule="cosine",
                           weight_decay=config.weight_decay, decay_vectors=False)  # fmt: skip

    def compute_loss(self, batch: Batch, task: Task) -> dict[str, Tensor]:
        logits = self.network(batch.images)
        if batch.soft_targets is None:
            return {"cross_entropy": F.cross_entropy(logits, batch.labels)}
        return {"matching": matching_loss(logits, batch.soft_targets, self.config.T)}
