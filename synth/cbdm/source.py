"""A DDPM for classes of very different sizes: what it knows of the large ones helps the small ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from synth import SOURCES
from synth.cbdm.augmentation import augment, draw_geometry
from synth.cbdm.loss import Balance, class_balanced_loss, class_prior
from synth.cbdm.network import LabelUNet
from synth.cbdm.replay import Filled
from synth.ddpm.config import Sampler
from synth.ddpm.network import ClassUNetConfig
from synth.ddpm.source import DDPM
from synth.diffusion import Model, Predict, draw_noised
from utils.data.batches import Batch
from utils.data.images import ImageSet
from utils.data.manager import Task
from utils.data.transforms import DiffusionTransform
from utils.run.config import BatchSize, Factor, SourceConfig, Width
from utils.training.schedule import TrainConfig


@SOURCES.register("cbdm")
class ClassBalancing(DDPM):
    """A DDPM whose prediction under a label is drawn toward that under other labels (CBDM, also LTDM).

    Qin et al., "Class-Balancing Diffusion Models", CVPR 2023, arXiv:2305.00562, with its settings. Network, loss and
    sampling are the paper's; how classes come task after task is `DDPM`'s. Guidance ``omega`` is the paper's too: what
    diffusers and the key ``guidance`` of other sources call s is 1 + omega.
    """

    class Config(DDPM.Config):
        drawing: ClassVar[set[str]] = {*DDPM.Config.drawing - {"guidance"}, "sample_method", "omega", "fill_most"}
        elsewhere: ClassVar[set[str]] = {*DDPM.Config.elsewhere, "fill_most"}
        guidance: ClassVar[None] = None  # no key here: `omega` says it in the paper's convention

        layers_per_block: int = Field(2, ge=1, le=64, description="residual blocks per level")
        attention_levels: list[int] = Field([1], description="levels with attention, 0 is the finest")
        attention_head_dim: Width | None = Field(None, description="channels per attention head; null: one head")
        beta_start: float = Field(1e-4, ge=1e-7, lt=1, description="variance of the first step")
        first_task_num_steps: int = Field(800_000, ge=1, description="at which the first task's training ends")
        batch_size: BatchSize = Field(128, description="images per training step, replay included")
        warmup_steps: int = Field(5000, ge=0, description="over which the rate rises from 0")
        clip_norm: Factor = Field(1.0, description="largest norm of the whole gradient; 0: any")
        start_step: int = Field(0, ge=0, description="at which init_weights ended: the first task goes on from there")

        cb: bool = Field(True, description="balance the classes; false: a plain DDPM")
        tau: Factor = Field(1.0, description="weight of balancing, times t / T; 1 is the paper's 0.001")
        commitment: Factor = Field(0.25, description="share of balancing that moves the other label's prediction")
        label_prior: Literal["train", "uniform"] | None = Field(
            None, description="of the other labels: as in training or all alike; null: train, with init_weights uniform"
        )
        label_dropout: float = Field(0.1, ge=0, lt=1, description="share of labels hidden in training for guidance")
        cfg_dropout: Literal["sample", "batch"] = Field(
            "sample", description="what hides together; batch: as published"
        )
        augmentation_probability: float = Field(0, ge=0, le=1, description="of each geometric change; 0: none, 0.12")

        clip_x0: bool = Field(False, description="clamp predicted images to their range at every step of sampling")
        sampler: Sampler = Field("ddpm", description="how images are drawn")
        timestep_respacing: str = Field("", description="sampling steps: ddimN strided, N spread; empty: all")
        prediction: Literal["epsilon"] = Field("epsilon", description="what the network predicts")
        loss_weighting: Literal["none"] = Field("none", description="of the times in its loss")
        rehearsal: Literal["replay", "own"] = Field("replay", description="of old classes")
        sample_method: Literal["cfg", "cond", "uncond"] = Field("cfg", description="guided, or under a label or none")
        omega: Factor = Field(0.0, description="guidance e_c + omega (e_c - e_u): 1 + omega in diffusers' convention")

        fill: bool = Field(False, description="learn first, and draw what small classes lack beside the largest")
        fill_most: float = Field(50.0, gt=0, le=1e6, description="drawn images of a class, times its real ones")

        translate = staticmethod(dict)  # the words of DDPM are none of its own

        @model_validator(mode="after")
        def _goes_together(self):
            if self.start_step >= self.first_task_num_steps:
                remedy = "the end counts from the checkpoint's own start, so give a larger synth.first_task_num_steps"
                where = f"synth.first_task_num_steps={self.first_task_num_steps}"
                raise ValueError(f"{where} is no step after synth.start_step={self.start_step}: {remedy}")
            if self.start_step and self.init_weights is None:
                raise ValueError(f"synth.start_step={self.start_step} is of what synth.init_weights names: give both")
            if self.omega and not self.label_dropout:
                remedy = "train with synth.label_dropout=0.1, or draw with synth.omega=0"
                raise ValueError(f"synth.omega={self.omega:g} needs a model that was trained without labels: {remedy}")
            return self

        def training_settings(self) -> dict[str, Any]:
            """Return all that shapes what is learned; labels are hidden whatever the guidance."""
            return SourceConfig.training_settings(self)

    usual_replay = Filled

    def __init__(self, config, run, num_classes, class_names, dataset):
        super().__init__(config, run, num_classes, class_names, dataset)
        if config.augmentation_probability:  # which shows the mirror images
            self.transform = DiffusionTransform(self.image_shape[1], flip=False)
        self.learns_after, self.wants_past = not config.fill, self.wants_past and not config.fill
        self.prior = torch.full((num_classes,), 1 / num_classes)

    def build_network(self) -> nn.Module:
        head = self.config.attention_head_dim or self.config.block_out_channels[-1]
        config = ClassUNetConfig.of(
            self.config,
            attention_levels=self.config.levels_with_attention(self.image_shape[1]),
            attention_head_dim=head,
        )
        return LabelUNet(self.image_shape, self.num_classes, config, self.config.augmentation_probability > 0)

    # ------------------------------------------------------------------ learning

    def fit_before(self, task: Task, images: ImageSet) -> None:
        """With ``fill``, train on the task's real images and on own images of the old classes."""
        if self.config.fill:
            self.learn(task, images, ImageSet())

    def fit_after(self, task: Task, images: ImageSet, past: ImageSet, exemplars: ImageSet, encoder) -> None:
        """Without ``fill``, train as `DDPM` does."""
        if not self.config.fill:
            self.learn(task, images, past)

    def before_training(self, labels: Tensor) -> None:
        usual = "train" if self.config.init_weights is None else "uniform"
        self.prior = class_prior(labels, self.num_classes, self.config.label_prior or usual)

    def train_config(self, index: int) -> TrainConfig:
        config, usual = self.config, super().train_config(index)
        steps = usual.steps - (0 if index else config.start_step)
        return replace(usual, steps=steps, warmup_steps=config.warmup_steps, clip_norm=config.clip_norm)

    def hidden(self, count: int) -> Tensor:
        """Draw whose labels are hidden, bool (count,) on the CPU: each by itself, or in whole batches."""
        draws = torch.rand(count if self.config.cfg_dropout == "sample" else 1)
        return (draws < self.config.label_dropout).expand(count)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the noise prediction error and the balancing loss of one batch, as named terms."""
        config, x0, device = self.config, batch.images, batch.images.device
        vectors = None
        if config.augmentation_probability:
            drawn = draw_geometry(len(x0), config.augmentation_probability)
            x0, vectors = augment(x0, drawn), drawn.vector().to(device)
        xt, t, eps = draw_noised(self.train_process, x0)
        hidden = self.hidden(len(x0))
        kept = (~hidden).nonzero().flatten() if config.cb else torch.zeros(0, dtype=torch.int64)
        others = self.prior.multinomial(len(x0), replacement=True)

        def predict(rows: Tensor, labels: Tensor) -> Tensor:
            return self.network(xt[rows], t[rows], labels, *([] if vectors is None else [vectors[rows]]))

        labels = batch.labels.masked_fill(hidden.to(device), -1)
        balance = Balance(config.tau * t / config.diffusion_steps, config.commitment)
        return class_balanced_loss(predict, eps, labels, others.to(device), kept.to(device), balance)

    # ------------------------------------------------------------------ generating

    @property
    def omega(self) -> float:
        return self.config.omega if self.config.sample_method == "cfg" else 0

    def noise_predictor(self, predict: Predict, labels: Tensor) -> Model:
        """Return the noise predictor of these labels, of none, or guided."""
        labels = torch.full_like(labels, -1) if self.config.sample_method == "uncond" else labels
        return super().noise_predictor(predict, labels)
