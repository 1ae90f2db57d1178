"""Exemplars: which images of the past are kept, and how many (PyCIL's meaning of ``memory_*``)."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from synth.replay import Replay
from utils.data.images import ImageSet, Part
from utils.data.manager import DataManager, Task
from utils.run.config import RunConfig
from utils.run.errors import ConfigError

if TYPE_CHECKING:
    from learners.base import Learner

log = logging.getLogger("reprise")


def herding(features: Tensor, num_picks: int) -> list[int]:
    """Greedy choice whose running mean stays closest to the class mean (iCaRL, Rebuffi et al. 2017, Algorithm 4).

    Args:
        features: (N, D) of one class, un-augmented; rows are brought to length 1 here.
        num_picks: images wanted; at most N are picked.

    Returns:
        Positions in order of choice, so that a prefix is the best smaller set; the lower position wins a tie.
    """
    unit = features.double() / (features.double().norm(dim=1, keepdim=True) + 1e-8)
    mean, total = unit.mean(0), unit.new_zeros(unit.shape[1])
    free = torch.ones(len(unit), dtype=torch.bool)
    picks: list[int] = []
    for count in range(1, min(num_picks, len(unit)) + 1):
        distance = (mean - (unit + total) / count).norm(dim=1)
        pick = int(distance.masked_fill(~free, torch.inf).argmin())
        picks.append(pick)
        free[pick] = False
        total += unit[pick]
    return picks


def class_mean(features: Tensor) -> Tensor:
    """Mean direction of one class, (D,) of length 1, from features (N, D) of any length."""
    unit = features / (features.norm(dim=1, keepdim=True) + 1e-8)
    mean = unit.mean(0)
    return mean / mean.norm().clamp_min(1e-12)


def reservoir_slots(num_seen: int, num_new: int, capacity: int, generator: torch.Generator) -> list[tuple[int, int]]:
    """Reservoir sampling (Vitter 1985): which new items go where so that every item seen is kept equally likely.

    Args:
        num_seen: items offered before.
        num_new: items offered now, in order.
        capacity: slots.

    Returns:
        (item, slot) pairs in order; a later pair overwrites an earlier one of its slot.
    """
    slots = []
    for item in range(num_new):
        count = num_seen + item
        slot = count if count < capacity else int(torch.randint(count + 1, (1,), generator=generator))
        if slot < capacity:
            slots.append((item, slot))
    return slots


class ExemplarMemory:
    """Images of the past in order of importance per class.

    Args:
        size: images in all.
        per_class: images per class.
        fixed: True keeps ``per_class`` of each class, so that the total grows; False shares ``size`` over all seen
            classes. The name of PyCIL's key, ``fixed_memory``, says the opposite of what many read.
        handed: exemplars per class that go to the source in its own form, beside those kept here.
    """

    def __init__(self, size: int, per_class: int, fixed: bool, handed: int = 0):
        self.size, self.per_class, self.fixed, self.handed = size, per_class, fixed, handed
        self.images = ImageSet()

    def budget(self, num_seen: int) -> int:
        """Return the exemplars of each class when ``num_seen`` classes are known."""
        return self.per_class if self.fixed else self.size // num_seen

    def trim(self, budget: int) -> None:
        """Keep the first ``budget`` of every class."""
        kept = [self.images.select([label]).take(range(min(budget, count))) for label, count in self.counts().items()]
        self.images = sum(kept, ImageSet())

    def counts(self) -> dict[int, int]:
        """Count the exemplars of every class that has some."""
        return {label: int((self.images.labels == label).sum()) for label in self.images.classes}

    def drop_last(self, label: int) -> int:
        """Give up the least important exemplar of a class that has some; return its bytes, its label's among them."""
        position = int((self.images.labels == label).nonzero()[-1])
        freed = self.images.take([position]).nbytes + self.images.labels.element_size()
        self.images = self.images.take((torch.arange(len(self.images)) != position).nonzero().flatten())
        return freed

    def add(self, images: ImageSet) -> None:
        """Append images of new classes, best first."""
        self.images = self.images + images

    def state(self, data_dir: str) -> tuple[dict[str, Tensor], list]:
        """Return pixels and labels as tensors, and file paths as JSON, in few parts, for each has a header on disk.

        Args:
            data_dir: paths are kept relative to it, so that the data may be moved.
        """
        tensors, layout = {}, []
        for index, part in enumerate(self.images.merged().parts):
            tensors |= {f"labels_{index}": part.labels}
            tensors |= {f"{name}_{index}": column for name, column in part.columns.items()}
            if isinstance(part.images, Tensor):
                tensors[f"images_{index}"] = part.images
                layout.append(None)
            else:
                layout.append([os.path.relpath(path, data_dir) for path in part.images])
        return tensors, layout

    def load(self, tensors: dict[str, Tensor], layout: list, data_dir: str) -> None:
        """Take over what ``state`` gave."""
        self.images = ImageSet(
            Part(
                tensors[f"images_{index}"]
                if paths is None
                else tuple(os.path.normpath(os.path.join(data_dir, path)) for path in paths),
                tensors[f"labels_{index}"],
                {name.rpartition("_")[0]: column for name, column in tensors.items()
                 if name.endswith(f"_{index}") and not name.startswith(("labels_", "images_"))},
            )
            for index, paths in enumerate(layout)
        )  # fmt: skip


