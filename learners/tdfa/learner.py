"""TDFA as a learner: one backbone, then heads on real, translated and generated features."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from learners import LEARNERS
from learners.crt import HeadConfig, retrain_head
from learners.pycil import FirstTaskConfig, PyCILLearner
from learners.tdfa.filtering import believable, class_ranges, prototypes_of
from synth.requests import Requests
from utils.data.batches import Batches, MixedBatches, class_shares
from utils.data.images import FeatureSet, ImageSet
from utils.data.manager import Task
from utils.run.config import Decay, Milestones, Rate
from utils.run.errors import ConfigError
from utils.run.log import log
from utils.training.schedule import TrainConfig


@LEARNERS.register("tdfa")
class TDFA(PyCILLearner):
    """Trains a backbone by cross-entropy and freezes it; a new head then sees every class as often as the largest.

    Named for "A translation and diffusion-based feature augmentation framework for long-tailed visual recognition",
    whose text and second stage are not public: this is a design of ours after its title. Translation is M2m's (Kim et
    al., CVPR 2020, arXiv:2004.00431), the new head cRT's (Kang et al., ICLR 2020, arXiv:1910.09217), features drawn by
    diffusion are also LDMLR's (CVPR workshops, 2024). Later tasks train a head alone, on features: real ones of the
    present, generated ones of the past. What is chosen by looking is chosen on `val_share`, which curve
    ``val_top1_curve`` shows.
    """

    class Config(FirstTaskConfig, HeadConfig):
        init_milestones: Milestones = Field([160, 180], description="epochs where init_lr decays")
        init_weight_decay: Decay = Field(2e-4, description="weight decay of the first task")
        head_epochs: int = Field(30, ge=1, description="epochs of the head alone, after each task")
        head_lr: Rate = Field(0.1, description="SGD's rate there, with cosine decay")
        most_per_real: int = Field(50, ge=0, le=10**6, description="made features of a class per real one, at most")
        made_weight: float = Field(0.5, gt=0, le=1, description="of a made feature in its class, beside a real 1")
        # The card's range leaves out nearly all that helps: training features stand closer together than unseen ones.
        filter: Literal["none", "nearest", "range"] = Field(
            "nearest", description="which made features stay: all; those near their class; and as real ones are"
        )
        filter_low: float = Field(0.05, ge=0, le=1, description="of real distances: what is nearer leaves a range")
        filter_high: float = Field(0.95, ge=0, le=1, description="of real distances: what is farther leaves a range")
        filter_margin: float = Field(0.1, ge=0, le=1, description="by how much another prototype may be nearer")

    accepts = frozenset({"features"})
    needs_source = True
    ranges = torch.zeros(0, 2)  # of real distances to the prototypes in `class_means`, a row per class

    def __init__(self, config, data, run, replay):
        super().__init__(config, data, run, replay)
        if not config.synth.fit_after_last_task:
            why = "the newest classes' features are made too"
            raise ConfigError(f"synth.fit_after_last_task=false: {why}, so set it to true")

    def train_config(self, task: Task) -> TrainConfig:
        """Return the backbone's schedule in the first task, the head's later."""
        return self.config.head_schedule() if task.index else self.config.first_schedule()

    def before_training(self, task: Task) -> None:
        """Freeze the backbone behind the first task."""
        self.network.backbone.requires_grad_(task.index == 0)
        if task.index:
            self._look(task)

    def batches(self, task: Task) -> Batches:
        return self._balanced(self.past, task, "train") if task.index else super().batches(task)

    def after_training(self, task: Task) -> None:
        if task.index == 0:
            self._look(task)

    def after_source_fit(self, task: Task) -> None:
        """Train a new head on real features and on made ones that are believable."""
        with self.run.timed("draw"):
            made = self._make(task)
        with self.run.timed("train"):
            retrain_head(self, task, self._balanced(made, task, "head"))

    def _look(self, task: Task) -> None:
        """Note the features of the new classes, their prototypes and the distances of real features to them."""
        config, labels = self.config, self.present.labels
        self.real = FeatureSet.of(self.extract_features(self.present), labels)
        own = class_ranges(self.real.tensor(), labels, task.classes, config.filter_low, config.filter_high)
        self.ranges = torch.cat([self.ranges[: task.num_old], own])
        self.class_means |= prototypes_of(self.real.tensor(), labels, task.classes)

    def _make(self, task: Task) -> FeatureSet:
        """Ask for what each class lacks to the largest; of old classes nothing real is left."""
        config, source, made = self.config, self.replay.source, FeatureSet()
        counts, key = self.data.class_counts[: task.num_seen], (self.run.seed, "tdfa", task.index)
        here = self.real.counts(task.num_seen).tolist()
        for label in sorted(source.fitted_classes.intersection(range(task.num_seen))):
            lacking = min(max(counts) - here[label], config.most_per_real * counts[label])
            if lacking:
                made = made + source.generate(Requests.of_classes([label], lacking, key))
        if config.filter == "none" or not len(made):
            return made
        prototypes = torch.stack([self.class_means[label] for label in range(task.num_seen)])
        ranges = self.ranges if config.filter == "range" else torch.tensor([0.0, 2.0]).expand_as(self.ranges)
        kept = believable(made.tensor(), made.labels, prototypes, ranges, config.filter_margin)
        # A class of which nothing at all would be left keeps what was made of it.
        rest = torch.tensor(here) + torch.bincount(made.labels[kept], minlength=task.num_seen)
        kept |= rest[made.labels] == 0
        log.info("Task %d: %d of %d made features are kept, per class %s", task.index, kept.sum(), len(made),
                 torch.bincount(made.labels[kept], minlength=task.num_seen).tolist())  # fmt: skip
        return made.take(kept.nonzero().flatten())

    def _balanced(self, made: FeatureSet, task: Task, purpose: str) -> MixedBatches:
        """Mix real and made features, every class equally often; in it, a made one is drawn more rarely than a real."""
        both = self.real + made
        batches = MixedBatches(ImageSet(), both, self.run.loading(self.transform, self.config.head_batch_size,
                                                                  task.index, purpose))  # fmt: skip
        weights = torch.full((len(both),), self.config.made_weight).index_fill(0, torch.arange(len(self.real)), 1.0)
        batches.draw_weights = class_shares(both.labels, weights)
        return batches

    def extra_state(self) -> dict[str, Tensor]:
        return {"ranges": self.ranges}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        self.ranges = state["ranges"]
