"""Experience replay: real exemplars of the past beside the new images."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from learners import LEARNERS
from learners.memory import keep_exemplars, reservoir_slots
from learners.pycil import PyCILLearner
from utils.data.manager import Task
from utils.run.config import Milestones
from utils.training import seeding


@LEARNERS.register("replay")
class ExperienceReplay(PyCILLearner):
    """Cross-entropy over all seen classes on new images and exemplars.

    Exemplars are herded (PyCIL; with nearest-mean predictions) or a reservoir sample of all images seen
    (Riemer et al., "Learning to Learn without Forgetting", ICLR 2019, arXiv:1810.11910, Algorithm 3).
    """

    class Config(PyCILLearner.Config):
        epochs: int = Field(70, ge=1, description="epochs of every later task")
        milestones: Milestones = Field([30, 50], description="epochs where lrate decays")
        selection: Literal["herding", "reservoir"] = Field("herding", description="which images become exemplars")

    uses_exemplars = True
    num_offered = 0  # images that the reservoir has seen
    counters = ("num_offered",)

    def after_training(self, task: Task) -> None:
        if self.config.selection == "herding":
            keep_exemplars(self, task, class_means=True)
        elif not self.config.fixed_memory:
            self._offer_to_reservoir(task)
        else:  # every image of a class has the same chance
            for label, count in enumerate(self.present.counts(task.num_seen).tolist()):
                order = torch.randperm(count, generator=seeding.generator(self.run.seed, label, "reservoir")).tolist()
                self.choices[label] = order[: self.memory.per_class + self.memory.handed]
            keep_exemplars(self, task)

    def _offer_to_reservoir(self, task: Task) -> None:
        images, memory = self.present, self.memory
        generator = seeding.generator(self.run.seed, task.index, "reservoir")
        order = torch.randperm(len(images), generator=generator).tolist()
        kept = list(range(len(memory.images)))  # positions in memory and new images, one behind the other
        for item, slot in reservoir_slots(self.num_offered, len(images), self.config.memory_size, generator):
            # A slot at the end appends, for a slice past the end is empty; any other slot is replaced.
            kept[slot : slot + 1] = [len(memory.images) + order[item]]
        memory.images = (memory.images + images).take(kept)
        self.num_offered += len(images)
