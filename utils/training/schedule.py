"""How long a training is, at what rate and by which optimiser."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn


@dataclass(frozen=True)
class TrainConfig:
    """What one training needs to know. Exactly one of ``epochs`` and ``steps`` is given."""

    lr: float
    epochs: int | None = None
    steps: int | None = None
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    momentum: float = 0.9  # of SGD
    weight_decay: float = 0.0
    decay_vectors: bool = True  # else biases and the parameters of norms do not decay
    schedule: Literal["constant", "step", "cosine", "linear"] = "constant"
    milestones: tuple[int, ...] = ()  # epochs after which "step" multiplies the rate by lr_decay
    lr_decay: float = 0.1
    min_lr: float = 0.0  # where "cosine" and "linear" end
    cosine_length: int | None = None  # epochs or steps until "cosine" ends, then it rises again; None: the length
    hold: int = 0  # steps that share a rate where the length is in steps; 0: each has its own
    warmup_steps: int = 0  # over which the rate rises from 0
    clip_norm: float = 0.0  # of the whole gradient; 0 turns it off
    ema_decay: float = 0.0  # per step, constant from the first; 0 keeps no average

    def __post_init__(self):
        assert (self.epochs is None) != (self.steps is None), "give epochs or steps"
        assert not (self.hold and self.epochs), "hold counts steps: give the length in steps"

    def num_steps(self, steps_per_epoch: int) -> int:
        """Return the length of the training in steps."""
        return self.steps if self.epochs is None else self.epochs * steps_per_epoch

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """Return the rate of a step, a function of position alone so that it needs no state.

        With ``epochs`` it moves once per epoch, as PyCIL's schedulers do; with ``steps`` at every step, or with
        ``hold`` whenever the number of the step, counted from 1, is a multiple of it.
        """
        position, length = (step, self.steps) if self.epochs is None else (step // steps_per_epoch, self.epochs)
        if self.hold:
            position = (step + 1) // self.hold * self.hold
        warm = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        if self.schedule == "step":
            return warm * self.lr * self.lr_decay ** sum(milestone <= position for milestone in self.milestones)
        if self.schedule == "cosine":
            length = self.cosine_length or length
            return warm * (self.min_lr + (self.lr - self.min_lr) * (1 + math.cos(math.pi * position / length)) / 2)
        if self.schedule == "linear":
            return warm * (self.lr + (self.min_lr - self.lr) * position / length)
        return warm * self.lr

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        sgd = partial(torch.optim.SGD, momentum=self.momentum)
        kind = {"sgd": sgd, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[self.optimizer]
        vectors = [] if self.decay_vectors else [value for value in parameters if value.ndim < 2]
        groups = [{"params": [value for value in parameters if self.decay_vectors or value.ndim > 1]}]
        groups += [{"params": vectors, "weight_decay": 0.0}] if vectors else []
        return kind(groups, self.lr, weight_decay=self.weight_decay, fused=True)
