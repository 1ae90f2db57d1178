"""What a learner keeps of the classes that it has learned: herded exemplars, and the directions of their means."""

from __future__ import annotations

import logging

from learners.memory import ExemplarMemory, class_mean, herding
from utils.data.images import ImageSet
from utils.data.manager import Task
from utils.run.errors import ConfigError

log = logging.getLogger("reprise")


class ExemplarKeeper:
    """The part of `Learner` that chooses exemplars.

    One herding per class and task: its first picks stay images, the next ones go to a source that compresses (ESCORT).
    """

    _said_that_all_are_kept = False
    _herded: tuple[int, dict[int, list[int]]] = (-1, {})  # a task, and the picks of its classes

    def build_memory(self) -> ExemplarMemory:
        """Room for exemplars, less what the source takes of it.

        Raises:
            ConfigError: if the source wants more than there is room for, or more exemplars than a class has images.
        """
        config = self.config
        real, self.num_compressed = config.memory_per_class, 0
        if self.source is not None:
            kept = config.memory_per_class if self.uses_exemplars else None
            real, self.num_compressed = self.source.split_memory(kept, self.data)
        if self.num_compressed or real != config.memory_per_class:
            self._check_split(real)
        return ExemplarMemory(config.memory_size, real, config.fixed_memory)

    def _check_split(self, real: int) -> None:
        if self.uses_exemplars and not self.config.fixed_memory:
            raise ConfigError(
                "synth.real_per_class and syn_per_class are numbers per class, but fixed_memory=false shares "
                "memory_size over all classes: set fixed_memory=true, and memory_per_class"
            )
        counts = self.data.class_counts
        if real + self.num_compressed > min(counts):
            label = counts.index(min(counts))
            raise ConfigError(
                f"real_per_class + syn_per_class = {real} + {self.num_compressed}, but class "
                f"{self.data.class_names[label]!r} has only {counts[label]} training images: lower one of them"
            )

    def picks(self, task: Task, label: int, own: ImageSet) -> list[int]:
        """Positions of a new class's exemplars among its images, ``own``, best first: those to keep, then to compress.

        Herded once per class and task, by the network as it is at the first call.
        """
        if self._herded[0] != task.index:
            self._herded = (task.index, {})
        if label not in self._herded[1]:
            count = (self.memory.budget(task.num_seen) if self.uses_exemplars else 0) + self.num_compressed
            self._herded[1][label] = herding(self.extract_features(own), count)
        return self._herded[1][label]

    def keep_herded_exemplars(self, task: Task) -> None:
        """Trim old classes to their share and add the herded best of the new ones (PyCIL 4.1)."""
        budget = self.memory.budget(task.num_seen)
        if not self.config.fixed_memory:
            self.memory.trim(budget)
        images = self.data.train_images(task)
        for label in task.classes:
            own = images.select([label])
            self._say_if_all_are_kept(label, len(own), budget)
            self.memory.add(own.take(self.picks(task, label, own)[:budget]))

    def compressed_picks(self, task: Task) -> ImageSet:
        """The herded images of the new classes that the source is to keep in its own form, best first."""
        if not self.num_compressed:
            return ImageSet()
        images, chosen = self.data.train_images(task), ImageSet()
        for label in task.classes:
            own = images.select([label])
            chosen = chosen + own.take(self.picks(task, label, own)[-self.num_compressed :])
        return chosen

    def _say_if_all_are_kept(self, label: int, count: int, budget: int) -> None:
        if count < budget and not self._said_that_all_are_kept:
            self._said_that_all_are_kept = True
            log.info("Class %d has %d images, fewer than its share of %d: such classes keep all", label, count, budget)

    def update_class_means(self) -> None:
        """Nearest-mean prototypes of all classes from their exemplars, by the present network.

        A class whose exemplars a budget took has none: its old mean is of another network.
        """
        own = {label: self.memory.images.select([label]) for label in self.memory.images.classes}
        self.class_means = {label: class_mean(self.extract_features(images)) for label, images in own.items()}
