"""A class-conditional DDPM that learns task after task, rehearsing on its own images."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from models.files.weights import load_exactly, read_weights
from models.frozen import fixed
from synth import SOURCES
from synth.base import ReplaySource, show_progress
from synth.ddpm.network import ClassUNet, ClassUNetConfig
from synth.ddpm.words import translate
from synth.diffusion import (
    Bend,
    Model,
    classifier_free,
    linear_process,
    noise_prediction_loss,
    respace,
    sample_ddim,
    sample_ddpm,
)  # fmt: skip
from synth.drawing import ImageFolder
from synth.requests import Requests, draw_labels, draw_noise
from utils.data.batches import Batch, ImageBatches
from utils.data.images import ImageSet
from utils.data.manager import Task
from utils.data.transforms import AUGMENTATIONS, DiffusionTransform, to_uint8
from utils.run.config import BatchSize, Decay, Factor, Place, Rate, Side, SourceConfig
from utils.run.errors import ConfigError
from utils.run.files import load_tensors, read_json, save_tensors, write_json
from utils.run.log import log
from utils.training import seeding
from utils.training.fit import Hooks, Step, Training, fit
from utils.training.schedule import TrainConfig


class Sampling(NamedTuple):
    """How images are drawn: time steps such as "ddim50", and "ddim" or "ddpm"."""

    timestep_respacing: str
    sampler: str = "ddim"


@SOURCES.register("ddpm")
class DDPM(ReplaySource):
    """One UNet for all classes, trained on each task's real images and on replay of the classes before.

    Ho et al., "Denoising Diffusion Probabilistic Models", NeurIPS 2020, arXiv:2006.11239; trained continually as in
    GUIDE (Cywinski et al. 2024, arXiv:2403.03938), whose settings are the defaults. Every task starts from the last
    task's raw weights, with a new optimiser and a new moving average; the average generates.
    """

    class Config(ClassUNetConfig, SourceConfig):
        # Its rehearsal is drawn with the first four too, but a later run only draws with what is learned.
        drawing: ClassVar[set[str]] = {"sampler", "timestep_respacing", "guidance", "clip_x0", "gradient_checkpointing"}

        image_size: Side | None = Field(None, description="side in pixels; null: the data set's own")
        attention_resolutions: list[int] | None = Field(None, description="sides with attention, not attention_levels")
        # Another number without betas scales both by 1000 / diffusion_steps, as GUIDE does: see words.py
        diffusion_steps: int = Field(1000, ge=1, le=10**5, description="time steps of the full process")
        beta_start: float = Field(1e-3, ge=1e-7, lt=1, description="variance of the first step")
        beta_end: float = Field(2e-2, ge=1e-7, lt=1, description="variance of the last step")
        train_respacing: str = Field("", description="train on a subset such as ddim250; empty: all steps")
        first_task_num_steps: int = Field(100_000, ge=1, description="training steps of the first task")
        num_steps: int = Field(50_000, ge=1, description="training steps of every later task")
        batch_size: BatchSize = Field(256, description="images per training step, replay included")
        flip: bool | None = Field(None, description="show mirror images too; null: where the data set's recipe does")
        lr: Rate = Field(2e-4, description="AdamW's rate, constant")
        lr_schedule: Literal["constant", "cosine", "linear"] = Field("constant", description="of lr, down to 0")
        weight_decay: Decay = Field(0.0, description="AdamW's")
        ema_rate: float = Field(0.9999, ge=0, lt=1, description="decay of the average that generates; 0: raw weights")
        init_weights: Place | None = Field(None, description="folder of a DDPM whose average starts it")
        clip_x0: bool = Field(True, description="clamp predicted images to their range at every step of sampling")
        sampler: Literal["ddim", "ddpm"] = Field("ddim", description="how replay is drawn")
        timestep_respacing: str = Field("ddim50", description="sampling steps: ddimN strided, N spread; empty: all")
        guidance: Factor = Field(0.0, description="classifier-free guidance, 1 is the plain conditional; 0: off")
        label_dropout: float = Field(0.1, ge=0, lt=1, description="share of labels hidden in training for guidance")
        # Old classes in its training come from the learner's replay, or it draws them itself from its raw weights.
        rehearsal: Literal["replay", "own"] = Field("replay", description="whose images of old classes it sees")
        # reference: as GUIDE has it, labels by chance in whole batches, and only whole batches in training
        counts: Literal["balanced", "reference"] = Field("balanced", description="of the classes in its own draw")
        # null: as many as the new task has real ones
        gr_n_generated_examples_per_task: int | None = Field(None, ge=1, le=10**7, description="its images of a task")

        translate = staticmethod(translate)  # of GUIDE's flags

        @model_validator(mode="after")
        def _noise_grows(self) -> DDPM.Config:
            if self.beta_start > self.beta_end:
                raise ValueError(f"synth.beta_start={self.beta_start} is above synth.beta_end={self.beta_end}")
            return self

        def training_settings(self) -> dict[str, Any]:
            """Leave out what is not learned: without guidance no label is hidden."""
            return {**super().training_settings(), "label_dropout": self.label_dropout if self.guidance else 0}

    def __init__(self, config, run, num_classes, class_names, dataset):
        super().__init__(config, run, num_classes, class_names, dataset)
        size = config.image_size or dataset.image_size
        self.image_shape = (dataset.channels, size, size)
        flip = AUGMENTATIONS[dataset.augmentation].flip if config.flip is None else config.flip
        self.transform = DiffusionTransform(size, flip)
        self.process = linear_process(config.diffusion_steps, config.beta_start, config.beta_end)
        self.train_process = respace(self.process, config.train_respacing, "synth.train_respacing")
        respace(self.process, config.timestep_respacing, "synth.timestep_respacing")  # what does not fit is said now
        self.wants_past = config.rehearsal == "replay"
        seeding.seed_everything(run.seed, "ddpm")
        self.network = self.build_network().to(run.device).eval()
        self.generator: nn.Module = self.network  # the moving average once there is one
        if config.init_weights is not None:
            self._start_from(Path(config.init_weights))

    def build_network(self) -> nn.Module:
        """Build the noise predictor with random weights: (xt, t, labels) -> eps, where label -1 is no class."""
        config = ClassUNetConfig.of(self.config, attention_levels=self.attention_levels())
        return ClassUNet(self.image_shape, self.num_classes, config)

    def attention_levels(self) -> list[int]:
        """Return the levels with attention, which may be given by their sides."""
        if (wanted := self.config.attention_resolutions) is None:
            return self.config.attention_levels
        sides = [self.image_shape[1] >> level for level in range(len(self.config.block_out_channels))]
        if foreign := [side for side in wanted if side not in sides]:
            raise ConfigError(f"synth.attention_resolutions={foreign}: the levels of this UNet have sides {sides}")
        return [sides.index(side) for side in wanted]

    def _start_from(self, folder: Path) -> None:
        found = [folder / name for name in ("generator.safetensors", "network.safetensors")]
        path = next((path for path in found if path.is_file()), None)
        if path is None:
            remedy = "name a `source` folder of a run's checkpoint, or a folder of `python -m synth.train`"
            raise ConfigError(f"synth.init_weights={str(folder)!r} holds no DDPM: {remedy}")
        load_exactly(self.network, read_weights(path), path, "this UNet", "Set synth's keys as they were there")

    # ------------------------------------------------------------------ learning

    def fit_after(self, task: Task, images: ImageSet, past: ImageSet, exemplars: ImageSet, encoder) -> None:
        """Train on the task's real images and on images of the old classes: the learner's replay, or its own."""
        self.learn(task, images, past)

    def learn(self, task: Task, images: ImageSet, past: ImageSet) -> None:
        """Train; where ``past`` is to be its own images, or there are none, it draws them itself."""
        config, whole = self.config, self.config.counts == "reference"
        if self.fitted_classes and (config.rehearsal == "own" or not len(past)):
            past = self._rehearse(task, len(images))
        loading = self.run.loading(self.transform, config.batch_size, task.index, "ddpm", drop_last=whole)
        batches = ImageBatches(images, past, loading)
        self.before_training(batches.labels)
        train_config = self.train_config(task.index)
        hooks = Hooks(before_epoch=partial(self._before_epoch, task))
        average = fit(self.network, batches, self.loss, train_config, Training(self.run, task, "ddpm"), hooks)
        self.generator = average or self.network
        self.fitted_classes |= set(task.classes)
        show_progress(self, task, math.ceil(train_config.steps / len(batches)))

    def before_training(self, labels: Tensor) -> None:
        """Look at the labels, int64 (N,), of all that a training shows. Default: nothing."""

    def train_config(self, index: int) -> TrainConfig:
        """Return length, rate and optimiser of the training of this task."""
        config, steps = self.config, self.config.num_steps if index else self.config.first_task_num_steps
        return TrainConfig(steps=steps, lr=config.lr, optimizer="adamw", weight_decay=config.weight_decay,
                           schedule=config.lr_schedule, ema_decay=config.ema_rate)  # fmt: skip

    def _before_epoch(self, task: Task, step: Step) -> None:
        self.generator = self.network.eval()  # while it trains, the average is not at hand
        show_progress(self, task, step.epoch)

    def hide_labels(self, labels: Tensor) -> Tensor:
        """Replace some labels of a batch, int64 (B,), by -1, so that the network learns to do without."""
        if not self.config.guidance:
            return labels
        hidden = torch.rand(len(labels)) < self.config.label_dropout
        return labels.masked_fill(hidden.to(labels.device), -1)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the noise prediction error of one batch, as named terms."""
        model = partial(self.network, labels=self.hide_labels(batch.labels))
        return {"mse": noise_prediction_loss(model, self.train_process, batch.images)}

    def _rehearse(self, task: Task, num_images: int) -> ImageSet:
        """Draw old classes from the raw weights into the run's `rehearsal/task_<t>`, as GUIDE rehearses."""
        config, old = self.config, sorted(self.fitted_classes)
        count = (config.gr_n_generated_examples_per_task or num_images) * task.index
        if config.counts == "reference":
            # GUIDE draws batch after batch, whole ones, and where it needs less than one, a smaller one.
            count += -count % min(config.batch_size, count)
        chance = seeding.generator(self.run.seed, task.index, "rehearsal")
        labels = draw_labels(old, count, chance, balanced=config.counts == "balanced")
        log.info("Task %d: the generator rehearses on %d images of its own", task.index, count)
        self.generator = self.network.eval()
        identity = {"run_seed": self.run.seed, "task": task.index, "count": count, "weights": self.fingerprint()}
        remedy = "Delete the folder, and the same command draws it again"
        folder = ImageFolder(self.run.folder / "rehearsal" / f"task_{task.index}", self.run, identity, remedy)
        folder.claim()
        folder.draw(self, [Requests.of_labels(labels, (self.run.seed, "ddpm-rehearsal", task.index))])
        return sum(map(folder.images, old), ImageSet()).merged()

    # ------------------------------------------------------------------ generating

    def generate(self, requests: Requests) -> ImageSet:
        """Draw one image per request.

        Args:
            requests: N labels with item and copy numbers.

        Returns:
            N images, (N, C, H, W) uint8, in the order of ``requests``.

        Raises:
            NotFittedError: if a label was never learned.
        """
        return self.draw(requests, Sampling(self.config.timestep_respacing, self.config.sampler))

    @torch.no_grad()
    def draw(self, requests: Requests, sampling: Sampling, bend: Callable[[Requests], Bend] | None = None) -> ImageSet:
        """Draw one image per request, as ``generate`` does, with other time steps or bent toward another goal.

        Args:
            requests: N labels with item and copy numbers.
            sampling: time steps and sampler.
            bend: the requests of one chunk to what sampling follows uphill, see `synth.diffusion`; None: nothing.
        """
        self.require_fitted(requests.labels)
        images = self.in_chunks(requests, lambda chunk: self._draw(chunk, sampling, bend))
        return ImageSet.of(torch.stack(images), requests.labels)

    def _draw(self, requests: Requests, sampling: Sampling, bend: Callable[[Requests], Bend] | None) -> Tensor:
        """Draw uint8 (N, C, H, W) of one chunk, on the CPU."""
        generators = requests.generators()
        noise = draw_noise(generators, self.image_shape).to(self.run.device)
        uphill = None if bend is None else bend(requests)
        with fixed(self.generator) as network:
            model = self.noise_predictor(partial(self._predict, network), requests.labels.to(self.run.device))
            x0 = self.sample(model, noise, sampling, partial(draw_noise, generators, self.image_shape), uphill)
        return to_uint8(x0).cpu()

    def sample(self, model: Model, noise: Tensor, sampling: Sampling, step_noise: Callable[[], Tensor],
               bend: Bend | None) -> Tensor:  # fmt: skip
        """Follow a sampler from pure noise to clean images, (B, C, H, W); see `synth.diffusion`."""
        process, clip = respace(self.process, sampling.timestep_respacing), self.config.clip_x0
        if sampling.sampler == "ddpm":
            return sample_ddpm(model, noise, process, step_noise, bend, clip)
        return sample_ddim(model, noise, process, bend, clip)

    def noise_predictor(self, predict: Callable[[Tensor, Tensor, Tensor], Tensor], labels: Tensor) -> Model:
        """Turn ``predict(xt, t, labels)`` into the noise predictor of these labels, guided where it is on."""

        def of(classes: Tensor) -> Model:
            return lambda xt, t: predict(xt, t, classes)

        # A guidance of 1 is the conditional alone.
        return classifier_free(of(labels), of(torch.full_like(labels, -1)), self.config.guidance or 1)

    def _predict(self, network: nn.Module, xt: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        with self.run.runtime.autocast():
            return network(xt, t, labels).float()

    # ------------------------------------------------------------------ keeping

    def save(self, directory: Path) -> None:
        """Write raw weights (the next task starts from them), the moving average, and the classes learned."""
        save_tensors(directory / "network.safetensors", self.network.state_dict())
        if self.generator is not self.network:
            save_tensors(directory / "generator.safetensors", self.generator.state_dict())
        write_json(directory / "source.json", {"fitted_classes": sorted(self.fitted_classes)})

    def load(self, directory: Path) -> None:
        """Take over what ``save`` wrote."""
        self.network.load_state_dict(load_tensors(directory / "network.safetensors"))
        self.generator = self.network
        if (directory / "generator.safetensors").exists():
            self.generator = copy.deepcopy(self.network).requires_grad_(False)
            self.generator.load_state_dict(load_tensors(directory / "generator.safetensors"))
        self.fitted_classes = set(read_json(directory / "source.json", "fit the source again")["fitted_classes"])

    def describe(self) -> str:
        """Say how large the UNet is, and how long it trains."""
        millions = sum(parameter.numel() for parameter in self.network.parameters()) / 1e6
        first, later = (self.train_config(index).steps for index in (0, 1))
        replay = "the learner's replay" if self.wants_past else "its own images"
        length = f"trained {first} steps on the first task and {later} on later ones"
        return f"UNet of {millions:.1f} M parameters, {length}, with {replay} of the classes before"

    def fingerprint(self) -> str:
        """Hash the generating weights by SHA-256."""
        return seeding.hash_tensors(self.generator.state_dict())
