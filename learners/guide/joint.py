"""GUIDE's upper bound: its network and schedule on real images alone."""

from __future__ import annotations

from learners import LEARNERS
from learners.guide.learner import GUIDE


@LEARNERS.register("guide_joint")
class GUIDEJoint(GUIDE):
    """GUIDE's network and schedule on the real images of every class seen so far: an upper bound."""

    accepts = frozenset()
    upper_bound = True
    replay_kind = None
