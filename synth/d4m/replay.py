"""How distilled images enter a training: in the place of the new images, of the old ones, or of both."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from synth.base import ReplaySource
from synth.d4m.matching import PublishedTeacher, SoftBatches, SoftLabels, check_teacher, train_teacher
from synth.replay import Stored
from utils.data.batches import Batches, Loading
from utils.data.images import ImageSet, Samples, decode_image
from utils.data.manager import Task
from utils.run.carried import Carried
from utils.run.config import RunConfig
from utils.run.errors import ConfigError
from utils.run.log import log
from utils.training import seeding
from utils.training.fit import Training


class Distilled(Stored):
    """Stored images that may stand for the present too; see ``stream`` and ``memory`` of the source's config.

    With ``memory: distilled`` the learner keeps no exemplar. With ``stream: subset`` and ``memory: stream`` nothing is
    distilled: so many real images are what distillation has to beat.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.shows_new, self.shows_old = self.config.stream in ("distilled", "both"), self.config.memory == "distilled"
        self.learns = self.learns and (self.shows_new or self.shows_old)
        self.replaces_exemplars = self.shows_old

    @classmethod
    def check(cls, config: RunConfig, source: type[ReplaySource]) -> None:
        if config.synth.soft_labels != "none" and config.model_name != "distilled":
            why = f"are softened as the learner 'distilled' softens its outputs, {config.model_name!r} does not"
            remedy = "leave the key out, or set model_name=distilled"
            raise ConfigError(f"synth.soft_labels={config.synth.soft_labels!r} {why}: {remedy}")

    def require(self) -> None:
        """See, before anything is learned, that every class has enough images and that a published teacher fits."""
        super().require()
        for name, count in zip(self.data.class_names, self.data.class_counts) if self.learns else ():
            self.source.require_images(name, count)
        if self.config.soft_labels != "none":
            check_teacher(self.config, self.data.dataset)

    def fit_before(self, task: Task, real: ImageSet) -> None:
        """Let the source learn; then make the teacher, if there is one, who also sees what stands for old classes."""
        super().fit_before(task, real)
        if self.config.soft_labels == "none":
            return
        with self.run.timed("fit"):
            self.teacher = self._make_teacher(task, real)

    def _make_teacher(self, task: Task, real: ImageSet) -> nn.Module:
        config, data = self.config, self.data
        if config.teacher_epochs == 0:
            return PublishedTeacher(config.teacher, data.class_order[: task.num_seen]).to(self.run.device)
        training, stem = Training(self.run, task, "teacher"), self.run_config.stem
        return train_teacher(config, stem, real + self.past(task), data.dataset, training)

    def batches(self, present: Samples, past: Samples, loading: Loading) -> Batches:
        batches = super().batches(present, past, loading)
        if self.config.soft_labels == "none":
            return batches
        stored = self._stored(present + past, loading)
        return SoftBatches(batches, self.teacher, self.run_config.T, self.config, stored, self.run.runtime)

    def _stored(self, shown: ImageSet, loading: Loading) -> SoftLabels | None:
        """Return where the labels of these images are kept, claimed for them."""
        if self.config.soft_labels != "stored":
            return None
        config = self.config
        seed, index, _ = loading.key
        identity = {
            "images": hash_images(shown), "views": loading.transform.describe(), "key": list(loading.key),
            "batch_size": loading.batch_size, "processes": loading.shard[1],
            "teacher": seeding.hash_tensors(self.teacher.state_dict()), "mix": [config.mix, config.mix_alpha],
        }  # fmt: skip
        folder = Path(config.soft_labels_dir or self.folder / "soft_labels") / f"seed_{seed}_task_{index}"
        stored = SoftLabels(folder, identity)
        with self.run.runtime.accelerator.main_process_first():
            stored.manifest.claim(write=self.run.runtime.is_main)
        return stored

    def learned(self, task: Task) -> None:
        super().learned(task)
        place = self.bank.fill(task.index)
        twins = sum(count - 1 for count in Counter(place.files.values()).values())
        black = [path for label in task.classes for path in place.of_class(label) if not decode_image(path).any()]
        if twins or black:
            log.warning("%s: %d images are copies of others, %d are black%s", place.folder, twins, len(black),
                        f", such as {black[0].name}" if black else "")  # fmt: skip

    def present(self, task: Task, real: ImageSet) -> ImageSet:
        if self.config.stream == "subset":
            return sum((self._subset(real.select([label]), label) for label in task.classes), ImageSet())
        drawn = self.bank.stored(task.classes) if self.shows_new else ImageSet()
        return drawn if self.config.stream == "distilled" else real + drawn

    def past(self, task: Task) -> ImageSet:
        return super().past(task) if self.shows_old else ImageSet()

    def first_task_settings(self) -> dict[str, Any]:
        """Say what the first task is trained on, where it is not the real images."""
        return {} if self.config.stream == "real" else self.config.model_dump(mode="json")

    def carried(self) -> list[Carried]:
        return super().carried() if self.shows_old else []  # nobody comes back to what only stood for new classes

    def _subset(self, real: ImageSet, label: int) -> ImageSet:
        generator = seeding.generator(self.run.seed, label, "subset")
        return real.take(torch.randperm(len(real), generator=generator)[: self.config.ipc])


def hash_images(images: ImageSet) -> str:
    """Compute the SHA-256 over labels and pixels, in their order."""
    digest = hashlib.sha256(images.labels.numpy())
    for row in range(len(images)):
        digest.update(images.image(row).contiguous().numpy())
    return digest.hexdigest()
