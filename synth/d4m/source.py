"""D4M: images drawn from a few prototypes per class, which are centres of the latents of its real images."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from synth import SOURCES
from synth.d4m.files import read_prompts, read_prototypes, write_prototypes
from synth.d4m.prototypes import chunk_size, cluster
from synth.d4m.replay import Distilled
from synth.inversion.latents import encode
from synth.inversion.ldm import LDM
from synth.inversion.small_ldm import SmallLDMSource
from synth.inversion.source import ClassInversion
from synth.requests import Requests, draw_noise
from utils.data.images import ImageSet
from utils.data.manager import Task
from utils.data.transforms import stack_images
from utils.run.carried import Carried
from utils.run.config import BaseConfig, BatchSize, Decay, Factor, Place, Rate, Side, SourceConfig, Width
from utils.run.errors import ConfigError
from utils.run.files import flatten, load_tensors, nest, save_tensors
from utils.run.log import log
from utils.training import seeding

PROTOTYPES = "prototypes.safetensors"  # of every class: centres, counts, spread


class Distilling:
    """What D4M adds to a latent diffusion model; a subclass names it before that source.

    Su et al., "D4M: Dataset Distillation via Disentangled Diffusion Model", CVPR 2024, arXiv:2407.15138, whose names
    the keys have. Every image becomes a latent, k-means finds ``ipc`` centres of those of a class, and each, noised
    up to ``strength``, is denoised under the class's prompt. Nothing of the diffusion model is trained for it.
    """

    usual_replay = Distilled

    class Config(BaseConfig):
        # These keys change neither the images nor what is learned for them.
        using: ClassVar[set[str]] = {"stream", "memory", "export_json", "soft_labels", "soft_labels_dir", "teacher",
                                     "teacher_epochs", "teacher_lr", "teacher_weight_decay", "teacher_batch_size",
                                     "mix", "mix_alpha", "keep_topk"}  # fmt: skip
        elsewhere: ClassVar[set[str]] = SourceConfig.elsewhere | using
        shelves: ClassVar[set[str]] = SourceConfig.shelves | {"soft_labels_dir"}
        drawing: ClassVar[set[str]] = ClassInversion.Config.drawing | using | {"strength", "saved_size"}

        stream: Literal["real", "distilled", "both", "subset"] = Field(
            "real", description="what the new classes are learned from; subset: ipc real images of each, by chance"
        )
        memory: Literal["distilled", "stream"] = Field(
            "distilled", description="for old classes: distilled images for exemplars, or what the learner keeps"
        )
        ipc: int = Field(10, ge=1, le=10_000, description="prototypes per class; images too, without syn_per_class")
        kmeans: Literal["full", "one_pass"] = Field("full", description="until it stands, or D4M's pass over chunks")
        km_expand: int = Field(10, ge=1, description="one_pass: a chunk has so many latents per prototype")
        posterior: Literal["mean", "sample"] = Field("mean", description="which latent of an image is clustered")
        strength: float = Field(0.7, ge=0, le=1, description="share of the steps that a noised prototype goes through")
        scheduler: Literal["ddim", "pndm", "dpmpp", "unipc", "euler"] = Field("ddim", description="pndm: D4M's own")
        soft_labels: Literal["none", "online", "stored"] = Field("none", description="a teacher's, for `distilled`")
        soft_labels_dir: Place | None = Field(None, description="folder of stored ones; null: beside the images")
        teacher: str = Field("resnet18", description="a backbone to train on real images, or a timm model with its tag")
        teacher_epochs: int = Field(200, ge=0, description="its epochs; 0: a published model with its own classes")
        teacher_lr: Rate = Field(0.1, description="SGD's rate for it, with cosine decay")
        teacher_weight_decay: Decay = Field(5e-4, description="SGD's for it")
        teacher_batch_size: BatchSize = Field(128, description="images per step of it")
        mix: Literal["cutmix", "mixup", "none"] = Field("cutmix", description="of the images with soft labels")
        mix_alpha: float = Field(1.0, gt=0, le=100, description="lambda is drawn from Beta(alpha, alpha)")
        keep_topk: int | None = Field(None, ge=1, description="probabilities kept of a soft label; null: all")
        saved_size: Side | None = Field(None, description="side that drawn images are brought to; null: none")
        export_json: bool = Field(False, description="also write the prototypes as D4M does, beside the safetensors")

        @property
        def expand(self) -> int | None:
            """What `cluster` is to know of chunks."""
            return self.km_expand if self.kmeans == "one_pass" else None

        @classmethod
        def translate(cls, raw: dict[str, Any]) -> dict[str, Any]:
            raw = super().translate(raw)
            words = {"guidance": raw["guidance_scale"]} if "guidance_scale" in raw else {}
            images = raw.get("ipc") or cls.model_fields["ipc"].default
            own = {key: value for key, value in raw.items() if key != "guidance_scale" and value is not None}
            return {"syn_per_class": images, **words, **own}

    def __init__(self, config, run, num_classes, class_names, dataset):
        super().__init__(config, run, num_classes, class_names, dataset)
        self.prototypes: dict[int, dict[str, Tensor]] = {}

    # ------------------------------------------------------------------ learning

    def fit_before(self, task: Task, images: ImageSet) -> None:
        """Cluster the latents of each of the task's classes, once the model knows what to call them.

        Raises:
            ConfigError: if a class has fewer images than it takes.
        """
        self.watcher = None  # whoever watches the model learn would see images without prototypes
        super().fit_before(task, images)
        for label in task.classes:
            checkpoints, before = self.run.checkpoints(f"fit_{task.index}_prototypes_{label}"), self.run.ledger.counts()
            if (found := checkpoints.load_newest(log)) is not None:
                self._take(found[1]["prototypes"])
                self.run.ledger.add(found[2].get("counts", {}))
                continue
            self.prototypes[label] = self.learn(label, images.select([label]))
            if self.run.runtime.is_main:
                counts = {"counts": self.run.ledger.since(before)}
                checkpoints.save(1, {"prototypes": flatten({label: self.prototypes[label]})}, counts)

    def require_images(self, name: str, count: int) -> None:
        """Raise ConfigError if a class has fewer images than its prototypes need."""
        expand = self.config.expand
        try:
            chunk_size(count, self.config.ipc, expand)
        except ConfigError as error:
            remedy = "lower synth.km_expand or synth.ipc, or set kmeans=full" if expand else "lower synth.ipc"
            raise ConfigError(f"class {name!r} has {error}: {remedy}") from error

    def learn(self, label: int, images: ImageSet) -> dict[str, Tensor]:
        """Return centres, counts and spread of one class."""
        config, name = self.config, self.class_names[label]
        self.require_images(name, len(images))
        moments = encode(self.model, images, False, config.sample_batch, self.run, f"encode {name}")
        mean, std = moments[:, 0].chunk(2, dim=1)
        generator = seeding.generator(self.run.seed, label, "prototypes")
        order = torch.randperm(len(mean), generator=generator)
        latents = mean[order]
        if config.posterior == "sample":
            latents = latents + std[order] * torch.randn(latents.shape, generator=generator)
        found = cluster(latents, config.ipc, seeding.derive(self.run.seed, label, "k-means") % 2**32, config.expand)
        counts, spread = found.counts.tolist(), found.spread
        log.info("Prototypes of %s: counts %d to %d, spread %.3f to %.3f of %.3f", name, min(counts), max(counts),
                 spread.min(), spread.max(), latents.std())  # fmt: skip
        return found._asdict()

    # ------------------------------------------------------------------ generating

    def generate(self, requests: Requests) -> ImageSet:
        """Draw one image per request from a noised prototype; see `ClassInversion.generate`."""
        images, size = super().generate(requests), self.config.saved_size
        return images if size is None else ImageSet.of(stack_images(images, size), images.labels)

    def start(self, requests: Requests, scheduler) -> tuple[Tensor, int | None]:
        """Noise the prototypes up to ``strength``, in turn for each class's images (SDEdit, arXiv:2108.01073)."""
        centres = [self.prototypes[label]["centres"] for label in requests.labels.tolist()]
        chosen = torch.stack([own[copy % len(own)] for own, copy in zip(centres, requests.copy.tolist())])
        chosen = chosen.to(self.run.device)
        # Cut off as in diffusers: 0.58 of 50 steps are 28, and below one step nothing is left of the noise.
        steps = int(self.config.sample_steps * self.config.strength)
        if not steps:
            return chosen, len(scheduler.timesteps)
        first = (self.config.sample_steps - steps) * scheduler.order
        noise = draw_noise(requests.generators(), self.model.latent_shape).to(self.run.device)
        return scheduler.add_noise(chosen, noise, scheduler.timesteps[first : first + 1]), first

    # ------------------------------------------------------------------ keeping

    def save(self, directory: Path) -> None:
        """Write what the model needs, and the prototypes."""
        super().save(directory)
        save_tensors(directory / PROTOTYPES, flatten(self.prototypes))
        if self.config.export_json and self.prototypes:
            name = f"{self.dataset.name}-ipc{self.config.ipc}-kmexpand{self.config.km_expand}.json"
            centres = {self.words[label]: own["centres"] for label, own in self.prototypes.items()}
            write_prototypes(directory / name, centres)

    def load(self, directory: Path) -> None:
        """Take over what ``save`` wrote."""
        super().load(directory)
        self._take(load_tensors(directory / PROTOTYPES))

    def _take(self, tensors: dict[str, Tensor]) -> None:
        self.prototypes |= {int(label): own for label, own in nest(tensors).items()}

    def fingerprint(self) -> str:
        """Hash the model and the prototypes."""
        hashes = f"{super().fingerprint()} {seeding.hash_tensors(flatten(dict(sorted(self.prototypes.items()))))}"
        return hashlib.sha256(hashes.encode()).hexdigest()

    def carried(self) -> list[Carried]:
        """Name the prototypes apart; a copy of them in D4M's form counts as what else the source keeps."""
        return [Carried("prototypes", (f"source/{PROTOTYPES}",)), *super().carried()]

    def describe(self) -> str:
        """Say how many prototypes there are and how far from them the images are."""
        config = self.config
        kmeans = f"k-means in one pass, {config.expand} per prototype at once" if config.expand else "k-means"
        what = f"{config.ipc} prototypes per class by {kmeans}, drawn with strength {config.strength:g}"
        return f"{what}; {super().describe()}"


