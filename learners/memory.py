"""Exemplars: which images of the past are kept, and how many (PyCIL's meaning of ``memory_*``)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from synth.replay import Replay
from utils.data.images import ImageSet, Part
from utils.data.manager import DataManager, Task
from utils.run.config import RunConfig
from utils.run.errors import ConfigError
from utils.run.log import log

if TYPE_CHECKING:
    from learners.base import Learner


def herding(features: Tensor, num_picks: int) -> list[int]:
    """Pick images whose running mean stays closest to the class mean (iCaRL, Rebuffi et al. 2017, Algorithm 4).

    Args:
        features: (N, D) of one class, un-augmented; rows are brought to length 1 here.
        num_picks: images wanted; at most N are picked.

    Returns:
        Positions in order of choice, so that a prefix is the best smaller set; the lower position wins a tie.
    """
    unit = features.double() / (features.double().norm(dim=1, keepdim=True) + 1e-8)
    mean, total = unit.mean(0), unit.new_zeros(unit.shape[1])
    picks: list[int] = []
    for count in range(1, min(num_picks, len(unit)) + 1):
        distance = (mean - (unit + total) / count).norm(dim=1)
        distance[picks] = torch.inf
        picks.append(int(distance.argmin()))
        total += unit[picks[-1]]
    return picks


def class_mean(features: Tensor) -> Tensor:
    """Compute the mean direction of one class, (D,) of length 1, from features (N, D) of any length."""
    unit = features / (features.norm(dim=1, keepdim=True) + 1e-8)
    return F.normalize(unit.mean(0), dim=0)


def reservoir_slots(num_seen: int, num_new: int, size: int, generator: torch.Generator) -> Iterator[tuple[int, int]]:
    """Say which new items go where so that every item seen is kept equally likely (reservoir, Vitter 1985).

    Args:
        num_seen: items offered before.
        num_new: items offered now, in order.
        size: slots in all.

    Yields:
        (item, slot) pairs in order; a later pair overwrites an earlier one of its slot.
    """
    for item in range(num_new):
        count = num_seen + item
        slot = count if count < size else int(torch.randint(count + 1, (1,), generator=generator))
        if slot < size:
            yield item, slot


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

    def counts(self) -> dict[int, int]:
        """Count the exemplars of every class that has some."""
        return {label: int((self.images.labels == label).sum()) for label in self.images.classes}

    def drop_last(self, label: int, count: int = 1) -> int:
        """Give up the least important exemplars of a class that has so many; return their bytes, with their labels'."""
        positions = (self.images.labels == label).nonzero().flatten()[-count:]
        freed = self.images.take(positions).nbytes + count * self.images.labels.element_size()
        stays = torch.ones(len(self.images), dtype=torch.bool).index_fill(0, positions, False)
        self.images = self.images.take(stays.nonzero().flatten())
        return freed

    def state(self, data_dir: str) -> tuple[dict[str, Tensor], list]:
        """Return pixels and labels as tensors, and file paths as JSON, in few parts, for each has a header on disk.

        Args:
            data_dir: paths are kept relative to it, so that the data may be moved.
        """
        tensors, layout = {}, []
        for index, part in enumerate(self.images.merged().parts):
            columns, in_memory = {"labels": part.labels, **part.columns}, isinstance(part.images, Tensor)
            if in_memory:
                columns["images"] = part.images
            tensors |= {f"{name}_{index}": column for name, column in columns.items()}
            layout.append(None if in_memory else [os.path.relpath(path, data_dir) for path in part.images])
        return tensors, layout

    def load(self, tensors: dict[str, Tensor], layout: list, data_dir: str) -> None:
        """Take over what ``state`` gave."""
        parts = []
        for index, paths in enumerate(layout):
            ending = f"_{index}"
            columns = {name.removesuffix(ending): tensors[name] for name in tensors if name.endswith(ending)}
            labels, images = columns.pop("labels"), columns.pop("images", None)
            if paths is not None:
                images = tuple(os.path.normpath(os.path.join(data_dir, path)) for path in paths)
            parts.append(Part(images, labels, columns))
        self.images = ImageSet(parts)


def make_memory(config: RunConfig, data: DataManager, replay: Replay, uses_exemplars: bool) -> ExemplarMemory:
    """Make room for exemplars, less what the replay takes of it.

    Raises:
        ConfigError: if the replay wants more than there is room for, or more exemplars than a class has images.
    """
    if replay.replaces_exemplars:
        return ExemplarMemory(0, 0, config.fixed_memory)
    real, handed = replay.divide(config.memory_per_class if uses_exemplars else None)
    shared = handed or (uses_exemplars and real != config.memory_per_class)
    if shared and uses_exemplars and not config.fixed_memory:
        remedy = "set it, and fixed_memory=true"
        raise ConfigError(f"the source {config.synth.name!r} takes its share of memory_per_class: {remedy}")
    if shared and real + handed > min(data.class_counts):
        count, name = min(zip(data.class_counts, data.class_names))
        remedy = f"lower real_per_class={real} or syn_per_class={handed}"
        raise ConfigError(f"class {name!r} has only {count} training images: {remedy}")
    return ExemplarMemory(config.memory_size, real, config.fixed_memory, handed)


def keep_exemplars(learner: Learner, task: Task, class_means: bool = False) -> None:
    """Trim old classes to their share and add the best of the new ones (PyCIL 4.1).

    Args:
        learner: has just trained.
        task: that it trained on.
        class_means: also compute nearest-mean prototypes of all classes from their exemplars, by the present network.
            A class whose exemplars a budget took has none: its old mean is of another network.
    """
    memory, budget = learner.memory, learner.memory.budget(task.num_seen)
    if not memory.fixed:
        memory.images = memory.images.first_of_each(budget)
    for label in task.classes:
        own, picks = _choose(learner, task, label)
        if len(own) < budget and label == task.classes[0]:
            log.info("Class %d has %d images, its share is %d: such classes keep all", label, len(own), budget)
        memory.images += own.take(picks[:budget])
    if class_means:
        own = {label: memory.images.select([label]) for label in memory.images.classes}
        learner.class_means = {label: class_mean(learner.extract_features(part)) for label, part in own.items()}


def handed_exemplars(learner: Learner, task: Task) -> ImageSet:
    """Return the images of the new classes that the source is to keep in its own form, best first."""
    handed = learner.memory.handed
    chosen = (_choose(learner, task, label) for label in task.classes if handed)
    return sum((own.take(picks[-handed:]) for own, picks in chosen), ImageSet())


def _choose(learner: Learner, task: Task, label: int) -> tuple[ImageSet, list[int]]:
    """Return a new class's images and the positions of its exemplars among them, best first.

    Unless the learner has made its choice, a class is herded once per task, by the network as it is at the first call:
    the first picks stay images, the next ones are handed to the source.
    """
    own = learner.present.select([label])
    if label not in learner.choices:
        count = (learner.memory.budget(task.num_seen) if learner.uses_exemplars else 0) + learner.memory.handed
        learner.choices[label] = herding(learner.extract_features(own), count)
    return own, learner.choices[label]
