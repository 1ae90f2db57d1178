"""What a checkpoint holds of a learner and its replay: file stem -> tensors, and JSON."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from learners.base import Learner
from models.frozen import Frozen


def learner_state(learner: Learner) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Collect everything that the next task needs but the source."""
    exemplars, layout = learner.memory.state(learner.config.data_dir)
    frozen = [module for module in learner.network.modules() if isinstance(module, Frozen)]
    return {
        "network": learner.network.state_dict(), "exemplars": exemplars, "extra": learner.extra_state(),
        "class_means": {str(label): mean for label, mean in learner.class_means.items()},
    }, {
        **learner.network.layout(), "exemplars": layout, "replay": learner.replay.state_dict(),
        "holds_backbone": all(module.learned for module in frozen)}  # fmt: skip


def restore_learner(learner: Learner, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    """Take over what ``learner_state`` gave; the learner must be new."""
    learner.network.rebuild(state)
    learner.network.load_state_dict(tensors["network"])
    learner.old_network = learner.network.frozen_copy()
    learner.memory.load(tensors["exemplars"], state["exemplars"], learner.config.data_dir)
    learner.class_means = {int(label): mean for label, mean in tensors["class_means"].items()}
    learner.load_extra_state(tensors["extra"])
    learner.replay.load_state_dict(state["replay"])
