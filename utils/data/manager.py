"""The class-incremental view of a data set: the order of its classes, and which of their images may be seen.

Real images of past tasks are sealed: a learner that wants them needs exemplars or a replay source.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from utils.data import subsets
from utils.data.datasets import Dataset
from utils.data.images import ImageSet, map_in_threads, read_header
from utils.run.config import RunConfig
from utils.run.errors import ConfigError, SealedDataError
from utils.training import seeding


class Split(NamedTuple):
    """Rules by which a data set is cut into tasks and its images are picked.

    Args:
        init_cls, increment: classes in the first and in every later task; the last may be smaller.
        limit_tasks: keep only so many tasks, as if the classes of the others did not exist; None: all.
        shuffle: permute the classes by ``order_seed`` (PyCIL); else they come by id.
        class_order: original ids as they come, instead.
        task_order: tasks of that order as they come, from 0; None: as they are.
        run_seed: seed of few-shot and validation draws; None: ``order_seed``.
        train_per_class: training images per class, the first in the data set; None: all.
        kshot: training images per class after the first task; 0: all.
        few_shot_draw: "reference" is the reference's draw (Liu et al., arXiv:2403.09857).
        imb_factor, imb_type: long tail over the original class ids, of what ``train_per_class`` leaves; 1 is balanced.
        val_share: share of every class's training images that is held out, before few shots are drawn.
    """

    init_cls: int
    increment: int
    limit_tasks: int | None = None
    shuffle: bool = True
    class_order: list[int] | None = None
    task_order: list[int] | None = None
    order_seed: int = 1993
    run_seed: int | None = None
    train_per_class: int | None = None
    kshot: int = 0
    few_shot_draw: Literal["own", "reference"] = "own"
    imb_factor: float = 1.0
    imb_type: Literal["exp", "step"] = "exp"
    val_share: float = 0.0


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
        split: how it is cut.
        upper_bound: allow ``all_seen_images``.

    Attributes:
        task_sizes: new classes of each of the ``num_tasks`` tasks; they sum to ``num_classes``.
        class_order: original class ids in the order of learning; ``class_names`` are theirs.
        class_counts: training images per class in learning order, after every subset.
        long_tailed: whether the data set's largest class has ten times the images of its smallest, or ``imb_factor``
            makes some rare.
        few_shot_indices: by class, positions of its few shots within its images in the data set.

    Raises:
        ConfigError: if ``init_cls`` exceeds the classes, ``class_order`` is of other classes or ``task_order`` of other
            tasks, or a long tail leaves a class empty.
        DataError: if a class has fewer than ``kshot`` images.
    """

    def __init__(self, dataset: Dataset, split: Split, upper_bound: bool = False):
        # Without its images: whoever holds the manager could read the past there.
        self.dataset = replace(dataset, train=ImageSet(), test=ImageSet())
        self.split, self.upper_bound = split, upper_bound
        sizes = subsets.task_sizes(dataset.num_classes, split.init_cls, split.increment, dataset.name)
        order = split.class_order or subsets.class_order(dataset.num_classes, split.shuffle, split.order_seed)
        if len(order) != dataset.num_classes:
            every = f"all {dataset.num_classes} of {dataset.name}"
            raise ConfigError(f"class_order names {len(order)} classes: name {every}")
        if split.task_order is not None:
            order, sizes = subsets.reorder_tasks(order, sizes, split.task_order)
        self.task_sizes = sizes[: split.limit_tasks]
        self.num_tasks, self.num_classes = len(self.task_sizes), sum(self.task_sizes)
        self.class_order = order[: self.num_classes]
        self.class_names = [dataset.class_names[original] for original in self.class_order]
        spans = [range(stop - size, stop) for size, stop in zip(self.task_sizes, accumulate(self.task_sizes))]
        self._tasks = [Task(i, span, tuple(self.class_names[span.start : span.stop])) for i, span in enumerate(spans)]
        self._current = -1  # the task that is being learned
        self.few_shot_indices: dict[int, list[int]] = {}

        counts = dataset.train.counts(dataset.num_classes)
        self.long_tailed = split.imb_factor < 1 or bool(counts.max() >= 10 * counts.min())
        rank = torch.tensor(order).argsort()  # original id -> place in the order of learning
        self._test = dataset.test.relabelled(rank[dataset.test.labels]).select(range(self.num_classes))
        train = dataset.train.relabelled(rank[dataset.train.labels])
        self._kept, held_out = self._pick(dataset.train.labels, train.labels)  # positions in the data set
        self._val = train.take(held_out)
        # A set that is kept whole is not copied: it may fill half of the memory.
        self._train = train if len(self._kept) == len(train) else train.take(self._kept)
        self.class_counts: list[int] = self._train.counts(self.num_classes).tolist()

    def images_hash(self, classes: Iterable[int]) -> str:
        """Hash which images of these classes are trained on, of all that the data set has of them, by SHA-256."""
        labels = self._train.labels
        return seeding.hash_tensors({str(label): self._kept[labels == label] for label in classes})

    def fingerprint(self) -> dict[str, Any]:
        """Return what must be equal where a run is resumed: classes, counts, and a hash of the training images."""
        return {"dataset": self.dataset.name, "class_order": self.class_order, "class_names": self.class_names,
                "counts": self.class_counts, "images": self._train.contents_hash(self.dataset.root)}  # fmt: skip

    @cached_property
    def all_real_bytes(self) -> int:
        """Bytes of all training images: raw pixels in memory, file sizes on disk."""
        return self._train.nbytes

    @cached_property
    def image_sizes(self) -> Counter[tuple[int, int]]:
        """(height, width) of all training images as they are stored, and how many have it; headers tell of files."""
        sizes: Counter[tuple[int, int]] = Counter()
        for part in self._train.parts:
            if isinstance(part.images, Tensor):
                sizes[tuple(part.images.shape[-2:])] += len(part.images)
            else:
                sizes.update(header[:2] for header in map_in_threads(read_header, part.images, "measuring images"))
        return sizes

    def task(self, index: int) -> Task:
        """Return the task of this index; looking at it does not begin it."""
        return self._tasks[index]

    def tasks(self, start: int = 0) -> Iterator[Task]:
        """Begin one task after the other, from ``start`` on (a resumed run)."""
        for task in self._tasks[start:]:
            self.advance(task)
            yield task

    def advance(self, task: Task) -> None:
        """Begin this task: its images become readable, those of the task before are sealed."""
        self._current = task.index

    def train_images(self, task: Task) -> ImageSet:
        """Return training images of the task's new classes.

        Raises:
            SealedDataError: if the task is not the one that is being learned.
        """
        self._require_current(task)
        return self._train.select(task.classes)

    def all_seen_images(self, task: Task) -> ImageSet:
        """Return training images of all classes up to this task, for joint training.

        Raises:
            SealedDataError: unless the learner declares ``upper_bound`` and the task is being learned.
        """
        if not self.upper_bound:
            remedy = "keep exemplars, replay, or declare upper_bound = True in the learner, which the report will say"
            raise SealedDataError(f"real images of the tasks before task {task.index} are sealed: {remedy}")
        self._require_current(task)
        return self._train.select(range(task.num_seen))

    def test_images(self, classes: Iterable[int]) -> ImageSet:
        """Return test images of these classes, for the evaluator alone."""
        return self._test.select(classes)

    def val_images(self, classes: Iterable[int]) -> ImageSet:
        """Return held-out training images of these classes; none without ``val_share``.

        They are a share of what a long tail leaves. Few shots are drawn from the rest, so none is ever trained on.
        """
        return self._val.select(classes)

    def _pick(self, originals: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return positions of the training and the validation images, int64; note the few shots.

        Args:
            originals, labels: of all images of the data set, by original id and in learning order.
        """
        split, kept = self.split, torch.arange(len(labels))
        seed = split.order_seed if split.run_seed is None else split.run_seed
        if split.train_per_class is not None:
            kept = subsets.first_indices(originals, split.train_per_class)
        if split.imb_factor < 1:
            # By original ids: the tail is the same whatever the order of learning.
            classes = self.dataset.num_classes, split.imb_factor, split.imb_type, self.dataset.class_names
            kept = kept[subsets.long_tail_indices(originals[kept], *classes)]
        kept = kept[labels[kept] < self.num_classes]
        fit, held_out = subsets.split_validation(labels[kept], split.val_share, seed)
        kept, held_out = kept[fit], kept[held_out]
        if split.kshot == 0:
            return kept, held_out
        own, sessions = labels[kept], [task.classes for task in self._tasks[1:]]
        drawn = subsets.few_shot_indices(own, sessions, split.kshot, seed, split.few_shot_draw, self.class_names)
        shots = {label: kept[own == label][positions] for label, positions in drawn.items()}
        for label, chosen in shots.items():
            of_class = (labels == label).nonzero().flatten()  # ascending
            self.few_shot_indices[label] = torch.searchsorted(of_class, chosen).tolist()
        return torch.cat([kept[own < self.task_sizes[0]], *shots.values()]), held_out

    def _require_current(self, task: Task) -> None:
        if task.index > self._current:
            raise SealedDataError(f"task {task.index} has not begun: iterate tasks(), or call advance(task)")
        if task.index < self._current:
            now, remedy = f"task {self._current} is being learned", "keep exemplars of them, or replay from a source"
            raise SealedDataError(f"the real images of task {task.index} are sealed while {now}: {remedy}")


def cut_tasks(config: RunConfig, seed: int, dataset: Dataset, upper_bound: bool = False) -> DataManager:
    """Cut the tasks of one seed of an experiment, whose images a network sees in the config's size."""
    dataset = replace(dataset, image_size=config.image_size or dataset.image_size)
    seeds = {"order_seed": config.order_seed(seed), "run_seed": config.train_seed(seed)}
    shared = {name: getattr(config, name) for name in Split._fields if name not in seeds}
    return DataManager(dataset, Split(**shared, **seeds), upper_bound)
