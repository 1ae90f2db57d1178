"""What the training of a DDPM will be, foreseen for `--plan`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from synth.base import Foreseen
from synth.ddpm.rehearsal import num_rehearsed
from utils.data.batches import Batch
from utils.data.manager import Task

if TYPE_CHECKING:
    from synth.ddpm.source import DDPM

ROWS = 8  # images whose loss is tried


def foresee(source: DDPM, task: Task, num_images: int, num_replayed: int) -> Foreseen:
    """See `ReplaySource.foresee`."""
    config, new, old, batch_size = source.config, num_images, num_replayed, source.config.batch_size
    rehearsed, real, draw = 0, ROWS, source.generate
    if task.index and config.draws_anew:
        old, batch_size = 0, source.num_real(task)
        real = max(1, ROWS // (task.index + 1))
    elif config.rehearsal in ("own", "distil") or (config.rehearsal == "replay" and not num_replayed):
        old = rehearsed = num_rehearsed(config, task.index, num_images)
        draw = partial(source.draw, sampling=source.rehearsal_sampling)
    teacher = source.make_teacher(real * task.index if config.draws_anew else 0) if task.index else None
    is_replay = torch.arange(real) < round(real * old / (new + old))
    images = torch.zeros(real, *source.image_shape, device=source.run.device)
    batch = Batch(images, torch.zeros(real, dtype=torch.int64), is_replay)

    def step() -> None:
        source.teacher = teacher
        source.loss(batch)

    whole = config.counts == "reference"
    return Foreseen(source.train_config(task.index), new + old, batch_size, whole, rehearsed, step, real, draw)
