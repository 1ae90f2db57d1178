"""Experiments that have ended, and the state of networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from learners.run.experiment import Experiment
from tests.support.toy import toy_experiment


def learned_toy(learner: str, folder: Path, source: str | None = None, **keys: Any) -> Experiment:
    """A `toy_experiment` that has learned all its tasks."""
    experiment = toy_experiment(learner, folder, source, **keys)
    experiment.learn_all()
    return experiment


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the state as it is now."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def count(module: nn.Module) -> int:
    """How many numbers its parameters hold."""
    return sum(parameter.numel() for parameter in module.parameters())