def make_memory(config: RunConfig, data: DataManager, replay: Replay, uses_exemplars: bool) -> ExemplarMemory:
    """Make room for exemplars, less what the replay takes of it.

    Raises:
        ConfigError: if the replay wants more than there is room for, or more exemplars than a class has images.
    """
    real, handed = replay.divide(config.memory_per_class if uses_exemplars else None)
    if replay.source is None or not (handed or (uses_exemplars and real != config.memory_per_class)):
        return ExemplarMemory(config.memory_size, config.memory_per_class, config.fixed_memory)
    if uses_exemplars and not config.fixed_memory:
        raise ConfigError(
            f"the source {config.synth.name!r} takes its share of a fixed number of exemplars per class, but "
            "fixed_memory=false shares memory_size over all classes: set fixed_memory=true, and memory_per_class"
        )
    counts = data.class_counts
    if real + handed > min(counts):
        label = counts.index(min(counts))
        raise ConfigError(
            f"real_per_class + syn_per_class = {real} + {handed}, but class {data.class_names[label]!r} has only "
            f"{counts[label]} training images: lower one of them"
        )
    return ExemplarMemory(config.memory_size, real, config.fixed_memory, handed)


def keep_exemplars(learner: Learner, task: Task) -> None:
    """Trim old classes to their share and add the best of the new ones (PyCIL 4.1)."""
    memory = learner.memory
    budget = memory.budget(task.num_seen)
    if not memory.fixed:
        memory.trim(budget)
    for label in task.classes:
        own = learner.present.select([label])
        if len(own) < budget and label == task.classes[0]:
            log.info(
                "Class %d has %d images, fewer than its share of %d: such classes keep all", label, len(own), budget
            )
        memory.add(own.take(learner.choose(task, label, own)[:budget]))


def handed_exemplars(learner: Learner, task: Task) -> ImageSet:
    """Return the images of the new classes that the source is to keep in its own form, best first."""
    handed, chosen = learner.memory.handed, ImageSet()
    for label in task.classes if handed else ():
        own = learner.present.select([label])
        chosen = chosen + own.take(learner.choose(task, label, own)[-handed:])
    return chosen


def update_class_means(learner: Learner) -> None:
    """Compute nearest-mean prototypes of all classes from their exemplars, by the present network.

    A class whose exemplars a budget took has none: its old mean is of another network.
    """
    images = learner.memory.images
    own = {label: images.select([label]) for label in images.classes}
    learner.class_means = {label: class_mean(learner.extract_features(part)) for label, part in own.items()}
