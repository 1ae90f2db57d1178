"""The class-incremental view of a data set: which classes come when, and which of their images may be seen.

Real images of past tasks are sealed: a learner that wants them needs exemplars or a replay source.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from utils.data import subsets
from utils.data.datasets import Dataset
from utils.data.images import ImageSet, image_sizes
from utils.run.config import RunConfig
from utils.run.errors import SealedDataError
from utils.training import seeding


@dataclass(frozen=True)
class Task:
    """The new classes of one step of learning, as a range in learning order."""

    index: int
    classes: range
    class_names: tuple[str, ...]

    @property
    def num_old(self) -> int:
        """Classes of all earlier tasks."""
        return self.classes.start

    @property
    def num_new(self) -> int:
        return len(self.classes)

    @property
    def num_seen(self) -> int:
        """Old and new classes."""
        return self.classes.stop


class DataManager:
    """Cuts a data set into tasks and hands out each task's images. Labels are positions in the class order.

    Args:
        dataset: with original class ids.
        init_cls, increment: classes in the first and in every later task; the last may be smaller.
        limit_tasks: keep only so many tasks, as if the classes of the others did not exist; None: all.
        shuffle: permute the classes by ``order_seed`` (PyCIL); else the data set's own order.
        run_seed: seed of few-shot and validation draws; None: ``order_seed``.
        kshot: training images per class after the first task; 0: all.
        few_shot_draw: "reference" draws as ASP's code does.
        imb_factor, imb_type: long tail over the original class ids; 1 is balanced.
        val_share: share of every class's training images that is held out.
        upper_bound: allow ``all_seen_images``.

    Raises:
        ConfigError: if ``init_cls`` exceeds the classes, or a long tail leaves a class empty.
        DataError: if a class has fewer than ``kshot`` images.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        init_cls: int,
        increment: int,
        limit_tasks: int | None = None,
        shuffle: bool = True,
        order_seed: int = 1993,
        run_seed: int | None = None,
        kshot: int = 0,
        few_shot_draw: Literal["own", "reference"] = "own",
        imb_factor: float = 1.0,
        imb_type: Literal["exp", "step"] = "exp",
        val_share: float = 0.0,
        upper_bound: bool = False,
    ):
        # Without its images: whoever holds the manager could read the past there.
        self.dataset = replace(dataset, train=ImageSet(), test=ImageSet())
        self.upper_bound = upper_bound
        self.task_sizes = subsets.task_sizes(dataset.num_classes, init_cls, increment, dataset.name)[:limit_tasks]
        order = _class_order(dataset, shuffle, order_seed)
        self.class_order = order[: sum(self.task_sizes)]
        self.class_names = [dataset.class_names[original] for original in self.class_order]
        self.few_shot_indices: dict[int, list[int]] = {}  # class -> positions within its images in the data set
        self._tasks = self._cut()
        self._current: Task | None = None

        rank = torch.tensor(order).argsort()  # original id -> place in the order of learning
        train = dataset.train.relabelled(rank[dataset.train.labels])
        self._test = dataset.test.relabelled(rank[dataset.test.labels]).select(range(self.num_classes))
        draw_seed = order_seed if run_seed is None else run_seed
        kept = torch.arange(len(train))
        if imb_factor < 1:
            # By original ids: the tail is the same whatever the order of learning.
            kept = subsets.long_tail_indices(dataset.train.labels, dataset.num_classes, imb_factor, imb_type)
        kept = kept[train.labels[kept] < self.num_classes]
        fit, held_out = subsets.split_validation(train.labels[kept], val_share, draw_seed)
        self._val, kept = train.take(kept[held_out]), kept[fit]
        if kshot > 0:
            kept = self._draw_few_shots(train.labels, kept, kshot, draw_seed, few_shot_draw)
        self._train = train if len(kept) == len(train) else train.take(kept)
        self._kept = kept  # positions in the data set

    @property
    def num_classes(self) -> int:
        return len(self.class_order)

    @property
    def num_tasks(self) -> int:
        return len(self._tasks)

    @property
    def class_counts(self) -> list[int]:
        """Training images per class in learning order, after every subset."""
        return self._train.counts(self.num_classes).tolist()

    def images_hash(self, classes: Iterable[int]) -> str:
        """Which images of these classes are trained on, of all that the data set has of them: a SHA-256."""
        labels = self._train.labels
        own = {str(label): self._kept[labels == label] for label in classes}
        return seeding.hash_tensors(own)

    def fingerprint(self) -> dict:
        """Say what data this is, for whoever resumes."""
        return {"dataset": self.dataset.name, "class_order": self.class_order, "class_names": self.class_names,
                "counts": self.class_counts, "images": self.images_hash(range(self.num_classes))}  # fmt: skip

    @cached_property
    def all_real_bytes(self) -> int:
        """What keeping all training images would take: raw pixels in memory, file sizes on disk."""
        return self._train.nbytes

    @cached_property
    def image_sizes(self) -> Counter[tuple[int, int]]:
        """(height, width) of all training images as they are stored, and how many have it."""
        return image_sizes(self._train)

    def task(self, index: int) -> Task:
        """The task of this index; looking at it does not begin it."""
        return self._tasks[index]

    def tasks(self, start: int = 0) -> Iterator[Task]:
        """Begin one task after the other, from ``start`` on (a resumed run)."""
        for task in self._tasks[start:]:
            self.advance(task)
            yield task

    def advance(self, task: Task) -> None:
        """Begin this task: its images become readable, those of the task before are sealed."""
        self._current = task

    def train_images(self, task: Task) -> ImageSet:
        """Training images of the task's new classes.

        Raises:
            SealedDataError: if the task is not the one that is being learned.
        """
        self._require_current(task)
        return self._train.select(task.classes)

    def all_seen_images(self, task: Task) -> ImageSet:
        """Training images of all classes up to this task, for joint training.

        Raises:
            SealedDataError: unless the learner declares ``upper_bound`` and the task is being learned.
        """
        if not self.upper_bound:
            raise SealedDataError(
                f"real images of the tasks before task {task.index} are sealed: keep exemplars, replay from a source, "
                "or declare upper_bound = True in the learner, which the report will say"
            )
        self._require_current(task)
        return self._train.select(range(task.num_seen))

    def test_images(self, classes: Iterable[int]) -> ImageSet:
        """Test images of these classes. For the evaluator alone."""
        return self._test.select(classes)

    def val_images(self, classes: Iterable[int]) -> ImageSet:
        """Held-out training images of these classes; empty when ``val_share`` is 0."""
        return self._val.select(classes)

    def _cut(self) -> list[Task]:
        stops = list(accumulate(self.task_sizes))
        ranges = [range(stop - size, stop) for size, stop in zip(self.task_sizes, stops)]
        return [Task(i, span, tuple(self.class_names[span.start : span.stop])) for i, span in enumerate(ranges)]

    def _draw_few_shots(
        self, labels: Tensor, kept: Tensor, kshot: int, seed: int, draw: Literal["own", "reference"]
    ) -> Tensor:
        """``kept`` with K drawn images for every class after the first task; notes which they are."""
        sessions = [task.classes for task in self._tasks[1:]]
        drawn = subsets.few_shot_indices(labels[kept], sessions, kshot, seed, draw, self.class_names)
        chosen = [kept[labels[kept] < self.task_sizes[0]]]
        for label, positions in drawn.items():
            shots = kept[labels[kept] == label][positions]
            chosen.append(shots)
            of_class = (labels == label).nonzero().flatten()  # ascending
            self.few_shot_indices[label] = torch.searchsorted(of_class, shots).tolist()
        return torch.cat(chosen)

    def _require_current(self, task: Task) -> None:
        if self._current is None:
            raise SealedDataError(f"task {task.index} has not begun: iterate tasks(), or call advance(task)")
        if task.index > self._current.index:
            raise SealedDataError(f"task {task.index} has not begun: task {self._current.index} is being learned")
        if task.index < self._current.index:
            raise SealedDataError(
                f"the real images of task {task.index} are sealed while task {self._current.index} is being learned: "
                "keep exemplars of them, or replay them from a source"
            )


def cut_tasks(config: RunConfig, seed: int, dataset: Dataset, upper_bound: bool = False) -> DataManager:
    """The tasks of one seed of an experiment."""
    return DataManager(
        dataset,
        init_cls=config.init_cls,
        increment=config.increment,
        limit_tasks=config.limit_tasks,
        shuffle=config.shuffle,
        order_seed=config.order_seed(seed),
        run_seed=config.train_seed(seed),
        kshot=config.kshot,
        few_shot_draw=config.few_shot_draw,
        imb_factor=config.imb_factor,
        imb_type=config.imb_type,
        val_share=config.val_share,
        upper_bound=upper_bound,
    )


def _class_order(dataset: Dataset, shuffle: bool, seed: int) -> list[int]:
    if not shuffle and dataset.class_order is not None:
        return list(dataset.class_order)
    return subsets.class_order(dataset.num_classes, shuffle, seed)
