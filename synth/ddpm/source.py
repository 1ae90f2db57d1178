"""A class-conditional DDPM that learns task after task, rehearsing on its own images."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from models.files.weights import load_exactly, read_weights
from models.frozen import fixed
from synth import SOURCES
from synth.base import ReplaySource, count_prediction, show_progress
from synth.ddpm.averages import Averages, hold_out
from synth.ddpm.config import DDPMConfig
from synth.ddpm.network import ClassUNet, ClassUNetConfig
from synth.ddpm.rehearsal import rehearse
from synth.ddpm.sampling import Drawing, Sampling
from synth.ddpm.teacher import Noised, Teacher
from synth.diffusion import (
    Model,
    Objective,
    Predict,
    autoguided,
    classifier_free_at_once,
    draw_noised,
    linear_process,
    respace,
    within,
)  # fmt: skip
from synth.requests import Requests, draw_noise
from synth.samplers import Bend
from utils.data.batches import Batch, ImageBatches
from utils.data.images import ImageSet
from utils.data.manager import Task
from utils.data.transforms import AUGMENTATIONS, DiffusionTransform, stack_images, to_uint8, to_unit_range
from utils.run.errors import ConfigError
from utils.run.files import load_tensors, read_json, save_tensors, write_json
from utils.training import seeding
from utils.training.fit import Hooks, Step, Training, fit
from utils.training.schedule import TrainConfig


@SOURCES.register("ddpm")
class DDPM(ReplaySource):
    """One UNet for all classes, trained on each task's real images and on replay of the classes before.

    Ho et al., "Denoising Diffusion Probabilistic Models", NeurIPS 2020, arXiv:2006.11239; trained continually as in
    GUIDE (Cywinski et al. 2024, arXiv:2403.03938), whose settings are the defaults. Every task starts from the last
    task's raw weights, with a new optimiser and a new moving average; the average generates.
    """

    Config = DDPMConfig
    step_flops = property(count_prediction)

    def __init__(self, config, run, num_classes, class_names, dataset):
        super().__init__(config, run, num_classes, class_names, dataset)
        size = config.image_size or dataset.image_size
        self.image_shape = (dataset.channels, size, size)
        flip = AUGMENTATIONS[dataset.augmentation].flip if config.flip is None else config.flip
        self.transform = DiffusionTransform(size, flip)
        self.process = linear_process(config.diffusion_steps, config.beta_start, config.beta_end)
        self.train_process = respace(self.process, config.train_respacing, "synth.train_respacing")
        respace(self.process, config.timestep_respacing, "synth.timestep_respacing")  # what does not fit is said now
        self.sampling = Sampling(config.timestep_respacing, config.sampler)
        self.objective = Objective(config.prediction, config.loss_weighting)
        self.alpha_bar = self.process.alpha_bar.to(run.device)
        self.wants_past = config.rehearsal == "replay"
        seeding.seed_everything(run.seed, "ddpm")
        self.network = self.build_network().to(run.device).eval()
        self.generator: nn.Module = self.network  # the moving average once there is one
        self.before: nn.Module | None = None  # what generated before the last task, with autoguidance
        self.classes_before: list[int] = []
        self.teacher: Teacher | None = None
        if config.init_weights is not None:
            self._start_from(Path(config.init_weights))

    def build_network(self) -> nn.Module:
        """Build the noise predictor with random weights: (xt, t, labels) -> eps, where label -1 is no class."""
        config = ClassUNetConfig.of(
            self.config, attention_levels=self.config.levels_with_attention(self.image_shape[1])
        )
        return ClassUNet(self.image_shape, self.num_classes, config)

    def _start_from(self, folder: Path) -> None:
        found = [folder / name for name in ("generator.safetensors", "network.safetensors")]
        path = next((path for path in found if path.is_file()), None)
        if path is None:
            remedy = "name a `source` folder of a run's checkpoint, or a folder of `python -m synth.train`"
            raise ConfigError(f"synth.init_weights={str(folder)!r} holds no DDPM: {remedy}")
        load_exactly(self.network, read_weights(path), path, "this UNet", "Set synth's keys as they were there")

    # ------------------------------------------------------------------ learning

    def fit_after(self, task: Task, images: ImageSet, past: ImageSet, exemplars: ImageSet, encoder) -> None:
        """Train on the task's real images and on what `rehearsal` says of the old classes."""
        self.learn(task, images, past)

    def learn(self, task: Task, images: ImageSet, past: ImageSet) -> None:
        """Train; where ``past`` is to be its own images, or there are none, it draws them itself."""
        config, whole = self.config, self.config.counts == "reference"
        batch_size = config.batch_size
        if self.fitted_classes and config.autoguidance != 1:
            self.before, self.classes_before = self._frozen_generator(), sorted(self.fitted_classes)
        rehearses = bool(self.fitted_classes) and config.rehearsal != "none"
        if rehearses and config.draws_anew:
            past, batch_size = ImageSet(), self.num_real(task)
        elif rehearses and (config.rehearsal != "replay" or not len(past)):
            past = rehearse(self, task, len(images))
        self.teacher = self.make_teacher(config.batch_size - batch_size) if rehearses else None
        if config.ema_rates:
            images, held_out = hold_out(images, config.ema_held_out)
        loading = self.run.loading(self.transform, batch_size, task.index, "ddpm", drop_last=whole)
        batches, averages = ImageBatches(images, past, loading), Averages(self.network, config.ema_rates)
        self.before_training(batches.labels)
        length, stateful = self.train_config(task.index), {"averages": averages} if config.ema_rates else {}
        hooks = Hooks(partial(self._before_epoch, task), after_step=averages.move, stateful=stateful)
        average = fit(self.network, batches, self.loss, length, Training(self.run, task, "ddpm"), hooks)
        self.generator, self.teacher = average or self.network, None
        if config.ema_rates:
            x0 = to_unit_range(stack_images(held_out, self.transform.size).to(self.run.device))
            usual = config.ema_rate, self.generator
            self.generator = averages.best(usual, self.predictor, self.train_process, x0, held_out.labels)
        self.fitted_classes |= set(task.classes)
        show_progress(self, task, math.ceil(length.steps / len(batches)))

    def num_real(self, task: Task) -> int:
        """Count the real images of a step beside those of a teacher: shares are as of equally many of every task."""
        return max(1, self.config.batch_size // (task.index + 1))

    @property
    def rehearsal_sampling(self) -> Sampling:
        """How it draws for its own training; a teacher's word is the target, so its images need not be good."""
        return Sampling(str(self.config.num_teacher_steps)) if self.config.rehearsal == "distil" else self.sampling

    def make_teacher(self, count: int) -> Teacher | None:
        """Return what teaches old classes, with ``count`` rows of its own in every batch; None: they are shown."""
        config = self.config
        if config.rehearsal not in ("distil", "trajectory"):
            return None
        return Teacher(self._frozen_generator(), self.objective, self.train_process, self.alpha_bar,
                       sorted(self.fitted_classes), self.image_shape, config.num_teacher_steps, config.clip_x0, count,
                       config.rehearsal == "trajectory")  # fmt: skip

    def _frozen_generator(self) -> nn.Module:
        return copy.deepcopy(self.generator).eval().requires_grad_(False)

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
        """Compute the error of the prediction for one batch, as named terms."""
        labels = self.hide_labels(batch.labels)
        xt, t, eps = draw_noised(self.train_process, batch.images)
        rows = Noised(xt, t, labels, self.objective.target(batch.images, eps, self.alpha_bar[t]))
        if self.teacher is not None:
            rows = self.teacher.teach(rows, batch.is_replay)
        output = self.network(rows.xt, rows.t, rows.labels).float()
        return {"mse": self.objective.loss(output, rows.target, self.alpha_bar[rows.t])}

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
        return self.draw(requests, self.sampling)

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
            model = self.noise_predictor(self.strongest(network), requests.labels.to(self.run.device))
            drawing = Drawing(noise, partial(draw_noise, generators, self.image_shape), uphill)
            x0 = drawing.follow(model, self.process, sampling, self.config)
        return to_uint8(x0).cpu()

    @property
    def omega(self) -> float:
        """Guidance as eps_c + omega (eps_c - eps_u)."""
        return (self.config.guidance or 1) - 1

    def noise_predictor(self, predict: Predict, labels: Tensor) -> Model:
        """Turn ``predict`` into the noise predictor of these labels, guided where and when it is on."""
        guided, interval = classifier_free_at_once(predict, labels, self.omega), self.config.guidance_interval
        if interval is None or not self.omega:
            return guided
        return within(self.process, interval, guided, classifier_free_at_once(predict, labels, 0))

    def predictor(self, network: nn.Module) -> Predict:
        """Return the noise that a network sees."""

        def predict(xt: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            with self.run.runtime.autocast():
                output = network(xt, t, labels).float()
            return self.objective.noise(output, xt, self.alpha_bar[t])

        return predict

    def strongest(self, network: nn.Module) -> Predict:
        """Return the noise that a network sees, away from what the one before it did."""
        if self.before is None or self.config.autoguidance == 1:
            return self.predictor(network)
        known = torch.zeros(self.num_classes + 1, dtype=torch.bool, device=self.run.device)
        known[[*self.classes_before, -1]] = True
        return autoguided(self.predictor(network), self.predictor(self.before), known, self.config.autoguidance)

    # ------------------------------------------------------------------ keeping

    def save(self, directory: Path) -> None:
        """Write raw weights (the next task starts from them), the moving average, and the classes learned."""
        save_tensors(directory / "network.safetensors", self.network.state_dict())
        if self.generator is not self.network:
            save_tensors(directory / "generator.safetensors", self.generator.state_dict())
        state = {"fitted_classes": sorted(self.fitted_classes)}
        if self.before is not None and self.config.autoguidance != 1:
            save_tensors(directory / "before.safetensors", self.before.state_dict())
            state["classes_before"] = self.classes_before
        write_json(directory / "source.json", state)

    def load(self, directory: Path) -> None:
        """Take over what ``save`` wrote."""
        self.network.load_state_dict(load_tensors(directory / "network.safetensors"))
        self.generator = self._kept(directory / "generator.safetensors") or self.network
        self.before = self._kept(directory / "before.safetensors")
        state = read_json(directory / "source.json", "fit the source again")
        self.fitted_classes, self.classes_before = set(state["fitted_classes"]), state.get("classes_before", [])

    def _kept(self, path: Path) -> nn.Module | None:
        """Return a frozen network with the weights of a file, if it is there."""
        if not path.exists():
            return None
        network = copy.deepcopy(self.network).requires_grad_(False)
        network.load_state_dict(load_tensors(path))
        return network

    def describe(self) -> str:
        """Say how large the UNet is, and how long it trains."""
        millions = sum(parameter.numel() for parameter in self.network.parameters()) / 1e6
        first, later = (self.train_config(index).steps for index in (0, 1))
        words = {"replay": "the learner's replay", "own": "its own images", "none": "nothing"}
        past = words.get(self.config.rehearsal, "what it said itself")
        length = f"trained {first} steps on the first task and {later} on later ones"
        return f"UNet of {millions:.1f} M parameters, {length}, with {past} of the classes before"

    def fingerprint(self) -> str:
        """Hash the generating weights by SHA-256."""
        return seeding.hash_tensors(self.generator.state_dict())
