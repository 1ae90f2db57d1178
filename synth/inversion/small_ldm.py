"""Our own small latent diffusion model: trained from scratch on the first task, inverted on every later one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from models.latent.small import SmallLDM, SmallLDMConfig
from synth import SOURCES
from synth.base import show_progress
from synth.inversion.latents import LatentBatches, Latents, denoising_loss, encode, noise_scheduler
from synth.inversion.source import ClassInversion
from utils.data.batches import Batch, ImageBatches
from utils.data.images import ImageSet
from utils.data.manager import Task
from utils.data.transforms import DiffusionTransform
from utils.run.carried import Carried
from utils.run.errors import ConfigError
from utils.training import seeding
from utils.training.fit import Hooks, Training, fit
from utils.training.schedule import TrainConfig


@SOURCES.register("small_ldm")
class SmallLDMSource(ClassInversion):
    """A small latent diffusion model learned on the first task's images, one inverted vector per class after it.

    Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022, arXiv:2112.10752, at the
    size of a laptop. The classes of the first task get their vectors in the training of the UNet; from then on
    everything but new vectors is frozen.
    """

    class Config(SmallLDMConfig, ClassInversion.Config):
        sample_batch: int = Field(128, ge=1, description="images drawn at once")
        samples_per_class: int = Field(1000, ge=1, description="images shown per class in the search, in whole batches")
        inversion_lr: float = Field(0.1, gt=0, description="AdamW's rate in the search; vectors here are long")
        guidance: float = Field(2.0, ge=0, description="classifier-free: 1 is the plain class, 0 no class at all")
        weights: str | None = Field(None, description="folder of a model that was trained before; then none is trained")
        image_size: int | None = Field(None, ge=4, description="side in pixels; null: the data set's own")
        vae_steps: int = Field(500, ge=1, description="training steps of the autoencoder")
        vae_lr: float = Field(2e-3, gt=0, description="AdamW's rate for it")
        vae_batch_size: int = Field(64, ge=1, description="images per step of it")
        vae_turns: bool = Field(True, description="also show it turned and mirrored images, for the classes to come")
        kl_weight: float = Field(1e-4, ge=0, description="of the divergence from a standard normal, per latent value")
        unet_steps: int = Field(900, ge=1, description="training steps of UNet and class vectors")
        unet_lr: float = Field(2e-3, gt=0, description="AdamW's rate for them")
        unet_batch_size: int = Field(32, ge=1, description="latents per step of them")
        label_dropout: float = Field(0.1, ge=0, lt=1, description="share of classes hidden in training for guidance")
        lr_schedule: Literal["constant", "cosine", "linear"] = Field("linear", description="of both rates, down to 0")
        ema_rate: float = Field(0.99, ge=0, lt=1, description="decay of the averages that are used; 0: raw weights")

    def __init__(self, config, run, num_classes, class_names, dataset):
        super().__init__(config, run, num_classes, class_names, dataset)
        if not config.inversion:
            raise ConfigError("synth.inversion=false draws by class names, which small_ldm cannot read: leave it true")
        if config.weights is None:
            self.new_model(["check"])  # what does not fit is said now, not after a classifier has trained
        elif config.need_syn_imgs and (channels := self.model.image_channels) != dataset.channels:
            raise ConfigError(
                f"synth.weights={config.weights!r} draws images of {channels} channels, but {dataset.name} has "
                f"{dataset.channels}: name a model that was trained on such images"
            )

    def build_model(self) -> SmallLDM:
        return self._load(self.config.weights)

    def _load(self, folder: str | Path) -> SmallLDM:
        remedy = "name a folder that `python -m synth.train` wrote with the source 'small_ldm'"
        return SmallLDM.load(folder, remedy).to(self.run.device)

    # ------------------------------------------------------------------ learning

    def fit_before(self, task: Task, images: ImageSet) -> None:
        """Train the model on the first task, which finds its classes' vectors too; invert the classes of later ones.

        With ``weights`` nothing is trained, and those classes of the first task that the model does not know by name
        are inverted.
        """
        known: dict[int, Tensor] = {}
        if task.index == 0:
            if self.config.weights is None:
                self._train(task, images)
            rows = dict(zip(self.model.class_names, self.model.denoiser.table.cpu()))
            known = {label: rows[name] for label, name in zip(task.classes, task.class_names) if name in rows}
        self.vectors |= known
        new = [label for label in task.classes if label not in known]
        if new:
            self.invert(task, new, images.select(new))
        self.fitted_classes |= set(task.classes)

    def new_model(self, class_names: list[str]) -> SmallLDM:
        """A model with random weights."""
        config, size = self.config, self.config.image_size or self.dataset.image_size
        return SmallLDM((self.dataset.channels, size, size), class_names, SmallLDMConfig.of(config))

    def _train(self, task: Task, images: ImageSet) -> None:
        """First the autoencoder, then, on its latents, the UNet and the vectors."""
        config, run = self.config, self.run
        seeding.seed_everything(run.seed, "small_ldm")
        model = self._model = self.new_model(list(task.class_names)).to(run.device)
        self._train_autoencoder(model, task, images)
        latents = encode(model, images, self.flip, config.sample_batch, run, f"task {task.index} encode")
        model.scale.fill_(1 / spread(latents))
        self._train_denoiser(model, task, Latents(latents.moments * model.scale.cpu(), latents.labels))
        self._kept = {}
        self.use(model.freeze())

    def _train_autoencoder(self, model: SmallLDM, task: Task, images: ImageSet) -> None:
        config, run = self.config, self.run
        size = model.image_size
        transform = TurningTransform(size) if config.vae_turns else DiffusionTransform(size, self.flip)
        batches = ImageBatches(images, None, run.loading(transform, config.vae_batch_size, task.index, "vae"))

        def loss(batch: Batch) -> dict[str, Tensor]:
            posterior = model.vae.encode(batch.images).latent_dist
            drawn = model.vae.decode(posterior.sample(), return_dict=False)[0]
            kl = posterior.kl().mean() / posterior.mean[0].numel()
            return {"reconstruction": F.mse_loss(drawn.float(), batch.images), "kl": config.kl_weight * kl}

        length = self._length(config.vae_steps, config.vae_lr)
        _keep(model.vae, fit(model.vae, batches, loss, length, Training(run, task, "vae")))

    def _train_denoiser(self, model: SmallLDM, task: Task, latents: Latents) -> None:
        config, run, scheduler = self.config, self.run, noise_scheduler(model.schedule)
        batches = LatentBatches(latents, run.loading(None, config.unet_batch_size, task.index, "unet"))

        def loss(batch: Batch) -> dict[str, Tensor]:
            shown = (torch.rand(len(batch)) >= config.label_dropout).tolist()
            vectors = model.denoiser.table[batch.labels - task.classes.start]
            context = model.context([config.prompt if show else "" for show in shown], vectors)
            return {"mse": denoising_loss(model, batch.images, context, scheduler)}

        def show(epoch: int) -> None:
            model.denoiser.eval()
            self.vectors = dict(zip(task.classes, model.denoiser.table.detach()))
            show_progress(self, task, epoch)

        length = self._length(config.unet_steps, config.unet_lr)
        hooks = Hooks(before_epoch=lambda step: show(step.epoch))
        _keep(model.denoiser, fit(model.denoiser, batches, loss, length, Training(run, task, "unet"), hooks))
        show(math.ceil(config.unet_steps / len(batches)))

    def _length(self, steps: int, lr: float) -> TrainConfig:
        schedule, decay = self.config.lr_schedule, self.config.ema_rate
        return TrainConfig(steps=steps, lr=lr, optimizer="adamw", schedule=schedule, ema_decay=decay)

    # ------------------------------------------------------------------ keeping

    def save(self, directory: Path) -> None:
        """The vectors, and the model if it was learned here."""
        super().save(directory)
        if self.fitted_classes and self.config.weights is None:
            self.model.save(directory)

    def load(self, directory: Path) -> None:
        """Take over what ``save`` wrote."""
        super().load(directory)
        if self.fitted_classes:
            self.use(self._load(self.config.weights or directory))

    def carried(self) -> list[Carried]:
        """Name vectors and model, which stands apart as frozen only if it came from elsewhere."""
        return [line for line in super().carried() if self.config.weights is not None or not line.frozen]

    def describe(self) -> str:
        """Size of the model, and length of its training or where it comes from."""
        config = self.config
        model = self.new_model(list(self.class_names)) if config.weights is None else self.model
        millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        origin = f"of {config.weights}" if config.weights else (
            f"trained on the first task, {config.vae_steps} steps of autoencoder and {config.unet_steps} of UNet"
        )  # fmt: skip
        return f"{millions:.1f} M parameters, {origin}; {super().describe()}"


class TurningTransform(DiffusionTransform):
    """Square images in all eight positions, each equally likely.

    An autoencoder that saw a few classes alone draws later ones badly: on digits, turned ones, which are no digits but
    strokes, halve its error on unseen classes.
    """

    def __init__(self, size: int):
        super().__init__(size, flip=True)

    def train(self, images: Tensor, generator: torch.Generator) -> Tensor:
        images = super().train(images, generator)
        upside_down, turned = (torch.rand(2, len(images), 1, 1, 1, generator=generator) < 0.5).to(images.device)
        images = torch.where(upside_down, images.flip(-2), images)
        return torch.where(turned, images.transpose(-1, -2), images).contiguous()


def _keep(module: nn.Module, average: nn.Module | None) -> None:
    """From now on the moving average, if there is one."""
    if average is not None:
        module.load_state_dict(average.state_dict())


def spread(latents: Latents) -> float:
    """Standard deviation of all values of the latents as they are sampled."""
    mean, std = latents.moments.chunk(2, dim=2)
    return (mean.var() + std.square().mean()).sqrt().item()
