"""A class-conditional DDPM that learns task after task, rehearsing on its own images."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from models.unet import ClassUNet
from synth import SOURCES
from synth.base import Guide, ReplaySource, Requests, draw_noise
from synth.diffusion import (
    classifier_free,
    linear_process,
    noise_prediction_loss,
    respace,
    sample_ddim,
    sample_ddpm,
)  # fmt: skip
from utils import seeding
from utils.batches import Batch, ImageBatches
from utils.checkpoint import load_tensors, save_tensors, write_json
from utils.config import SourceConfig
from utils.data_manager import Task
from utils.images import ImageSet
from utils.training import TrainConfig, fit
from utils.transforms import RECIPES, DiffusionTransform, to_uint8

log = logging.getLogger("reprise")


@SOURCES.register("ddpm")
class DDPM(ReplaySource):
    """One UNet for all classes, trained on each task's real images and on replay of the classes before.

    Ho et al., "Denoising Diffusion Probabilistic Models", NeurIPS 2020, arXiv:2006.11239; trained continually as in
    GUIDE (Cywinski et al. 2024, arXiv:2403.03938), whose settings are the defaults. Every task starts from the last
    task's raw weights, with a new optimiser and a new moving average; the average generates.
    """

    class Config(SourceConfig):
        image_size: int | None = Field(None, ge=4, description="side in pixels; null: the data set's own")
        block_out_channels: list[int] = Field([128, 256, 256, 256], min_length=1, description="UNet width per level")
        layers_per_block: int = Field(3, ge=1, description="residual blocks per level")
        attention_levels: list[int] = Field([1, 2], description="levels with attention, 0 is the finest")
        attention_head_dim: int = Field(64, ge=1, description="channels per attention head")
        norm_num_groups: int = Field(32, ge=1, description="groups of every GroupNorm")
        dropout: float = Field(0.1, ge=0, lt=1, description="inside the residual blocks")
        diffusion_steps: int = Field(1000, ge=1, description="time steps of the full process")
        beta_start: float = Field(1e-3, gt=0, lt=1, description="variance of the first step")
        beta_end: float = Field(2e-2, gt=0, lt=1, description="variance of the last step")
        train_respacing: str = Field("", description="train on a subset such as ddim250; empty: all steps")
        first_task_num_steps: int = Field(100_000, ge=1, description="training steps of the first task")
        num_steps: int = Field(50_000, ge=1, description="training steps of every later task")
        batch_size: int = Field(256, ge=1, description="images per training step, replay included")
        lr: float = Field(2e-4, gt=0, description="AdamW's rate, constant")
        lr_schedule: Literal["constant", "cosine", "linear"] = Field("constant", description="of lr, down to 0")
        weight_decay: float = Field(0.0, ge=0, description="AdamW's")
        ema_rate: float = Field(0.9999, ge=0, lt=1, description="decay of the average that generates; 0: raw weights")
        sampler: Literal["ddim", "ddpm"] = Field("ddim", description="how replay is drawn")
        timestep_respacing: str = Field("ddim50", description="sampling steps: ddimN strided, N spread from end to end")
        guidance: float = Field(0.0, ge=0, description="classifier-free guidance, 1 is the plain conditional; 0: off")
        label_dropout: float = Field(0.1, ge=0, lt=1, description="share of labels hidden in training for guidance")
        counts: Literal["balanced", "reference"] = Field(
            "balanced", description="self-rehearsal; reference: GUIDE's own draw of labels from the raw weights"
        )
        gr_n_generated_examples_per_task: int | None = Field(
            None, ge=1, description="images per old task under reference counts; null: as many as the task has"
        )

    def __init__(self, config, run, num_classes, class_names, dataset):
        super().__init__(config, run, num_classes, class_names, dataset)
        size = config.image_size or dataset.image_size
        self.image_shape = (dataset.channels, size, size)
        self.transform = DiffusionTransform(size, RECIPES[dataset.augmentation].flip)
        self.process = linear_process(config.diffusion_steps, config.beta_start, config.beta_end)
        self.train_process = respace(self.process, config.train_respacing or config.diffusion_steps)
        self.sample_process = respace(self.process, config.timestep_respacing)
        seeding.seed_everything(run.seed, "ddpm")
        self.network = ClassUNet(
            self.image_shape, num_classes, config.block_out_channels, attention_levels=config.attention_levels,
            layers_per_block=config.layers_per_block, attention_head_dim=config.attention_head_dim,
            norm_num_groups=config.norm_num_groups, dropout=config.dropout,
        ).to(run.device).eval()  # fmt: skip
        self.generator: nn.Module = self.network  # the moving average once there is one

    # ------------------------------------------------------------------ learning

    def fit_after(self, task: Task, images: ImageSet, replay: ImageSet, exemplars: ImageSet, encoder) -> None:
        """Train on the task's real images and on replay of the old classes.

        Balanced counts use the classifier's own replay; reference counts draw anew from the raw weights.
        """
        if self.fitted_classes and self.config.counts == "reference":
            replay = self._rehearse_reference(task, len(images))
        batches = ImageBatches(
            images, replay, transform=self.transform, batch_size=self.config.batch_size,
            key=(self.run.seed, task.index, "ddpm"), device=self.run.device, shard=self.run.runtime.shard,
        )  # fmt: skip
        steps = self.config.first_task_num_steps if task.index == 0 else self.config.num_steps
        train_config = TrainConfig(
            steps=steps, lr=self.config.lr, optimizer="adamw", weight_decay=self.config.weight_decay,
            schedule=self.config.lr_schedule, ema_decay=self.config.ema_rate,
        )  # fmt: skip
        average = fit(
            self.network, batches, self.loss, train_config, run=self.run, task=task.index, purpose="ddpm",
            before_epoch=partial(self._before_epoch, task),
        )  # fmt: skip
        self.generator = average if average is not None else self.network
        self.fitted_classes |= set(task.classes)
        self.let_watch(task, math.ceil(steps / len(batches)))

    def _before_epoch(self, task: Task, epoch: int) -> None:
        self.generator = self.network.eval()  # while it trains, the average is not at hand
        self.let_watch(task, epoch)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Noise prediction error of one batch."""
        labels = batch.labels
        if self.config.guidance:
            hidden = torch.rand(len(labels)) < self.config.label_dropout
            labels = labels.masked_fill(hidden.to(labels.device), -1)
        loss = noise_prediction_loss(lambda xt, t: self.network(xt, t, labels), self.train_process, batch.images)
        return {"mse": loss}

    def _rehearse_reference(self, task: Task, num_images: int) -> ImageSet:
        """GUIDE's self-rehearsal: whole batches of i.i.d. old labels, drawn from the frozen raw weights."""
        per_task = self.config.gr_n_generated_examples_per_task or num_images
        size = self.config.batch_size
        total = math.ceil(per_task * task.index / size) * size
        draw = seeding.generator(self.run.seed, task.index, "rehearsal")
        old = torch.tensor(sorted(self.fitted_classes))
        labels = old[torch.randint(len(old), (total,), generator=draw)]
        key = (self.run.seed, "ddpm-rehearsal", task.index)
        requests = Requests(labels, torch.full_like(labels, -1), torch.arange(total), key)
        log.info("Task %d: the generator rehearses on %d images of its own", task.index, total)
        frozen = copy.deepcopy(self.network).eval()
        return ImageSet.of(self.in_chunks(requests, lambda chunk: self._draw(chunk, frozen, None)), labels)

    # ------------------------------------------------------------------ generating

    @torch.no_grad()
    def generate(self, requests: Requests, guide: Guide | None = None) -> ImageSet:
        """Draw one image per request.

        Args:
            requests: N labels with item and copy numbers.
            guide: bends the denoising toward another goal (DDIM only); None leaves it alone.

        Returns:
            N images, (N, C, H, W) uint8, in the order of ``requests``.

        Raises:
            NotFittedError: if a label was never learned.
        """
        self.require_fitted(requests.labels)
        images = self.in_chunks(requests, lambda chunk: self._draw(chunk, self.generator, guide))
        return ImageSet.of(images, requests.labels)

    def _draw(self, requests: Requests, network: nn.Module, guide: Guide | None) -> Tensor:
        """uint8 (N, C, H, W) of one chunk, on the CPU."""
        generators = requests.generators()
        noise = draw_noise(generators, self.image_shape).to(self.run.device)
        labels = requests.labels.to(self.run.device)
        model = self._model(network, labels)
        if self.config.sampler == "ddpm":
            x0 = sample_ddpm(model, noise, self.sample_process, lambda: draw_noise(generators, self.image_shape))
        else:
            bend = None if guide is None else lambda x0: guide(x0, labels)
            x0 = sample_ddim(model, noise, self.sample_process, bend)
        return to_uint8(x0).cpu()

    def _model(self, network: nn.Module, labels: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """The noise predictor of these labels, with classifier-free guidance where it is on."""

        def predict(classes: Tensor):
            def model(xt: Tensor, t: Tensor) -> Tensor:
                with self.run.runtime.autocast():
                    return network(xt, t, classes).float()

            return model

        if not self.config.guidance:
            return predict(labels)
        return classifier_free(predict(labels), predict(torch.full_like(labels, -1)), self.config.guidance)

    # ------------------------------------------------------------------ keeping

    def save(self, directory: Path) -> None:
        """Raw weights (the next task starts from them), the moving average, and the classes learned."""
        save_tensors(Path(directory) / "network.safetensors", self.network.state_dict())
        if self.generator is not self.network:
            save_tensors(Path(directory) / "generator.safetensors", self.generator.state_dict())
        write_json(Path(directory) / "source.json", {"fitted_classes": sorted(self.fitted_classes)})

    def load(self, directory: Path) -> None:
        """Take over what ``save`` wrote."""
        directory = Path(directory)
        self.network.load_state_dict(load_tensors(directory / "network.safetensors"))
        self.generator = self.network
        if (directory / "generator.safetensors").exists():
            self.generator = copy.deepcopy(self.network).requires_grad_(False)
            self.generator.load_state_dict(load_tensors(directory / "generator.safetensors"))
        self.fitted_classes = set(json.loads((directory / "source.json").read_text())["fitted_classes"])

    def describe(self) -> str:
        """Size of the UNet and length of its trainings."""
        millions = sum(parameter.numel() for parameter in self.network.parameters()) / 1e6
        first, later = self.config.first_task_num_steps, self.config.num_steps
        return f"UNet of {millions:.1f} M parameters, trained {first} steps on the first task and {later} on later ones"

    def fingerprint(self) -> str:
        """SHA-256 over the generating weights."""
        return seeding.hash_tensors(self.generator.state_dict())
