"""Training-time matching: a teacher says what it sees in every augmented and mixed image that a student is shown.

Nothing is matched while images are distilled. The labels are made as they are needed or stored by batch, and are the
same in both ways.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.files.weights import published_weights
from models.heads import LinearHead
from models.incremental import IncrementalNet
from models.options import BackboneOptions
from models.timm_backbone import build_backbone, check_backbone_name
from utils.data.batches import Batch, Batches, ImageBatches
from utils.data.datasets import Dataset
from utils.data.images import ImageSet
from utils.data.transforms import classifier_transform
from utils.run.command import promised_offline
from utils.run.config import SourceConfig
from utils.run.errors import BankError, ConfigError
from utils.run.files import load_tensors, save_tensors
from utils.run.manifest import Manifest
from utils.training import seeding
from utils.training.fit import Training, fit
from utils.training.ledger import counted
from utils.training.runtime import Runtime
from utils.training.schedule import TrainConfig


class Mix(NamedTuple):
    """How the images of a batch are mixed.

    Attributes:
        share: lambda, of an image's own pixels, before a box is clipped.
        partner: int64 (B,), whose pixels it gets.
        box: top, left, bottom, right in pixels; None: all pixels are blended by ``share``.
    """

    share: float
    partner: Tensor
    box: tuple[int, int, int, int] | None

    def apply(self, images: Tensor) -> Tensor:
        """Mix images, float (B, C, H, W)."""
        partners = images[self.partner.to(images.device)]
        if self.box is None:
            return self.share * images + (1 - self.share) * partners
        top, left, bottom, right = self.box
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = partners[:, :, top:bottom, left:right]
        return mixed


def draw_mix(kind: str, alpha: float, shape: torch.Size, key: tuple[int | str, ...]) -> Mix:
    """Draw one mix for a whole batch.

    CutMix (Yun et al., ICCV 2019, arXiv:1905.04899) or MixUp (Zhang et al., ICLR 2018, arXiv:1710.09412), lambda from
    Beta(alpha, alpha).

    Args:
        kind: "cutmix" or "mixup".
        alpha: > 0.
        shape: (B, C, H, W).
        key: random key.
    """
    generator = seeding.numpy_generator(*key)
    share, partner = float(generator.beta(alpha, alpha)), torch.from_numpy(generator.permutation(shape[0]))
    if kind == "mixup":
        return Mix(share, partner, None)
    height, width = shape[2:]
    # The middle is anywhere, so that a box may reach over the edge, where it is cut off.
    spans = []
    for side in (height, width):
        half, middle = int(side * (1 - share) ** 0.5) // 2, int(generator.integers(side))
        spans.append((max(middle - half, 0), min(middle + half, side)))
    (top, bottom), (left, right) = spans
    return Mix(share, partner, (top, left, bottom, right))


class SoftLabels:
    """A teacher's logits on disk, in half precision, by batch and process, with rows and mix that they belong to (FKD).

    Shen and Xing, "A Fast Knowledge Distillation Framework for Visual Recognition", ECCV 2022, arXiv:2112.01528. Crops
    and flips follow from the random key of a batch, so they are not stored again.

    Args:
        folder: where they lie.
        identity: the images, their order and their views; JSON.
    """

    def __init__(self, folder: Path, identity: dict):
        remedy = "name another synth.soft_labels_dir, or delete the folder"
        self.manifest = Manifest(folder, "soft labels", identity, remedy=remedy, error=BankError)

    def path(self, place: tuple[int, int, int]) -> Path:
        epoch, step, rank = place
        return self.manifest.folder / f"epoch_{epoch}" / f"batch_{step}{f'_rank_{rank}' if rank else ''}.safetensors"

    def read(self, place: tuple[int, int, int], shown: dict[str, Tensor]) -> Tensor | None:
        """Return the logits that were stored of a batch, float16 (B, K); None if none were.

        Raises:
            BankError: if they belong to other images or another mix than those that are shown.
        """
        if not (path := self.path(place)).exists():
            return None
        stored = load_tensors(path)
        logits = stored.pop("logits")
        if stored.keys() != shown.keys() or any(not torch.equal(stored[name], shown[name]) for name in shown):
            why = "are of other images or another mix than those shown now, as another torch may draw them"
            raise BankError(f"the soft labels in {str(path)!r} {why}: {self.manifest.remedy}")
        return logits

    def write(self, place: tuple[int, int, int], shown: dict[str, Tensor], logits: Tensor) -> None:
        """Store the logits of a batch, float16 (B, K), with what is shown in it."""
        save_tensors(self.path(place), {**shown, "logits": logits.cpu()})


def shown_batch(rows: Tensor, mix: Mix | None) -> dict[str, Tensor]:
    """Say in tensors what a batch shows: its rows, int32 (B,), and how they are mixed."""
    if mix is None:
        return {"rows": rows.int()}
    box = torch.tensor(mix.box or (), dtype=torch.int32)
    return {"rows": rows.int(), "partner": mix.partner.int(), "share": torch.tensor(mix.share), "box": box}


def check_teacher(config: SourceConfig, dataset: Dataset) -> None:
    """See that there is such a teacher, without fetching it; a published one must see as a student sees.

    Args:
        config: has the keys teacher and teacher_epochs.
        dataset: whose images are shown.

    Raises:
        ConfigError: if not.
    """
    import timm

    name = f"synth.teacher={config.teacher!r}"
    if config.teacher_epochs:
        try:
            return check_backbone_name(config.teacher, BackboneOptions(pretrained=False))
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
    if config.teacher not in timm.list_pretrained():
        raise ConfigError(f"{name}: no timm model with a weight tag; or set synth.teacher_epochs")
    cfg, here = timm.get_pretrained_cfg(config.teacher), (dataset.num_classes, *dataset.mean, *dataset.std)
    if (known := (cfg.num_classes, *cfg.mean, *cfg.std)) != here:
        remedy = "give one of these images, or train one on the real images with synth.teacher_epochs"
        raise ConfigError(f"{name} has classes, mean and std {known}, the data set {here}: {remedy}")


class PublishedTeacher(nn.Module):
    """A timm model with its own classifier, whose outputs are brought into learning order.

    Args:
        name: of timm, with weight tag.
        class_order: original ids in learning order.
    """

    def __init__(self, name: str, class_order: list[int]):
        import timm

        super().__init__()
        file = published_weights(timm.get_pretrained_cfg(name), promised_offline())
        self.network = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(file)}).eval()
        self.order = class_order

    @counted
    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)[:, self.order]


def train_teacher(config: SourceConfig, stem: str, images: ImageSet, dataset: Dataset, training: Training) -> nn.Module:
    """Train a network from scratch on real images of all classes that it is to know; return it frozen.

    Args:
        config: has the keys of a teacher.
        stem: of the student; see `RunConfig`.
        images: of the classes.
        dataset: how they are augmented.
        training: run, task and purpose.
    """
    run, transform = training.run, classifier_transform(dataset)
    stem = ("cifar" if dataset.in_memory else "imagenet") if stem == "auto" else stem
    options = BackboneOptions(stem, dataset.image_size, pretrained=False)
    seeding.seed_everything(run.seed, training.task.index, training.purpose)
    backbone = build_backbone(config.teacher, options)
    teacher = IncrementalNet(backbone, LinearHead(backbone.num_features)).to(run.device)
    teacher.grow(int(images.labels.max()) + 1, seeding.generator(run.seed, training.task.index, "grow teacher"))
    loading = run.loading(transform, config.teacher_batch_size, training.task.index, training.purpose, network=teacher)

    def loss(batch: Batch) -> dict[str, Tensor]:
        return {"cross_entropy": F.cross_entropy(teacher(batch.images), batch.labels)}

    decay = config.teacher_weight_decay
    schedule = TrainConfig(config.teacher_lr, config.teacher_epochs, schedule="cosine", weight_decay=decay)
    fit(teacher, ImageBatches(images, None, loading), loss, schedule, training)
    return teacher.eval().requires_grad_(False)


def keep_top(targets: Tensor, count: int | None) -> Tensor:
    """Keep the largest probabilities of each row and divide the rest evenly (FKD, marginal smoothing with top-K).

    Args:
        targets: (B, K), rows that sum to 1.
        count: how many are kept; None, K or more: all.
    """
    kept, places = targets.topk(min(count or targets.shape[1], targets.shape[1]), dim=1)
    rest = (1 - kept.sum(1, keepdim=True)) / max(targets.shape[1] - kept.shape[1], 1)
    return rest.expand_as(targets).scatter(1, places, kept)


class SoftBatches(Batches):
    """Image batches that are mixed, with what a teacher sees in them as soft targets.

    Args:
        images: batches of augmented images.
        teacher: maps images to logits (B, K).
        temperature: softens its logits.
        config: has the keys mix, mix_alpha and keep_topk.
        stored: where labels are kept; None: nowhere.
        runtime: number format and devices.
    """

    def __init__(self, images: ImageBatches, teacher: nn.Module, temperature: float, config: SourceConfig,
                 stored: SoftLabels | None, runtime: Runtime):  # fmt: skip
        self.images, self.teacher, self.temperature, self.config = images, teacher, temperature, config
        self.stored, self.runtime = stored, runtime

    def __len__(self) -> int:
        return len(self.images)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        key, rank = self.images.loading.key, self.images.loading.shard[0]
        picks = map(self.images.share, self.images.picks(epoch)[start:])
        for step, (batch, pick) in enumerate(zip(self.images.epoch(epoch, start), picks), start):
            images, mix, config = batch.images, None, self.config
            if config.mix != "none":
                mix = draw_mix(config.mix, config.mix_alpha, images.shape, (*key, "mix", epoch, step, rank))
                images = mix.apply(images)
            logits = self._logits(images, shown_batch(pick, mix), (epoch, step, rank))
            targets = keep_top(torch.softmax(logits / self.temperature, dim=1), config.keep_topk)
            yield replace(batch, images=images, soft_targets=targets)

    @torch.no_grad()
    def _logits(self, images: Tensor, shown: dict[str, Tensor], place: tuple[int, int, int]) -> Tensor:
        """Return the teacher's logits, float32 (B, K), rounded to half precision wherever they come from."""
        known = self.stored.read(place, shown) if self.stored else None
        if known is not None:
            return known.to(images.device).float()
        with self.runtime.autocast():
            logits = self.teacher(images).float().half()
        if self.stored:
            self.stored.write(place, shown, logits)
        return logits.float()
