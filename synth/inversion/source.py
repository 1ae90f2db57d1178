"""Class inversion: one vector per class tells a frozen latent diffusion model what to draw."""

from __future__ import annotations

import hashlib
import json
import math
from abc import abstractmethod
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from models.frozen import weight_bytes
from models.latent.contract import PLACEHOLDER, LatentDiffusion
from synth.base import ReplaySource, show_progress
from synth.diffusion import classifier_free
from synth.inversion.federated import split_clients
from synth.inversion.latents import LatentBatches, denoising_loss, encode, noise_scheduler
from synth.inversion.stopping import FixedLoss, StopConfig, fixed_batches
from synth.prompts import EMBEDDINGS, TRAIN_TEMPLATES, class_words
from synth.requests import Requests, draw_noise
from synth.samplers import sample_scheduled, sample_scheduler
from utils.data.batches import Batch
from utils.data.images import ImageSet
from utils.data.manager import Task
from utils.data.transforms import AUGMENTATIONS, to_uint8
from utils.run.carried import Carried
from utils.run.config import BatchSize, Decay, Factor, PerClass, Place, Rate, SourceConfig
from utils.run.errors import WeightsError
from utils.run.files import load_tensors, read_json, save_tensors, write_json
from utils.run.log import log
from utils.training import seeding
from utils.training.fit import Hooks, Training, fit
from utils.training.schedule import TrainConfig


