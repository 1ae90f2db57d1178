"""When a search of class vectors ends: DVAR's rule on a loss whose draws are fixed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from utils.data.batches import Batch
from utils.run.config import BaseConfig
from utils.training import seeding
from utils.training.fit import Hooks, LossFunction, Step, Training, nothing


class StopConfig(BaseConfig):
    """When the search of class vectors ends before its budget; the numbers are ours, not the paper's."""

    stop_ratio: float = Field(0.0, ge=0, lt=1, description="end the search when its fixed loss's variance over the "
                              "window falls below this share of its variance so far (DVAR); 0: never")  # fmt: skip
    stop_window: int = Field(20, ge=2, le=10**6, description="evaluations of the fixed loss in the window")
    stop_every: int = Field(5, ge=1, description="steps between two evaluations")


class FixedLoss:
    """The loss of a search under draws that never change, looked at every few steps; it says when it has settled.

    Voronov et al., "Is This Loss Informative? Faster Text-to-Image Customization by Tracking Objective Dynamics",
    NeurIPS 2023, arXiv:2302.04841 (DVAR). Chance in images, prompts, noise and time steps hides in the training's loss
    that nothing moves any more; here all four are the same at every evaluation.

    Args:
        training: whose run, task and purpose key the draws.
        loss: a batch to named terms; draws from the global random generators.
        batches: of `fixed_batches`.
        config: the keys of the rule.

    Attributes:
        losses: of all evaluations.
        steps: that the training has taken.
    """

    def __init__(self, training: Training, loss: LossFunction, batches: list[Batch], config: StopConfig):
        self.training, self.loss, self.batches, self.config = training, loss, batches, config
        self.losses: list[float] = []
        self.steps = 0

    def hooks(self, before_epoch: Callable[[Step], None] = nothing) -> Hooks:
        """Return what `fit` needs to end the training by this rule, and to go on with it when it was cut off."""
        return Hooks(before_epoch, after_step=self.look, stop=self.settled, stateful={"fixed_loss": self})

    def look(self, step: Step) -> None:
        """Evaluate the loss if it is time to."""
        self.steps = step.number
        if self.steps % self.config.stop_every == 0:
            self.losses.append(self.evaluate())

    @torch.no_grad()
    def evaluate(self) -> float:
        """Return the mean loss of all fixed batches, the same in all processes."""
        run, task, purpose = self.training.run, self.training.task.index, self.training.purpose
        values = []
        for index, batch in enumerate(self.batches):
            seeding.seed_everything(run.seed, task, purpose, "fixed", index)  # `fit` seeds anew before its next step
            with run.runtime.autocast():
                values.append(sum(self.loss(batch).values()).float())
        return run.runtime.average([torch.stack(values).mean()])[0].item()

    def settled(self) -> bool:
        return settled(self.losses, self.config.stop_window, self.config.stop_ratio)

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses, self.steps = state["losses"], state["steps"]


def settled(losses: list[float], window: int, ratio: float) -> bool:
    """Whether the variance of the last ``window`` losses is below ``ratio`` times the variance of all.

    False as long as the window holds all of them.
    """
    values = torch.tensor(losses, dtype=torch.float64)
    return len(losses) > window and bool(values[-window:].var() < ratio * values.var())


def fixed_batches(moments: Tensor, labels: Tensor, batch_size: int, device: torch.device) -> list[Batch]:
    """Return whole batches of latents, as few as show every class once.

    Args:
        moments: of `encode`; a latent is the mean of an image that is not mirrored.
        labels: int64 (N,).
        batch_size: latents per batch; the last one is smaller where there are no more.
        device: where they go.
    """
    _, places, counts = labels.unique(return_inverse=True, return_counts=True)
    turn = torch.arange(len(labels)) - (counts.cumsum(0) - counts).repeat_interleave(counts)  # within its class
    order = places.argsort(stable=True)[turn.argsort(stable=True)]  # the first of every class, then the second, ...
    picks = order[: math.ceil(len(counts) / batch_size) * batch_size].split(batch_size)
    means = (moments[pick, 0].chunk(2, dim=1)[0] for pick in picks)
    return [Batch(z0.to(device), labels[pick].to(device), torch.zeros(len(pick), dtype=torch.bool, device=device))
            for pick, z0 in zip(picks, means)]  # fmt: skip
