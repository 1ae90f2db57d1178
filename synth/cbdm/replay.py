"""How drawn images fill the tail of a task: every class is brought up to the largest."""

from __future__ import annotations

from typing import Any

import torch

from synth.base import ReplaySource
from synth.drawing import ImageFolder
from synth.replay import Stored
from synth.requests import Requests
from utils.data.images import ImageSet
from utils.data.manager import Task
from utils.run.config import RunConfig
from utils.run.errors import ConfigError


class Filled(Stored):
    """With ``fill``, new classes are their real images and, in `task_<t>/fill`, as many drawn ones as they lack.

    The source has learned the task before the classifier does. Drawn images of new classes serve their own task alone;
    old classes come back as with `Stored`, from images of their own.
    """

    @classmethod
    def serves(cls, config: RunConfig) -> bool:
        return config.synth.fill or config.synth.sample_method == "uncond"  # which `check` refuses

    @classmethod
    def check(cls, config: RunConfig, source: type[ReplaySource]) -> None:
        if config.synth.sample_method == "uncond":
            raise ConfigError("synth.sample_method='uncond': images of no class cannot stand for one; use cfg or cond")
        for key, value in {"replay": "redraw", "need_syn_imgs": False}.items():
            if getattr(config.synth, key) == value:
                why = "synth.fill=true draws images of a class once, right after it is learned"
                raise ConfigError(f"synth.{key}={value!r}: {why}; leave one of the two out")

    def __init__(self, *args):
        super().__init__(*args)
        self.fills: dict[int, ImageFolder] = {}  # of tasks whose classes are filled up

    def lacking(self, task: Task) -> dict[int, int]:
        """Count the images that each class of a task lacks to be as many as the largest, within ``fill_most``."""
        counts = {label: self.data.class_counts[label] for label in task.classes}
        most, times = max(counts.values()), self.config.fill_most
        return {label: min(most - count, int(times * count)) for label, count in counts.items()}

    # ------------------------------------------------------------------ the life of a task

    def learned(self, task: Task) -> None:
        """Draw what fills the task's classes and, if other tasks come, what will stand for them then."""
        if task.num_seen < self.data.num_classes:
            super().learned(task)
        if task.index not in self.fills:
            with self.run.timed("draw"):
                self.fills[task.index] = self._fill(task)

    def present(self, task: Task, real: ImageSet) -> ImageSet:
        place, lacking = self.fills[task.index], self.lacking(task)
        return real + sum((place.images(label, count) for label, count in lacking.items()), ImageSet()).merged()

    def _fill(self, task: Task) -> ImageFolder:
        self.bank.claim_root()
        key, lacking = (self.run.seed, self.config.name, task.index, "fill"), self.lacking(task)
        place = self.bank.place(self.folder / f"task_{task.index}" / "fill", task.index, key)
        place.claim()
        labels = torch.tensor(list(lacking)).repeat_interleave(torch.tensor(list(lacking.values())))
        copies = torch.cat([torch.arange(count) for count in lacking.values()])
        place.draw(self.source, [Requests(labels, torch.full_like(labels, -1), copies, key)])
        if not place.preview.exists():
            place.write_preview([place.images(label) for label in task.classes])
        return place

    # ------------------------------------------------------------------ what is said and kept of it

    def expected(self) -> int:
        """Count what fills every task, beside what is stored of all but the last one."""
        *old, last = map(self.data.task, range(self.data.num_tasks))
        stored = sum(map(self.bank.per_class, range(last.num_old)))
        return stored + sum(sum(self.lacking(task).values()) for task in (*old, last))

    def first_task_settings(self) -> dict[str, Any]:
        """Say what the first task is trained on beside its real images."""
        return self.config.model_dump(mode="json")

    def newest(self, label: int) -> list[str]:
        """Return the images that filled a class; of one that was filled by none, those that are stored."""
        fill = self.fills.get(self.bank.task_of[label])
        return list(map(str, fill.of_class(label))) if fill and fill.of_class(label) else super().newest(label)
