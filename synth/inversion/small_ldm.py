"""Our own small latent diffusion model: trained from scratch on the first task, inverted on every later one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from models.latent.small import SmallLDM, SmallLDMConfig
from synth import SOURCES
from synth.base import show_progress
from synth.inversion.latents import LatentBatches, denoising_loss, encode, noise_scheduler
from synth.inversion.source import ClassInversion
from synth.own import OwnGenerator, TurningTransform
from utils.data.batches import Batch, ImageBatches
from utils.data.images import ImageSet
from utils.data.manager import Task
from utils.data.transforms import DiffusionTransform
from utils.run.carried import Carried
from utils.run.config import BatchSize, Factor, Rate, Side, Width
from utils.run.errors import ConfigError
from utils.training import seeding
from utils.training.fit import Hooks, Training
from utils.training.flops import forward_flops


@SOURCES.register("small_ldm")
class SmallLDMSource(OwnGenerator, ClassInversion):
    """A small latent diffusion model learned on the first task's images, one inverted vector per class after it.

    Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022, arXiv:2112.10752, at the
    size of a laptop. The classes of the first task get their vectors in the training of the UNet; from then on
    everything but new vectors is frozen.
    """

    network = SmallLDM

    class Config(OwnGenerator.Config, SmallLDMConfig, ClassInversion.Config):
        block_out_channels: list[Width] = Field([64, 96], min_length=1, description="UNet's width per level")
        sample_batch: BatchSize = Field(128, description="images drawn at once")
        samples_per_class: int = Field(1000, ge=1, description="images shown per class in the search, in whole batches")
        inversion_lr: Rate = Field(0.1, description="AdamW's rate in the search; vectors here are long")
        guidance: Factor = Field(2.0, description="classifier-free: 1 is the plain class, 0 no class at all")
        image_size: Side | None = Field(None, description="side in pixels; null: the data set's own")
        vae_steps: int = Field(500, ge=1, description="training steps of the autoencoder")
        vae_lr: Rate = Field(2e-3, description="AdamW's rate for it")
        vae_batch_size: BatchSize = Field(64, description="images per step of it")
        vae_turns: bool = Field(True, description="also show it turned and mirrored images, for the classes to come")
        kl_weight: Factor = Field(1e-4, description="of the divergence from a standard normal, per latent value")
        unet_steps: int = Field(900, ge=1, description="training steps of UNet and class vectors")
        unet_lr: Rate = Field(2e-3, description="AdamW's rate for them")
        unet_batch_size: BatchSize = Field(32, description="latents per step of them")
        label_dropout: float = Field(0.1, ge=0, lt=1, description="share of classes hidden in training for guidance")

    def __init__(self, config, run, num_classes, class_names, dataset):
        super().__init__(config, run, num_classes, class_names, dataset)
        if not config.inversion:
            raise ConfigError("synth.inversion=false draws by class names, which small_ldm cannot read: leave it true")

    # ------------------------------------------------------------------ learning

    @property
    def step_flops(self) -> int | None:
        """Count those of the autoencoder, the larger part."""
        model = self.new_model() if self.config.weights is None else self.model
        shape = (self.config.vae_batch_size, *model.data["image_shape"])
        return forward_flops(model.vae, torch.zeros(shape, device="meta"))

    def fit_before(self, task: Task, images: ImageSet) -> None:
        """Train the model on the first task, which finds its classes' vectors too; invert the classes of later ones.

        With ``weights`` nothing is trained, and those classes of the first task that the model does not know by name
        are inverted.
        """
        if task.index == 0:
            if self.config.weights is None:
                self._train(task, images)
            rows = dict(zip(self.model.class_names, self.model.denoiser.table.cpu()))
            self.vectors = {label: rows[name] for label, name in zip(task.classes, task.class_names) if name in rows}
        if new := [label for label in task.classes if label not in self.vectors]:
            self.invert(task, new, images.select(new))
        self.fitted_classes |= set(task.classes)

    def new_model(self, class_names: Sequence[str] | None = None) -> SmallLDM:
        """Return a model with random weights and a vector for each of these classes, or of all."""
        size = self.config.image_size or self.dataset.image_size
        names = self.class_names if class_names is None else class_names
        return SmallLDM((self.dataset.channels, size, size), names, SmallLDMConfig.of(self.config))

    def _train(self, task: Task, images: ImageSet) -> None:
        """Train the autoencoder and then, on its latents, the UNet and the vectors."""
        config, run = self.config, self.run
        seeding.seed_everything(run.seed, "small_ldm")
        model = self._model = self.new_model(task.class_names).to(run.device)
        self._train_autoencoder(model, task, images)
        moments = encode(model, images, self.flip, config.sample_batch, run, f"task {task.index} encode")
        mean, std = moments.chunk(2, dim=2)
        model.scale.fill_(1 / (mean.var() + std.square().mean()).sqrt().item())  # sampled latents get unit spread
        if model.denoiser.unet is not None:
            loading = run.loading(None, config.unet_batch_size, task.index, "unet")
            self._train_denoiser(model, task, LatentBatches(moments * model.scale.cpu(), images.labels, loading))
        self.use(model.freeze())

    def _train_autoencoder(self, model: SmallLDM, task: Task, images: ImageSet) -> None:
        config, run = self.config, self.run
        size = model.image_size
        transform = TurningTransform(size) if config.vae_turns else DiffusionTransform(size, self.flip)
        batches = ImageBatches(images, None, run.loading(transform, config.vae_batch_size, task.index, "vae"))

        def loss(batch: Batch) -> dict[str, Tensor]:
            drawn, posterior = model.reconstruct(batch.images)
            kl = posterior.kl().mean() / posterior.mean[0].numel()
            return {"reconstruction": F.mse_loss(drawn.float(), batch.images), "kl": config.kl_weight * kl}

        self.train_part(model.vae, batches, loss, (config.vae_steps, config.vae_lr), Training(run, task, "vae"))

    def _train_denoiser(self, model: SmallLDM, task: Task, batches: LatentBatches) -> None:
        config, scheduler = self.config, noise_scheduler(model.schedule)

        def loss(batch: Batch) -> dict[str, Tensor]:
            shown = (torch.rand(len(batch)) >= config.label_dropout).tolist()
            vectors = model.denoiser.table[batch.labels - task.classes.start]
            context = model.context([config.prompt if show else "" for show in shown], vectors)
            return {"mse": denoising_loss(model, batch.images, context, scheduler)}

        def show(epoch: int) -> None:
            model.denoiser.eval()
            self.vectors = dict(zip(task.classes, model.denoiser.table.detach()))
            show_progress(self, task, epoch)

        length, training = (config.unet_steps, config.unet_lr), Training(self.run, task, "unet")
        self.train_part(model.denoiser, batches, loss, length, training, Hooks(lambda step: show(step.epoch)))
        show(math.ceil(config.unet_steps / len(batches)))

    # ------------------------------------------------------------------ keeping

    def load(self, directory: Path) -> None:
        """Take over what ``save`` wrote."""
        super().load(directory)
        if self.fitted_classes:
            self.use(self.load_model(self.config.weights or directory))

    def carried(self) -> list[Carried]:
        """Name vectors and model, which stands apart as frozen only if it came from elsewhere."""
        return [line for line in super().carried() if self.config.weights is not None or not line.frozen]

    def training_steps(self) -> str:
        """Say how long the two parts are trained."""
        unet = f" and {self.config.unet_steps} of UNet" if self.config.block_out_channels else ", no UNet"
        return f"{self.config.vae_steps} steps of autoencoder{unet}"