@SOURCES.register("d4m")
class D4M(Distilling, LDM):
    """Prototypes of a class's latents, drawn by Stable Diffusion under the class's name (D4M).

    Su et al., CVPR 2024, arXiv:2407.15138; exps/d4m_*.json have its settings. ``scheduler: pndm`` begins, as in D4M,
    one step late: the slice of its steps leaves out the one that it warms up with.
    """

    class Config(Distilling.Config, LDM.Config):
        ldm_ckpt: Place = Field("stable-diffusion-v1-5/stable-diffusion-v1-5", description="hub id, folder or file")
        inversion: bool = Field(False, description="true: a vector per class in the place of its name, as in `ldm`")
        prompt: str = Field("*", description="what is drawn; * is the class")
        guidance: Factor = Field(8.0, description="classifier-free; `guidance_scale` in D4M")
        negative_prompt: str = Field("cartoon, anime, painting", description="what guidance leads away from")
        label_file_path: Place | None = Field(None, description="D4M's text file, one prompt per class in a line")
        prototypes: Place | None = Field(None, description="D4M's JSON of prototypes, which are then not learned")

    def __init__(self, config, run, num_classes, class_names, dataset):
        super().__init__(config, run, num_classes, class_names, dataset)
        if config.label_file_path is not None:
            prompts = read_prompts(config.label_file_path, dataset.class_names)
            self.words = [prompts[name] for name in class_names]

    def require_images(self, name: str, count: int) -> None:
        if self.config.prototypes is None:
            super().require_images(name, count)

    def nothing(self) -> Tensor:
        return self.model.context([self.config.negative_prompt])

    def fit_before(self, task: Task, images: ImageSet) -> None:
        """Cluster the latents of the task's classes, or read their prototypes."""
        if self.config.prototypes is None:
            return super().fit_before(task, images)
        LDM.fit_before(self, task, images)
        prompts = [self.words[label] for label in task.classes]
        read = read_prototypes(self.config.prototypes, prompts, self.model.latent_shape)
        unknown = {"counts": torch.zeros(0, dtype=torch.int64), "spread": torch.zeros(0)}  # D4M writes neither
        self.prototypes |= {label: {"centres": own, **unknown} for label, own in zip(task.classes, read)}


@SOURCES.register("small_d4m")
class SmallD4M(Distilling, SmallLDMSource):
    """The same with our own small latent diffusion model, learned on the first task; a vector stands for each class.

    At strength 0 prototypes are only decoded: without a UNet (``block_out_channels: []``) none is learned or kept.
    """

    class Config(Distilling.Config, SmallLDMSource.Config):
        block_out_channels: list[Width] = Field([64, 96], description="UNet's width per level; [] at strength 0: none")

        @model_validator(mode="after")
        def _draws(self):
            if self.strength and not self.block_out_channels:
                raise ValueError(f"synth.strength={self.strength:g} needs a UNet: give synth.block_out_channels widths")
            return self

    def invert(self, task: Task, classes: list[int], images: ImageSet) -> None:
        """Search a vector for each class, unless no UNet is there to read it."""
        if self.model.denoiser.unet is not None:
            return super().invert(task, classes, images)
        self.vectors |= dict.fromkeys(classes, self.model.initial_vector("").cpu())
