"""Replay in batches of its own beside those of the present, as DDDR trains its classifier."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from learners.base import Learner
from learners.losses import cross_entropy_from, distillation_loss, supervised_contrastive
from utils.data.batches import Batch, Batches, PairedBatches
from utils.data.images import ImageSet
from utils.data.manager import Task
from utils.run.config import BatchSize, Factor, PerClass, RunConfig, Softness


class SeparateReplay(Learner):
    """A learner that sends real and replayed images through the network one after the other.

    Liang et al., "Diffusion-Driven Data Replay: A Novel Approach to Combat Forgetting in Federated Class Continual
    Learning", ECCV 2024, arXiv:2409.01128. Generated images of the new classes join the real ones of the present.
    """

    accepts = frozenset({"images"})

    class Config(RunConfig):
        w_ce_pre: Factor = Field(0.5, description="weight of cross-entropy on replayed images")
        w_kd: Factor = Field(0.0, description="weight of distillation from the old network on replayed images")
        w_scl: Factor = Field(0.0, description="weight of the supervised contrastive loss on current images")
        T: Softness = Field(2.0, description="softens both outputs of the distillation term")
        scl_temperature: Softness = Field(0.07, description="of the supervised contrastive loss")
        # split: new classes compete among themselves, and so do old ones
        replay_softmax: Literal["split", "joint"] = Field("split", description="joint: new and old classes compete")
        base_cur_size: PerClass = Field(0, description="generated images per class in the first task")
        cur_size: PerClass = Field(20, description="generated images per new class that join later tasks' real ones")
        pre_size: PerClass | None = Field(None, ge=1, description="replayed images per old class; null: all drawn")
        replay_batch_size: BatchSize = Field(128, description="replayed images per step")

    def current_synthetic(self, task: Task) -> ImageSet:
        """Return generated images of the task's own classes, from a source that learned them before training."""
        per_class = self.config.cur_size if task.index else self.config.base_cur_size
        return self.replay.drawn_of_new(task).first_of_each(per_class) if per_class else ImageSet()

    def batches(self, task: Task) -> Batches:
        """Pair the present, generated images among it, with replay of the old classes if there is any."""
        loading = self.run.loading(self.transform, self.current_batch(task), task.index, "train", network=self.network)
        current = self.replay.batches(self.present + self.current_synthetic(task), ImageSet(), loading)
        if self.config.pre_size is not None:
            self.past = self.past.first_of_each(self.config.pre_size)
        if not len(self.past):
            return current
        loading = replace(loading, batch_size=self.config.replay_batch_size, key=(*loading.key[:-1], "replay"))
        return PairedBatches(current, self.replay.batches(ImageSet(), self.past, loading))

    def current_batch(self, task: Task) -> int:
        """Return the images of the present per step."""
        return self.config.batch_size

    def compute_loss(self, batch: Batch, task: Task) -> dict[str, Tensor]:
        """Return cross-entropy and contrast of the present, cross-entropy and distillation of replay."""
        config, joint = self.config, self.config.replay_softmax == "joint"
        features = self.training_features(batch.images)  # (B, D)
        logits = self.training_logits(features)  # (B, num_seen)
        terms = {"cross_entropy": cross_entropy_from(0 if joint else task.num_old, logits, batch.labels)}
        if batch.replay is not None:
            replayed = self.training_logits(self.training_features(batch.replay.images))  # (R, num_seen)
            competing = replayed if joint else replayed[:, : task.num_old]
            terms["replay"] = config.w_ce_pre * F.cross_entropy(competing, batch.replay.labels)
            if config.w_kd:
                old_logits = self.old_network(batch.replay.images)  # (R, num_old), without gradients
                terms["distill"] = config.w_kd * distillation_loss(replayed, old_logits, config.T)
        if config.w_scl:
            z = F.normalize(self.contrasted(features).float())
            terms["contrastive"] = config.w_scl * supervised_contrastive(z, batch.labels, config.scl_temperature)
        return terms

    def training_features(self, images: Tensor) -> Tensor:
        """Return features (B, D) as the network gives them in training."""
        return self.network.features(images)

    def training_logits(self, features: Tensor) -> Tensor:
        """Return logits (B, num_seen) of such features."""
        return self.network.head(features)

    def contrasted(self, features: Tensor) -> Tensor:
        """Return what the contrastive loss compares, (B, any width), of features (B, D)."""
        return features
