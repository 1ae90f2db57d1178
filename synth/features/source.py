"""Features of classes, from a diffusion model and from translation of the features of larger classes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from models.frozen import fixed
from models.incremental import IncrementalNet
from synth import SOURCES
from synth.base import ReplaySource
from synth.diffusion import Model, classifier_free, linear_process, noise_prediction_loss, respace
from synth.features.network import FeatureDenoiser
from synth.features.translation import source_chances, translate
from synth.replay import Features
from synth.requests import Requests, draw_noise
from synth.samplers import sample_ddim
from utils.data.batches import Batch, MixedBatches, test_batches
from utils.data.images import FeatureSet, ImageSet, Samples
from utils.data.manager import Task
from utils.data.transforms import classifier_transform
from utils.run.config import BatchSize, Factor, Rate, SourceConfig, Width
from utils.run.errors import ConfigError
from utils.run.files import flatten, load_tensors, nest, read_json, save_tensors, write_json
from utils.run.log import log
from utils.training import seeding
from utils.training.fit import Training, fit
from utils.training.flops import forward_flops
from utils.training.schedule import TrainConfig


class FeatureReplay(Features):
    """Features of old classes, all of which the source must be able to make."""

    def require(self) -> None:
        super().require()
        if self.data.num_tasks > 1 and not self.config.diffusion:
            why = "translation makes features of small classes alone, and the first of several tasks is to be replayed"
            raise ConfigError(f"synth.diffusion=false: {why}; set it to true, or init_cls to {self.data.num_classes}")


@SOURCES.register("feature_diffusion")
class FeatureDiffusion(ReplaySource):
    """A DDPM of each task's standardised features, and translations from its large classes to its small ones.

    The parts are published: DDPM (Ho et al. 2020, arXiv:2006.11239), M2m (Kim et al. 2020, arXiv:2004.00431). TDFA's
    own text and code are not public; to put them together in this way is our design. Every task has a model of its
    own: features of a backbone that stands still do not change, so what is never trained again forgets nothing.
    Where the backbone goes on learning, features of old classes stay those of the day.
    """

    usual_replay = FeatureReplay
    samples = "features"

    class Config(SourceConfig):
        drawing: ClassVar[set[str]] = {"timestep_respacing", "omega"}

        fit_after_last_task: bool = Field(True, description="also learn the last task, whose tail may be filled")
        diffusion: bool = Field(True, description="learn and draw features by a DDPM")
        translation: bool = Field(True, description="translate features of large classes into small ones")
        blocks: int = Field(4, ge=1, le=64, description="residual blocks of the MLP")
        width: Width = Field(512, description="of its hidden layers")
        diffusion_steps: int = Field(1000, ge=1, le=10**5, description="time steps of the full process")
        beta_start: float = Field(1e-4, ge=1e-7, lt=1, description="variance of the first step")
        beta_end: float = Field(2e-2, ge=1e-7, lt=1, description="variance of the last step")
        train_steps: int = Field(20_000, ge=1, description="training steps of each task")
        batch_size: BatchSize = Field(256, description="features per training step")
        lr: Rate = Field(5e-4, description="AdamW's rate, with cosine decay")
        ema_rate: float = Field(0.999, ge=0, lt=1, description="decay of the average that generates; 0: raw weights")
        label_dropout: float = Field(0.1, ge=0, lt=1, description="share of labels hidden in training for guidance")
        timestep_respacing: str = Field("ddim50", description="sampling steps: ddimN strided, N spread; empty: all")
        omega: Factor = Field(0.0, description="guidance e_c + omega (e_c - e_u), as in CBDM; 0: none")
        translated_share: float = Field(0.5, gt=0, le=1, description="of what a class lacks to the largest: attempts")
        translated_weight: float = Field(0.5, gt=0, le=1, description="how often one is learned, beside a real 1")
        walk_noise: Factor = Field(0.5, description="length of the noise on a feature that is to be translated")
        walk_steps: int = Field(10, ge=1, le=10**4, description="steps of its translation")
        walk_length: Rate = Field(0.1, description="of a step, in standard deviations of a feature")
        walk_lambda: Factor = Field(0.5, description="weight of the logit of the class that it comes from")
        walk_beta: float = Field(0.999, ge=0, lt=1, description="near 1, the largest classes are translated most")
        walk_accept: float = Field(0.9, ge=0, lt=1, description="probability of the new class that is enough")

        @model_validator(mode="after")
        def _one_way_at_least(self) -> FeatureDiffusion.Config:
            if not (self.diffusion or self.translation):
                raise ValueError("synth.diffusion and synth.translation are both false: turn one on")
            if self.source_dir is not None or not self.need_syn_imgs:
                why = "features are those of the run's own classifier"
                raise ValueError(f"synth.source_dir and synth.need_syn_imgs=false: {why}; leave both out")
            return self

    def __init__(self, config, run, num_classes, class_names, dataset):
        super().__init__(config, run, num_classes, class_names, dataset)
        self.process = linear_process(config.diffusion_steps, config.beta_start, config.beta_end)
        self.sampling = respace(self.process, config.timestep_respacing, "synth.timestep_respacing")
        self.transform = classifier_transform(dataset)
        self.models: dict[int, FeatureDenoiser] = {}  # by the first class of their task
        self.translated: dict[int, Tensor] = {}  # class -> float (M, D), features

    @property
    def step_flops(self) -> int | None:
        """Count those of the MLP, as if features were as wide as its layers."""
        width, labels = self.config.width, torch.zeros(self.config.batch_size, dtype=torch.int64, device="meta")
        return forward_flops(self._build(width, 1), torch.zeros(len(labels), width, device="meta"), labels, labels)

    # ------------------------------------------------------------------ learning

    def fit_after(self, task: Task, images: ImageSet, past: Samples, exemplars: ImageSet, encoder) -> None:
        """Learn the features that the classifier has of the task's real, un-augmented images."""
        config, start, features = self.config, task.num_old, self._encode(images, encoder)
        seeding.seed_everything(self.run.seed, task.index, "features")
        network = self._build(features.shape[1], task.num_new)
        network.measure(features.to(self.run.device))
        z = network.standardise(features.to(self.run.device))  # (N, D)
        pieces = self._translate_all(task, z, images.labels, lambda z: encoder.head(network.restore(z)))
        self.translated |= {label: network.restore(piece).cpu() for label, piece in pieces.items() if len(piece)}
        self.fitted_classes |= set(task.classes if config.diffusion else self.translated)
        if not config.diffusion:
            return
        labels = [torch.full((len(piece),), label) for label, piece in pieces.items()]
        both = FeatureSet.of(torch.cat([z, *pieces.values()]).cpu(), torch.cat([images.labels, *labels]) - start)
        loading = self.run.loading(self.transform, config.batch_size, task.index, "features")
        batches = MixedBatches(ImageSet(), both, loading)
        # What counts half is drawn half as often: the same expected loss as with a weight.
        weights = torch.full((len(both),), config.translated_weight)
        batches.draw_weights = weights.index_fill(0, torch.arange(len(z)), 1.0)
        schedule = TrainConfig(steps=config.train_steps, lr=config.lr, optimizer="adamw", schedule="cosine",
                               ema_decay=config.ema_rate)  # fmt: skip
        average = fit(network, batches, partial(self.loss, network), schedule, Training(self.run, task, "features"))
        self.models[start] = average or network

    def loss(self, network: FeatureDenoiser, batch: Batch) -> dict[str, Tensor]:
        """Compute the noise prediction error of one batch, with some labels hidden one by one."""
        hidden = torch.rand(len(batch)) < self.config.label_dropout
        model = self._model(network, batch.labels.masked_fill(hidden.to(batch.labels.device), -1))
        return {"mse": noise_prediction_loss(model, self.process, batch.images.features)}

    def _model(self, network: FeatureDenoiser, labels: Tensor) -> Model:
        """Return the noise predictor of these labels: the best linear one of standard features, and what is learned.

        Without the linear part, errors of a short training are divided by sqrt(alpha_bar), 0.006 at the last step, and
        no range of pixels is there to clamp x0 to (the idea is Karras et al.'s, arXiv:2206.00364, section 5).
        """

        def predict(xt: Tensor, t: Tensor) -> Tensor:
            linear = (1 - self.process.alpha_bar[t.cpu()]).sqrt()[:, None].to(xt)
            return linear * xt + network(xt, t, labels)

        return predict

    def _build(self, num_features: int, num_classes: int) -> FeatureDenoiser:
        return FeatureDenoiser(num_features, num_classes, self.config.width, self.config.blocks).to(self.run.device)

    @torch.no_grad()
    def _encode(self, images: ImageSet, encoder: IncrementalNet) -> Tensor:
        encoder.eval()
        with self.run.runtime.autocast():
            shown = test_batches(images, self.transform, 256, self.run.device, self.run.num_workers)
            return torch.cat([encoder.features(x).float().cpu() for x in shown])

    def _translate_all(self, task: Task, z: Tensor, labels: Tensor, head) -> dict[int, Tensor]:
        """Return the accepted translations, z (M, D), of every class that is smaller than another."""
        config, kept, tried = self.config, {}, 0
        counts = torch.bincount(labels, minlength=task.num_seen)
        for label in task.classes if config.translation else ():
            attempts = round(config.translated_share * int(counts.max() - counts[label]))
            if not attempts:
                continue
            generator = seeding.generator(self.run.seed, task.index, "translation", label)
            of_class = source_chances(counts, label, config.walk_beta) / counts.clamp(min=1)
            rows = torch.multinomial(of_class[labels], attempts, replacement=True, generator=generator)
            noise = F.normalize(torch.randn(attempts, z.shape[1], generator=generator)) * config.walk_noise
            walk = (config.walk_steps, config.walk_length, config.walk_lambda)
            sources = labels[rows].to(z.device)
            moved = translate(head, z[rows.to(z.device)] + noise.to(z), sources, label, walk)
            with torch.no_grad():
                kept[label] = moved[head(moved).softmax(1)[:, label] >= config.walk_accept]
            tried += attempts
        found = sum(map(len, kept.values()))
        log.info("Task %d: %d of %d translations accepted", task.index, found, tried)
        return kept

    # ------------------------------------------------------------------ generating

    @torch.no_grad()
    def generate(self, requests: Requests) -> FeatureSet:
        """Make one feature per request: a class's first copies are its translations, the others come from its DDPM.

        Without the DDPM, translations go round and round.

        Returns:
            N features, float32 (N, D), in the order of ``requests``.

        Raises:
            NotFittedError: if a label was never learned, or nothing was translated to it.
        """
        self.require_fitted(requests.labels)
        return FeatureSet.of(torch.stack(self.in_chunks(requests, self._make)), requests.labels)

    def _make(self, requests: Requests) -> list[Tensor]:
        made: dict[int, Tensor] = {}
        for place, (label, copy) in enumerate(zip(requests.labels.tolist(), requests.copy.tolist())):
            own = self.translated.get(label, ())
            if len(own) and (copy < len(own) or not self.config.diffusion):
                made[place] = own[copy % len(own)]
        for start, network in self.models.items():
            inside = (requests.labels >= start) & (requests.labels < start + network.num_classes)
            places = [place for place in inside.nonzero().flatten().tolist() if place not in made]
            if places:
                made |= zip(places, self._denoise(network, requests.take(torch.tensor(places)), start))
        return [made[place] for place in range(len(requests))]

    def _denoise(self, network: FeatureDenoiser, requests: Requests, start: int) -> Tensor:
        """Draw features (N, D) of one task's classes by DDIM, on the CPU."""
        labels = (requests.labels - start).to(self.run.device)
        noise = draw_noise(requests.generators(), network.mean.shape).to(self.run.device)
        with fixed(network):
            unconditional = self._model(network, torch.full_like(labels, -1))
            model = classifier_free(self._model(network, labels), unconditional, 1 + self.config.omega)
            return network.restore(sample_ddim(model, noise, self.sampling, clip=False)).cpu()

    # ------------------------------------------------------------------ keeping

    def _tensors(self) -> dict[str, Tensor]:
        states: dict[Any, dict[str, Tensor]] = {start: model.state_dict() for start, model in self.models.items()}
        return flatten({**states, "translated": {str(label): own for label, own in self.translated.items()}})

    def save(self, directory: Path) -> None:
        """Write models, statistics and translations of all tasks, and the classes learned."""
        save_tensors(directory / "features.safetensors", self._tensors())
        write_json(directory / "source.json", {"fitted_classes": sorted(self.fitted_classes)})

    def load(self, directory: Path) -> None:
        """Take over what ``save`` wrote."""
        parts = nest(load_tensors(directory / "features.safetensors"))
        self.translated = {int(label): own for label, own in parts.pop("translated", {}).items()}
        for start, state in parts.items():
            self.models[int(start)] = network = self._build(len(state["mean"]), len(state["label.weight"]) - 1).eval()
            network.load_state_dict(state)
        self.fitted_classes = set(read_json(directory / "source.json", "fit the source again")["fitted_classes"])

    def describe(self) -> str:
        """Say how large the model of a task is, and how long it trains."""
        config = self.config
        mlp = f"a residual MLP of {config.blocks} x {config.width} per task, {config.train_steps} steps on features"
        ways = [mlp] * config.diffusion + ["features translated from large classes to small"] * config.translation
        return " and ".join(ways)

    def fingerprint(self) -> str:
        """Hash models and translations by SHA-256."""
        return seeding.hash_tensors(dict(sorted(self._tensors().items())))