class ClassInversion(ReplaySource):
    """A frozen latent diffusion model and one vector per class, found by gradient descent on the class's images.

    DDDR (Liang et al., ECCV 2024, arXiv:2409.01128), whose names the keys have, by textual inversion (Gal et al.,
    ICLR 2023, arXiv:2208.01618). The vectors are all that is learned and all that a class costs. A subclass says in
    ``build_model`` whose model it is.
    """

    class Config(StopConfig, SourceConfig):
        drawing: ClassVar[set[str]] = {"scheduler", "sample_steps", "guidance"}

        syn_per_class: PerClass | None = Field(20, ge=1, description="replay images per class; 200 in DDDR")
        sample_batch: BatchSize = Field(40, description="images drawn at once")
        inversion: bool = Field(True, description="false: no search, the class's name is the prompt (text models)")
        samples_per_class: int = Field(500, ge=1, description="images shown per class in the search, in whole batches")
        com_round_gen: int = Field(1, ge=1, description="rounds of the search, each with a new AdamW; 10 in DDDR")
        g_local_train_steps: int | None = Field(None, ge=1, description="per client and round; null: samples_per_class")
        g_local_bs: BatchSize = Field(12, description="images per step of the search")
        fs_g_local_bs: BatchSize | None = Field(None, description="the same after the first task; null: g_local_bs")
        num_users: int = Field(1, ge=1, le=1000, description="clients that search, each on its part, and are averaged")
        beta: float = Field(0.0, ge=0, description="Dirichlet split of the classes over clients; 0: equal random parts")
        inversion_lr: Rate = Field(0.02, description="AdamW's rate, constant, whatever the batch size")
        inversion_weight_decay: Decay = Field(0.01, description="AdamW's, on the vectors")
        initializer: str = Field("sculpture", description="the word where every search starts; one token")
        coarse_word: str = Field("", description='what all classes are, such as "bird": put before the placeholder')
        flip: bool | None = Field(None, description="show mirror images too; null: where the data set's recipe does")
        prompt: str = Field(f"a photo of {PLACEHOLDER}", description="what is drawn; * is the class")
        class_prompts: Place | None = Field(None, description="JSON file, folder name -> words of the class")
        scheduler: Literal["ddim", "dpmpp", "unipc", "euler"] = Field("ddim", description="how replay is drawn")
        sample_steps: int = Field(50, ge=1, lt=1000, description="steps of it")
        guidance: Factor = Field(10.0, description="classifier-free: 1 is the plain class, 0 no class at all")

        @field_validator("prompt")
        @classmethod
        def _one_placeholder(cls, value: str) -> str:
            if value.count(PLACEHOLDER) != 1:
                raise ValueError(f"a prompt needs the placeholder {PLACEHOLDER} exactly once")
            return value

    def __init__(self, config, run, num_classes, class_names, dataset):
        super().__init__(config, run, num_classes, class_names, dataset)
        self.words = class_words(class_names, config.class_prompts)
        self.flip = AUGMENTATIONS[dataset.augmentation].flip if config.flip is None else config.flip
        self.vectors: dict[int, Tensor] = {}  # class -> (D,) on the CPU
        self.search_steps: dict[int, int] = {}  # class -> steps of its search, where a rule may end it
        self._model: LatentDiffusion | None = None
        self._kept: dict = {}  # what is known of the model before it is built: fingerprint and bytes

    # ------------------------------------------------------------------ the frozen model

    @abstractmethod
    def build_model(self) -> LatentDiffusion:
        """Return the frozen model, on the run's device; called once, when it is first needed."""

    @property
    def model(self) -> LatentDiffusion:
        """The frozen model, built when it is first asked for."""
        if self._model is None:
            self.use(self.build_model())
        return self._model

    def use(self, model: LatentDiffusion) -> None:
        """Draw with this model from now on.

        Raises:
            WeightsError: if vectors were loaded that were found with another one.
            ConfigError: if its noise and the sampler do not suit each other.
        """
        sample_scheduler(self.config.scheduler, model.schedule, self.config.sample_steps)
        fingerprint = model.fingerprint()
        if self._kept.get("model", fingerprint) != fingerprint:
            raise WeightsError(
                f"the class vectors were found with a model of fingerprint {self._kept['model'][:12]}, this one's is "
                f"{fingerprint[:12]}: give the weights that they were found with, or learn them anew"
            )
        self._model, self._kept = model, {"model": fingerprint, "frozen_bytes": weight_bytes(model)}

    def carried(self) -> list[Carried]:
        """Name the vectors, what a subclass has learned, and the frozen model once it was needed."""
        frozen = Carried("frozen", nbytes=self._kept.get("frozen_bytes", 0), frozen=True)
        return [Carried("class_embeddings", (f"source/{EMBEDDINGS}",)), *super().carried(), frozen]

    # ------------------------------------------------------------------ learning

    def fit_before(self, task: Task, images: ImageSet) -> None:
        """Find a vector for each of the task's classes."""
        if self.config.inversion:
            self.invert(task, list(task.classes), images)
        self.fitted_classes |= set(task.classes)

    def invert(self, task: Task, classes: list[int], images: ImageSet) -> None:
        """Search all classes' vectors together, in rounds of clients whose returns are averaged.

        Args:
            task: names the trainings.
            classes: ascending; which ones.
            images: of these classes alone.
        """
        config, run = self.config, self.run
        self.search_steps = {label: steps for label, steps in self.search_steps.items() if label not in classes}
        moments = encode(self.model, images, self.flip, config.sample_batch, run, f"task {task.index} encode")
        parts = split_clients(images.labels, config.num_users, config.beta, run.seed, task.index, "clients")
        vectors = self.model.initial_vector(config.initializer).expand(len(classes), -1)  # (C, D), one start for all
        for round_ in range(config.com_round_gen):
            found = []
            for client, part in enumerate(parts):
                if len(part):
                    training = Training(run, task, f"invert_r{round_}_c{client}")
                    found.append(self._search(training, classes, vectors, moments[part], images.labels[part], round_))
            vectors = torch.stack(found).mean(0)  # plain, whatever a client's share of the data
        self.vectors |= dict(zip(classes, vectors.cpu()))

    def _search(
        self, training: Training, classes: list[int], start: Tensor, moments: Tensor, labels: Tensor, round_: int
    ) -> Tensor:
        """Return the vectors that one client finds in one round, (C, D)."""
        run, config, task = self.run, self.config, training.task
        steps, batch_size = self.budget(task, len(classes))
        batches = LatentBatches(moments, labels, run.loading(None, batch_size, task.index, training.purpose))
        rate, decay, epochs = config.inversion_lr, config.inversion_weight_decay, math.ceil(steps / len(batches))
        module = nn.ParameterDict({"vectors": start.clone()}).to(run.device)
        self.vectors |= dict(zip(classes, module.vectors.detach()))  # views: whoever watches sees them move
        scheduler = noise_scheduler(self.model.schedule)
        loss = partial(self.loss, module=module, classes=torch.tensor(classes, device=run.device), scheduler=scheduler)
        watch = partial(show_progress, self, task, before=round_ * epochs)
        train_config = TrainConfig(rate, steps=steps, optimizer="adamw", weight_decay=decay)
        hooks = Hooks(lambda step: watch(step.epoch))
        if config.stop_ratio:
            fixed = FixedLoss(training, loss, fixed_batches(moments, labels, batch_size, run.device), config)
            hooks = fixed.hooks(hooks.before_epoch)
        fit(module, batches, loss, train_config, training, hooks)
        if config.stop_ratio:
            log.info("Task %d: %s took %d of %d steps", task.index, training.purpose, fixed.steps, steps)
            self.search_steps |= {label: self.search_steps.get(label, 0) + fixed.steps for label in classes}
            epochs = math.ceil(fixed.steps / len(batches))
        watch(epochs)
        return module.vectors.detach()

    def budget(self, task: Task, num_classes: int) -> tuple[int, int]:
        """Return steps per client and round, and images per step."""
        config = self.config
        batch_size = (config.fs_g_local_bs if task.index else None) or config.g_local_bs
        steps = math.ceil(config.samples_per_class * num_classes / (batch_size * config.com_round_gen))
        return config.g_local_train_steps or steps, batch_size

    def loss(self, batch: Batch, module: nn.ParameterDict, classes: Tensor, scheduler) -> dict[str, Tensor]:
        """Return the denoising error under a random template for every latent.

        Draws from the global random generators.

        Args:
            batch: latents and their classes.
            module: its ``vectors`` are float32 (C, D).
            classes: int64 (C,), ascending: whose these are.
            scheduler: of `noise_scheduler`.
        """
        prompts = [self._coarse(TRAIN_TEMPLATES[pick]) for pick in torch.randint(len(TRAIN_TEMPLATES), (len(batch),))]
        context = self.model.context(prompts, module.vectors[torch.searchsorted(classes, batch.labels)])
        return {"mse": denoising_loss(self.model, batch.images, context, scheduler)}

    def _coarse(self, template: str) -> str:
        """Put the coarse word before a template's placeholder."""
        return template.replace(PLACEHOLDER, f"{self.config.coarse_word} {PLACEHOLDER}".lstrip())

    # ------------------------------------------------------------------ generating

    @torch.no_grad()
    def generate(self, requests: Requests) -> ImageSet:
        """Draw one image per request, by a deterministic sampler with classifier-free guidance.

        Args:
            requests: N labels with item and copy numbers.

        Returns:
            N images, (N, C, S, S) uint8, in the order of ``requests``.

        Raises:
            NotFittedError: if a label was never learned.
        """
        self.require_fitted(requests.labels)
        with self.run.runtime.autocast():
            # One by one: in a batch, a class would depend on its neighbours in the last bits, which guidance enlarges.
            contexts = {label: self.context(label) for label in requests.labels.unique().tolist()}
            draw = partial(self._draw, contexts=contexts, nothing=self.nothing())
        return ImageSet.of(torch.stack(self.in_chunks(requests, draw)), requests.labels)

    def context(self, label: int) -> Tensor:
        """Return what the model is told to draw a class, (1, tokens, width)."""
        prompt = self._coarse(self.config.prompt)
        if self.config.inversion:
            return self.model.context([prompt], self.vectors[label][None])
        return self.model.context([prompt.replace(PLACEHOLDER, self.words[label])])

    def nothing(self) -> Tensor:
        """Return what guidance leads away from, (1, tokens, width): no class."""
        return self.model.context([""])

    def start(self, requests: Requests, scheduler) -> tuple[Tensor, int | None]:
        """Return what drawing starts from, (N, c, h, w), and the step that it starts with; see `sample_scheduled`."""
        return draw_noise(requests.generators(), self.model.latent_shape).to(self.run.device), None

    def _draw(self, requests: Requests, contexts: dict[int, Tensor], nothing: Tensor) -> Tensor:
        """Draw one chunk, uint8 (N, C, S, S) on the CPU."""
        predict = self.run.runtime.autocast()(self.model.predict)
        conditional = partial(predict, context=torch.cat([contexts[label] for label in requests.labels.tolist()]))
        unconditional = partial(predict, context=nothing.expand(len(requests), -1, -1))
        scheduler = sample_scheduler(self.config.scheduler, self.model.schedule, self.config.sample_steps)
        zt, first = self.start(requests, scheduler)
        model = classifier_free(conditional, unconditional, self.config.guidance)
        z0 = sample_scheduled(model, zt, scheduler, first)
        with self.run.runtime.autocast():
            return to_uint8(self.model.decode(z0)).cpu()

    # ------------------------------------------------------------------ keeping

    def save(self, directory: Path) -> None:
        """Write the vectors, the classes learned, and which model they belong to."""
        if self.vectors:
            labels, vectors = zip(*sorted(self.vectors.items()))
            save_tensors(directory / EMBEDDINGS, {"labels": torch.tensor(labels), "vectors": torch.stack(vectors)})
        model = self._known() if self.fitted_classes else {}
        steps = {"search_steps": self.search_steps} if self.search_steps else {}
        write_json(directory / "source.json", {"fitted_classes": sorted(self.fitted_classes), **model, **steps})

    def load(self, directory: Path) -> None:
        """Take over what ``save`` wrote."""
        self._kept = read_json(directory / "source.json", "fit the source again")
        self.search_steps = {int(label): steps for label, steps in self._kept.pop("search_steps", {}).items()}
        self.fitted_classes, self.vectors, self._model = set(self._kept.pop("fitted_classes")), {}, None
        if (directory / EMBEDDINGS).exists():
            stored = load_tensors(directory / EMBEDDINGS)
            self.vectors = dict(zip(stored["labels"].tolist(), stored["vectors"]))

    def _known(self) -> dict:
        """Return fingerprint and bytes of the model, which is built for it only if nothing is known yet."""
        if not self._kept:
            self.use(self.build_model())
        return self._kept

    def fingerprint(self) -> str:
        """Hash the model, the vectors and, where the prompt is words, these words."""
        vectors = seeding.hash_tensors({str(label): vector for label, vector in sorted(self.vectors.items())})
        words = [] if self.config.inversion else self.words
        return hashlib.sha256(json.dumps([self._known()["model"], vectors, words]).encode()).hexdigest()

    def describe(self) -> str:
        """Say how long the search and the sampling are."""
        config = self.config
        what = f"{config.samples_per_class} images shown per class"
        if config.g_local_train_steps is not None:
            what = f"{config.com_round_gen} rounds of {config.g_local_train_steps} steps per task"
        what += ", or until its fixed loss settles" * (config.stop_ratio > 0)
        search = f"class inversion by {what}" if config.inversion else "no inversion, class names as prompts"
        return f"{search}; {config.scheduler} of {config.sample_steps} steps, guidance {config.guidance:g}"
