"""GUIDE's upper bound: its network and schedule on real images alone."""

from __future__ import annotations

from learners import LEARNERS
from learners.guide.learner import GUIDE
from utils.data.images import ImageSet
from utils.data.manager import Task


@LEARNERS.register("guide_joint")
class GUIDEJoint(GUIDE):
    """GUIDE's network and schedule on the real images of every class seen so far: an upper bound."""

    accepts = frozenset()
    upper_bound = True
    guides = False

    def current_images(self, task: Task) -> ImageSet:
        return self.data.all_seen_images(task)

    def num_real(self, task: Task) -> int:
        return sum(self.data.class_counts[: task.num_seen])
