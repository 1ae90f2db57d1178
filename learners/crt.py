"""Classifier retraining: features from all images as they come, then a new head that sees all classes equally often."""

from __future__ import annotations

import copy

import torch
from pydantic import Field
from torch import Tensor

from learners import LEARNERS
from learners.finetune import Finetune
from learners.losses import cross_entropy_from
from learners.pycil import PyCILLearner
from utils.data.batches import Batch, Batches
from utils.data.manager import Task
from utils.run.config import BatchSize, Decay, Rate, RunConfig
from utils.training import seeding
from utils.training.fit import Training, fit
from utils.training.schedule import TrainConfig


class HeadConfig(RunConfig):
    """Keys of a head's training on features that stand still; the defaults are those of ImageNet-LT in the paper."""

    head_epochs: int = Field(10, ge=1, description="epochs of the head alone, after each task")
    head_lr: Rate = Field(0.2, description="SGD's rate there, with cosine decay")
    head_weight_decay: Decay = Field(5e-4, description="SGD's there")
    head_batch_size: BatchSize = Field(512, description="samples per step there")

    def head_schedule(self) -> TrainConfig:
        """Return length, rate and optimiser of the head's training."""
        return TrainConfig(self.head_lr, self.head_epochs, schedule="cosine", weight_decay=self.head_weight_decay)


@LEARNERS.register("crt")
class ClassifierRetraining(Finetune):
    """Cross-entropy on images as often as they occur, then a new head on a class-balanced draw of them.

    Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020, arXiv:1910.09217,
    section 4.1 (cRT). The draw is augmented as before; the backbone, BatchNorm's statistics included, stands still.
    Without replay, a later task renews and trains the rows of its own classes alone.
    """

    class Config(Finetune.Config, HeadConfig):
        pass

    def after_training(self, task: Task) -> None:
        size = self.config.head_batch_size
        loading = self.run.loading(self.transform, size, task.index, "head", balanced=True)
        retrain_head(self, task, self.replay.batches(self.present, self.past, loading), self.first_output(task))


def retrain_head(learner: PyCILLearner, task: Task, batches: Batches, first: int = 0) -> None:
    """Draw the rows of a linear head anew and train them under a backbone that stands still.

    Args:
        learner: whose config has the keys of `HeadConfig`.
        task: just learned.
        batches: of images, features or both.
        first: class from which on rows are new and compete; those before it keep their rows.
    """
    network = learner.network.eval()
    old, rows = copy.deepcopy(network.head), type(network.head)(network.head.num_features)
    rows.grow(task.num_seen, seeding.generator(learner.run.seed, task.index, "head"))
    network.head.load_state_dict(rows.state_dict())

    def loss(batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            features = network.features(batch.images)
        return {"cross_entropy": cross_entropy_from(first, network.head(features), batch.labels)}

    fit(network.head, batches, loss, learner.config.head_schedule(), Training(learner.run, task, "head"))
    with torch.no_grad():
        for value, before in zip(network.head.parameters(), old.parameters(), strict=True):
            value[:first] = before[:first]  # out of the loss, but not out of reach of weight decay
