"""A small ControlNet of our own: trained from scratch on the first task, it draws later exemplars from their edges."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from models.frozen import weight_bytes
from models.latent.small_control import SmallControlNet, SmallControlNetConfig
from synth import SOURCES
from synth.escort.edges import EdgeMap
from synth.escort.source import ExemplarCompression
from synth.inversion.latents import denoising_loss, noise_scheduler
from synth.own import OwnGenerator, TurningTransform
from synth.requests import Requests, draw_noise
from synth.samplers import sample_scheduled, sample_scheduler
from utils.data.batches import Batch, ImageBatches
from utils.data.images import ImageSet
from utils.data.manager import Task
from utils.data.transforms import DiffusionTransform, to_uint8
from utils.run.carried import Carried
from utils.run.config import BatchSize, Factor, Rate
from utils.run.errors import ConfigError
from utils.training import seeding
from utils.training.fit import Training
from utils.training.flops import forward_flops


@SOURCES.register("small_controlnet")
class SmallControlNetSource(OwnGenerator, ExemplarCompression):
    """ESCORT with a small diffusion model in pixels and its ControlNet, both learned on the first task's images.

    Zhang et al., ICCV 2023, arXiv:2302.05543: the UNet first, then, with the UNet frozen, the copy of its encoder that
    reads edges. It reads no class, so classes of later tasks are drawn along their edges like any other.
    """

    network = SmallControlNet
    _model: SmallControlNet | None = None

    class Config(OwnGenerator.Config, SmallControlNetConfig, ExemplarCompression.Config):
        places: ClassVar[set[str]] = {"weights"}

        sample_batch: BatchSize = Field(256, description="images drawn at once")
        turns: bool = Field(True, description="learn from turned and mirrored images too, for the classes to come")
        unet_steps: int = Field(400, ge=1, description="training steps of the UNet")
        control_steps: int = Field(600, ge=1, description="training steps of the ControlNet")
        batch_size: BatchSize = Field(64, description="images per step of both")
        lr: Rate = Field(2e-3, description="AdamW's rate for both")
        control_strength: Factor = Field(1.0, description="factor of what the ControlNet adds")
        scheduler: Literal["ddim", "dpmpp", "unipc", "euler"] = Field("ddim", description="how copies are drawn")
        sample_steps: int = Field(20, ge=1, lt=1000, description="steps of it")

    def __init__(self, config, run, num_classes, class_names, dataset):
        super().__init__(config, run, num_classes, class_names, dataset)
        if config.weights is not None and config.map_size not in (None, self.model.map_size):
            found = f"the model in synth.weights={config.weights!r} reads maps of {self.model.map_size} pixels"
            raise ConfigError(f"synth.map_size={config.map_size}, but {found}: leave map_size out")

    def new_model(self) -> SmallControlNet:
        """Build a model with random weights."""
        shape = (self.dataset.channels, *[self.dataset.image_size] * 2)
        return SmallControlNet(shape, SmallControlNetConfig.of(self.config))

    @property
    def model(self) -> SmallControlNet:
        """The generator, read when it is first asked for if it comes from elsewhere."""
        self._model = self._model or self.build_model()
        return self._model

    @property
    def step_flops(self) -> int | None:
        """Count those of the UNet; its ControlNet adds about half."""
        t = torch.zeros(self.config.batch_size, dtype=torch.int64, device="meta")
        model = self.new_model() if self.config.weights is None else self.model
        return forward_flops(model.unet, torch.zeros(len(t), *model.image_shape, device="meta"), t, None)

    def published_weights(self) -> str:
        return "" if self.config.weights is None else self.model.fingerprint()

    # ------------------------------------------------------------------ learning

    def fit_before(self, task: Task, images: ImageSet) -> None:
        """Train the generator on the first task."""
        super().fit_before(task, images)
        if task.index == 0 and self.config.weights is None:
            seeding.seed_everything(self.run.seed, "small_controlnet")
            model = self._model = self.new_model().to(self.run.device)
            self._train(model.unet, Training(self.run, task, "unet"), images, self.config.unet_steps)
            model.unet.requires_grad_(False)
            seeding.seed_everything(self.run.seed, "small_controlnet", "control")
            model.control.load_state_dict(model.fresh_control().state_dict())
            self._train(model.control, Training(self.run, task, "control"), images, self.config.control_steps)
            model.freeze()

    def _train(self, part: nn.Module, training: Training, images: ImageSet, steps: int) -> None:
        """Train the UNet alone, or the ControlNet under the frozen UNet; the average of its weights is kept."""
        config, model, scheduler = self.config, self.model, noise_scheduler(self.model.schedule)
        side = model.image_shape[1]
        transform = TurningTransform(side) if config.turns else DiffusionTransform(side, flip=False)
        loading = self.run.loading(transform, config.batch_size, training.task.index, training.purpose)

        def loss(batch: Batch) -> dict[str, Tensor]:
            maps = map(self.compress, to_uint8(batch.images).cpu())
            edges = self._hints(maps) if part is model.control else None
            return {"mse": denoising_loss(model, batch.images, edges, scheduler)}

        self.train_part(part, ImageBatches(images, None, loading), loss, (steps, config.lr), training)

    def _hints(self, maps: Iterable[EdgeMap]) -> Tensor:
        """Turn B maps into what the ControlNet reads, float (B, 1, M, M)."""
        return torch.stack([one.edges() for one in maps])[:, None].float().to(self.run.device)

    # ------------------------------------------------------------------ maps and images

    def map_shape(self, height: int, width: int) -> tuple[int, int]:
        side = self.config.map_size or self.dataset.image_size
        return (side if self.config.weights is None else self.model.map_size,) * 2

    def draw(self, requests: Requests, maps: list[EdgeMap], generators: list[torch.Generator]) -> list[Tensor]:
        config, model = self.config, self.model
        predict = self.run.runtime.autocast()(model.predict)
        along_edges = partial(predict, edges=self._hints(maps), strength=config.control_strength)
        noise = draw_noise(generators, model.image_shape).to(self.run.device)
        scheduler = sample_scheduler(config.scheduler, model.schedule, config.sample_steps)
        return list(to_uint8(sample_scheduled(along_edges, noise, scheduler)).cpu())

    # ------------------------------------------------------------------ keeping

    def load(self, directory: Path) -> None:
        """Take over what ``save`` wrote."""
        super().load(directory)
        if self.config.weights is None:
            self._model = self.load_model(directory)

    def carried(self) -> list[Carried]:
        """Name the maps and the generator, which is memory of the past only if it was learned here."""
        nbytes = 0 if self.config.weights is None else weight_bytes(self.model)
        return [*super().carried(), Carried("frozen", nbytes=nbytes, frozen=True)]

    def fingerprint(self) -> str:
        """Hash the generator by SHA-256; the maps name themselves in every copy."""
        return "" if self._model is None else self._model.fingerprint()

    def training_steps(self) -> str:
        """Say how long the two parts are trained."""
        return f"{self.config.unet_steps} steps of UNet and {self.config.control_steps} of ControlNet"
