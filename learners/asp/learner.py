"""ASP: few-shot class-incremental learning with prompts on a frozen vision transformer."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor

from learners import LEARNERS
from learners.asp.network import PromptViT
from learners.base import map_images
from learners.dddr.separate_replay import SeparateReplay
from learners.frozen_backbone import FrozenBackboneLearner
from learners.losses import anchor_loss, standard_normal_kl
from models.frozen import Frozen
from models.heads import CosineHead
from utils.data.batches import Batch, test_batches
from utils.data.images import ImageSet
from utils.data.manager import Task
from utils.run.config import BatchSize, Decay, Factor, Rate
from utils.run.log import log
from utils.training.fit import Step
from utils.training.schedule import TrainConfig


@LEARNERS.register("asp")
class ASP(FrozenBackboneLearner, SeparateReplay):
    """Prompts trained on the base session; later sessions average prompts and add class means to a cosine head.

    Liu et al., "Few-Shot Class Incremental Learning with Attention-Aware Self-Adaptive Prompt", ECCV 2024,
    arXiv:2403.09857. With ``fs_epoch`` and a source, later sessions also train, on their few images and on replay
    (DDDR, arXiv:2409.01128); without, replay has nothing to act on.
    """

    class Config(FrozenBackboneLearner.Config, SeparateReplay.Config):
        few_shot_draw: Literal["own", "reference"] = Field("reference", description="reference: the original's shots")
        prompt_token_num: int = Field(6, ge=2, le=1024, multiple_of=2, description="prompts per layer, half each kind")
        TIP_init: Literal["zero", "random"] = Field("zero", description="start of the task-invariant prompts")
        vpt_type: Literal["Deep"] = Field("Deep", description="prompts in every layer")
        avg_alpha: float = Field(0.8, ge=0, le=1, description="share of the average prompt in task-specific prompts")
        EMA_beta: float = Field(0.99, ge=0, le=1, description="share of the old average prompt after a session")
        perturb_var: Factor = Field(1.0, description="factor of the prompts' standard deviation in training")
        anchor_lambda: Factor = Field(0.1, description="weight of the anchor loss")
        kl_weight: Factor = Field(1e-3, description="weight of the prompts' KL divergence, a sum over dimensions")
        deduplicate_anchors: bool = Field(False, description="one anchor per class of a batch, not one per image")
        head_start: Literal["random", "means"] = Field("random", description="class vectors before the base session")
        head_scale: float = Field(1.0, gt=0, le=1000, description="start of the learned scale of cosines")
        optimizer: Literal["sgd", "adam"] = Field("sgd", description="adam means AdamW, as in the original")
        momentum: float = Field(0.9, ge=0, lt=1, description="of SGD")
        init_lr: Rate = Field(0.01, description="rate of the base session, with cosine decay per epoch")
        min_lr: float = Field(0.0, ge=0, le=100, description="where the rate ends")
        weight_decay: Decay = Field(5e-4, description="also on prompts and the head's scale")
        tuned_epoch: int = Field(20, ge=1, description="epochs of the base session")
        fs_epoch: int = Field(0, ge=0, description="epochs of later sessions; 0: they train nothing")
        fs_lr: Rate = Field(1e-3, description="rate of later sessions")
        fs_batch_size: BatchSize = Field(16, description="current images per step of later sessions")
        # After a session that trained: as trained, or class means anew, of the real images or of generated ones, too.
        prototypes: Literal["trained", "real", "mixed"] = Field("real", description="what later class vectors are")
        refresh_old_prototypes: bool = Field(False, description="after fs_epoch, old class vectors anew from replay")

        @field_validator("refresh_old_prototypes")
        @classmethod
        def _from_replay(cls, value: bool, info) -> bool:
            if value and info.data.get("synth") is None:
                raise ValueError("it needs generated images of the old classes: add a synth")
            return value

    eval_batch = 128
    anchors: Tensor | None = None  # of the running epoch of the base session; see `use_anchors`

    def build_backbone(self, frozen: Frozen) -> PromptViT:
        self.backbone = PromptViT(frozen, self.config.prompt_token_num, self.config.avg_alpha, self.config.TIP_init)
        return self.backbone

    def build_head(self, num_features: int) -> CosineHead:
        return CosineHead(num_features, self.config.head_scale)

    def train_config(self, task: Task) -> TrainConfig:
        """Return a cosine that moves once per epoch."""
        config, optimizer = self.config, "adamw" if self.config.optimizer == "adam" else "sgd"
        lr, epochs = (config.fs_lr, config.fs_epoch) if task.index else (config.init_lr, config.tuned_epoch)
        return TrainConfig(lr, epochs, optimizer=optimizer, momentum=config.momentum, weight_decay=config.weight_decay,
                           schedule="cosine", min_lr=config.min_lr)  # fmt: skip

    def current_batch(self, task: Task) -> int:
        return self.config.fs_batch_size if task.index else self.config.batch_size

    # ------------------------------------------------------------------ a session's steps

    def before_training(self, task: Task) -> None:
        """Train the backbone first if it is to be; in later sessions move the average prompt, then add new rows."""
        super().before_training(task)
        queries, average, beta = self.image_queries(self.present), self.backbone.average_prompt, self.config.EMA_beta
        if task.index == 0:
            if self.replay.source is not None and self.config.fs_epoch == 0:
                log.warning("Replay is on, but fs_epoch is 0: later sessions train nothing, so replay changes nothing")
            self.base_images, self.base_queries = self.present, queries
            if self.config.head_start == "means":
                average.copy_(self.backbone.mean_prompt(queries))
                self.set_prototypes(self.present)
                # About as long as drawn rows are, so that a step of AdamW turns them as far.
                self.network.head.weight.data = F.normalize(self.network.head.weight.data)
            return
        average.copy_(beta * average + (1 - beta) * self.backbone.mean_prompt(queries))
        self.set_prototypes(self.present)  # old rows keep the average prompt of their own session

    def before_epoch(self, step: Step) -> None:
        """Choose the base session's anchors under the last average prompt, then renew it."""
        if step.task.index == 0:
            features, labels = self.extract_features(self.base_images), self.base_images.labels
            self.use_anchors(torch.stack([_most_central(features, labels, label) for label in step.task.classes]))
            self.backbone.average_prompt.copy_(self.backbone.mean_prompt(self.base_queries))

    def use_anchors(self, positions: Tensor) -> None:
        """Take the base images at these positions, int64 (C_0,), as the anchors of their classes."""
        self.anchors = positions
        # One by one: together they would come in the order of the images' parts.
        views = [next(test_batches(self.base_images.take([i]), self.transform, 1, self.run.device)) for i in positions]
        self.anchor_images = torch.cat(views)  # (C_0, 3, S, S)
        self.anchor_queries = self.base_queries[positions].to(self.run.device)

    def after_training(self, task: Task) -> None:
        """Compute class vectors of the present; after a session that trained, as the config says."""
        self.anchors = None  # they served the base session's loss; no checkpoint need carry them on
        if task.index == 0:
            self.backbone.average_prompt.copy_(self.backbone.mean_prompt(self.base_queries))
            self.set_prototypes(self.present)
        elif self.config.fs_epoch:
            if self.config.prototypes != "trained":
                mixed = self.config.prototypes == "mixed"
                self.set_prototypes(self.present + self.current_synthetic(task) if mixed else self.present)
            if self.config.refresh_old_prototypes and len(self.past):
                self.set_prototypes(self.past)

    # ------------------------------------------------------------------ losses

    def compute_loss(self, batch: Batch, task: Task) -> dict[str, Tensor]:
        """Return the base session's loss or, later, that of `SeparateReplay` on the few real and generated images."""
        return super().compute_loss(batch, task) if task.index else self.base_loss(batch)

    def base_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return cross-entropy, nearness to the classes' anchors, and the information bottleneck on prompts."""
        labels, backbone, config = batch.labels, self.backbone, self.config
        picks, counts = labels, torch.ones_like(labels)  # classes whose anchors are shown, and what each counts
        if config.deduplicate_anchors:
            picks, counts = labels.unique(return_counts=True)
        noise = self.noise(len(labels) + len(picks))
        own, of_anchors = noise.split([len(labels) * backbone.num_layers, len(picks) * backbone.num_layers])
        features, mu, sigma = backbone.prompted(batch.images, backbone.query(batch.images), own)
        with torch.no_grad():  # the loss detaches them, so nothing would come back through the network
            anchors = backbone.prompted(self.anchor_images[picks], self.anchor_queries[picks], of_anchors)[0]
        mu, sigma = map(torch.cat, zip((mu, sigma), backbone.encode(self.anchor_queries[picks])))
        rows = torch.cat([torch.ones_like(labels), counts]).float().repeat_interleave(backbone.num_layers)
        return {"cross_entropy": F.cross_entropy(self.training_logits(features), labels),
                "anchor": config.anchor_lambda * anchor_loss(features, labels, anchors, picks),
                "kl": config.kl_weight * standard_normal_kl(mu, sigma, rows)}  # fmt: skip

    def training_features(self, images: Tensor) -> Tensor:
        """Return features (B, D) under noisy prompts."""
        return self.backbone.prompted(images, self.backbone.query(images), self.noise(len(images)))[0]

    def training_logits(self, features: Tensor) -> Tensor:
        """Return logits (B, num_seen), in float32 in any case."""
        with torch.autocast(features.device.type, enabled=False):
            return self.network.head(features)

    def noise(self, num_images: int) -> Tensor:
        """Draw what is multiplied with the prompts' standard deviation; `fit` seeds the generator at every step."""
        rows = num_images * self.backbone.num_layers
        return self.config.perturb_var * torch.randn(rows, self.backbone.tip[0].numel(), device=self.run.device)

    # ------------------------------------------------------------------ features

    def image_queries(self, images: ImageSet) -> Tensor:
        """Return the bare ViT's features of un-augmented images, float32 (N, D) on the CPU; computed once per image."""
        return self.kept.of(images, lambda new: map_images(self, new, lambda x, _: self.backbone.query(x)))

    @torch.no_grad()
    def extract_features(self, images: ImageSet) -> Tensor:
        self.network.eval()
        queries = self.image_queries(images)
        return map_images(self, images, lambda x, rows: self.backbone.prompted(x, queries[rows].to(x.device))[0])

    # ------------------------------------------------------------------ what a checkpoint holds

    def extra_state(self) -> dict[str, Tensor]:
        """Return the anchors of the running epoch: they were chosen before it, by features that are gone."""
        return {} if self.anchors is None else {"anchors": self.anchors}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        if "anchors" in state:
            self.use_anchors(state["anchors"])


def _most_central(features: Tensor, labels: Tensor, label: int) -> Tensor:
    """Return the position of the image of a class that has the largest cosine to the mean of its features."""
    own = (labels == label).nonzero().flatten()
    return own[F.cosine_similarity(features[own], features[own].mean(0, keepdim=True)).argmax()]
