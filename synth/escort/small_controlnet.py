"""A small ControlNet of our own: trained from scratch on the first task, it draws later exemplars from their edges."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from models.latent.small_control import SmallControlNet, SmallControlNetConfig
from synth import SOURCES
from synth.escort.edges import EdgeMap, resize, restore
from synth.escort.source import ExemplarCompression
from synth.inversion.latents import denoising_loss, noise_scheduler, sample_scheduled, sample_scheduler
from synth.inversion.small_ldm import TurningTransform
from synth.requests import Requests, draw_noise
from utils.data.batches import Batch, ImageBatches
from utils.data.images import ImageSet
from utils.data.manager import Task
from utils.data.transforms import DiffusionTransform, to_uint8
from utils.run.carried import Carried
from utils.run.errors import ConfigError, NotFittedError
from utils.training import seeding
from utils.training.fit import Training, fit
from utils.training.schedule import TrainConfig


@SOURCES.register("small_controlnet")
class SmallControlNetSource(ExemplarCompression):
    """ESCORT with a small diffusion model in pixels and its ControlNet, both learned on the first task's images.

    Zhang et al., ICCV 2023, arXiv:2302.05543: the UNet first, then, with the UNet frozen, the copy of its encoder that
    reads edges. It reads no class, so classes of later tasks are drawn along their edges like any other.
    """

    class Config(SmallControlNetConfig, ExemplarCompression.Config):
        places: ClassVar[frozenset[str]] = frozenset({"weights"})

        sample_batch: int = Field(256, ge=1, description="images drawn at once")
        weights: str | None = Field(None, description="folder of a model that was trained before; then none is trained")
        turns: bool = Field(True, description="learn from turned and mirrored images too, for the classes to come")
        unet_steps: int = Field(400, ge=1, description="training steps of the UNet")
        control_steps: int = Field(600, ge=1, description="training steps of the ControlNet")
        batch_size: int = Field(64, ge=1, description="images per step of both")
        lr: float = Field(2e-3, gt=0, description="AdamW's rate for both")
        lr_schedule: Literal["constant", "cosine", "linear"] = Field("linear", description="of the rates, down to 0")
        ema_rate: float = Field(0.99, ge=0, lt=1, description="decay of the averages that are used; 0: raw weights")
        control_strength: float = Field(1.0, ge=0, description="factor of what the ControlNet adds")
        scheduler: Literal["ddim", "dpmpp", "unipc", "euler"] = Field("ddim", description="how copies are drawn")
        sample_steps: int = Field(20, ge=1, lt=1000, description="steps of it")

    def __init__(self, config, run, num_classes, class_names, dataset):
        super().__init__(config, run, num_classes, class_names, dataset)
        self._model: SmallControlNet | None = None
        if config.weights is None:
            self.new_model()  # what does not fit is said now, not after a classifier has trained
        elif config.map_size not in (None, self.model.map_size):
            raise ConfigError(
                f"synth.map_size={config.map_size}, but the model in synth.weights={config.weights!r} reads maps of "
                f"{self.model.map_size} pixels: leave map_size out"
            )
        elif self.model.image_shape[0] != dataset.channels:
            raise ConfigError(
                f"synth.weights={config.weights!r} draws images of {self.model.image_shape[0]} channels, but "
                f"{dataset.name} has {dataset.channels}: name a model that was trained on such images"
            )

    def new_model(self) -> SmallControlNet:
        """A model with random weights."""
        side = self.dataset.image_size
        return SmallControlNet((self.dataset.channels, side, side), SmallControlNetConfig.of(self.config))

    def _load(self, folder: str | Path) -> SmallControlNet:
        remedy = "name a folder that `python -m synth.train` wrote with the source 'small_controlnet'"
        return SmallControlNet.load(folder, remedy).to(self.run.device)

    @property
    def model(self) -> SmallControlNet:
        """The generator; with ``weights`` it is read when it is first asked for.

        Raises:
            NotFittedError: if it was to be learned and the first task did not pass.
        """
        if self._model is None:
            if self.config.weights is None:
                raise NotFittedError(
                    "small_controlnet learns its generator on task 0, which has not passed: fit task 0 too, or name "
                    "the folder of a trained one with synth.weights"
                )
            self._model = self._load(self.config.weights)
        return self._model

    def published_weights(self) -> str:
        return "" if self.config.weights is None else self.model.fingerprint()

    # ------------------------------------------------------------------ learning

    def fit_before(self, task: Task, images: ImageSet) -> None:
        """On the first task, train the generator."""
        super().fit_before(task, images)
        if task.index == 0 and self.config.weights is None:
            seeding.seed_everything(self.run.seed, "small_controlnet")
            model = self._model = self.new_model().to(self.run.device)
            self._train(model, model.unet, task, images, "unet", self.config.unet_steps)
            model.unet.requires_grad_(False)
            seeding.seed_everything(self.run.seed, "small_controlnet", "control")
            model.control.load_state_dict(model.fresh_control().state_dict())
            self._train(model, model.control, task, images, "control", self.config.control_steps)
            model.freeze()

    def _train(
        self, model: SmallControlNet, part: nn.Module, task: Task, images: ImageSet, name: str, steps: int
    ) -> None:
        """Train the UNet alone, or the ControlNet under the frozen UNet; the average of its weights is kept."""
        config, run, side = self.config, self.run, model.image_shape[1]
        scheduler = noise_scheduler(model.schedule)
        transform = TurningTransform(side) if config.turns else DiffusionTransform(side, flip=False)
        batches = ImageBatches(images, None, run.loading(transform, config.batch_size, task.index, name))

        def loss(batch: Batch) -> dict[str, Tensor]:
            edges = self._edges(batch.images) if part is model.control else None
            return {"mse": denoising_loss(model, batch.images, edges, scheduler)}

        length = TrainConfig(
            steps=steps, lr=config.lr, optimizer="adamw", schedule=config.lr_schedule, ema_decay=config.ema_rate
        )
        average = fit(part, batches, loss, length, Training(run, task, name))
        if average is not None:
            part.load_state_dict(average.state_dict())

    def _edges(self, images: Tensor) -> Tensor:
        """Edge maps of a batch, float (B, C, S, S) in [-1, 1], as the ControlNet reads them: (B, 1, M, M)."""
        maps = [self.compress(image).edges() for image in to_uint8(images).cpu()]
        return torch.stack(maps)[:, None].float().to(images.device)

    # ------------------------------------------------------------------ maps and images

    def map_shape(self, height: int, width: int) -> tuple[int, int]:
        side = self.config.map_size or self.dataset.image_size
        return (side if self.config.weights is None else self.model.map_size,) * 2

    def enlarge(self, image: Tensor, height: int, width: int) -> Tensor:
        return resize(image, height, width, enlarges=height * width >= image.shape[-2] * image.shape[-1])

    def draw(self, requests: Requests, maps: list[EdgeMap], generators: list[torch.Generator]) -> list[Tensor]:
        config, model = self.config, self.model
        edges = torch.stack([one.edges() for one in maps])[:, None].float().to(self.run.device)

        def predict(xt: Tensor, t: Tensor) -> Tensor:
            with self.run.runtime.autocast():
                return model.predict(xt, t, edges, config.control_strength)

        noise = draw_noise(generators, model.image_shape).to(self.run.device)
        scheduler = sample_scheduler(config.scheduler, model.schedule, config.sample_steps)
        images = to_uint8(sample_scheduled(predict, noise, scheduler)).cpu()
        return [restore(image, one.size) for image, one in zip(images, maps)]

    # ------------------------------------------------------------------ keeping

    def save(self, directory: Path) -> None:
        """The edge maps, and the generator if it was learned here."""
        super().save(directory)
        if self._model is not None and self.config.weights is None:
            self._model.save(directory)

    def load(self, directory: Path) -> None:
        """Take over what ``save`` wrote."""
        super().load(directory)
        if self.config.weights is None:
            self._model = self._load(directory)

    def carried(self) -> list[Carried]:
        """Name the maps and the generator, which is memory of the past only if it was learned here."""
        nbytes = 0 if self.config.weights is None else self.model.frozen_bytes()
        return [*super().carried(), Carried("frozen", nbytes=nbytes, frozen=True)]

    def fingerprint(self) -> str:
        """SHA-256 over the generator; the maps name themselves in every copy."""
        return "" if self._model is None and self.config.weights is None else self.model.fingerprint()

    def describe(self) -> str:
        """Size of the generator, and length of its training or where it comes from."""
        config = self.config
        model = self.new_model() if config.weights is None else self.model
        millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        origin = f"of {config.weights}" if config.weights else (
            f"trained on the first task, {config.unet_steps} steps of UNet and {config.control_steps} of ControlNet"
        )  # fmt: skip
        return f"{millions:.1f} M parameters, {origin}; {super().describe()}"
