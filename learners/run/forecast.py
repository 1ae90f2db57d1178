"""What the trainings and drawings of a run will cost, for `--plan`: a step and an image of each, times their number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from learners.base import Learner
from synth.requests import Requests
from utils.data.batches import Batch
from utils.data.images import ImageSet
from utils.data.manager import Task
from utils.results.cost import Cost, add_up
from utils.results.figures import human_count
from utils.training.ledger import Ledger
from utils.training.schedule import TrainConfig

ROWS = 8  # images of a classifier's step that is tried


class Forecast(Ledger):
    """Counts without computing: a network that has answered once answers zeros, and every gradient is taken."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._answers: dict[tuple, tuple[torch.Size, bool, int]] = {}  # shape of a row, whether it has a gradient

    def of(self, work: Callable[[], object]) -> Cost:
        """Return what some work costs."""
        self.now.clear()
        with self.part("forecast"):
            work()
        return add_up(self.now.values())

    def forget(self) -> None:
        """Ask every network again: it has grown."""
        self._answers.clear()
        self._begin_task()

    def _call(self, call: partial, network: nn.Module, tensors: list[Tensor]) -> tuple[Tensor, int]:
        gradients = torch.is_grad_enabled(), *(one.requires_grad for one in tensors)
        key = id(network), call.func.__name__, gradients, *(one.shape[1:] for one in tensors)
        if key not in self._answers:
            out, flops = super()._call(call, network, tensors)
            self._answers[key] = out.shape[1:], out.requires_grad, flops
            return out, flops
        shape, has_gradient, flops = self._answers[key]
        out = torch.zeros(len(tensors[0]), *shape, device=tensors[0].device)
        # A sampler that is bent asks for the gradient with respect to what the network is given.
        out = sum((0 * one.sum() for one in tensors if one.requires_grad), out)
        return out.requires_grad_() if has_gradient and not out.requires_grad else out, flops

    def _count(self, result: Tensor, rows: int, flops: int) -> None:
        times = rows * (3 if result.requires_grad else 1)
        self.now.setdefault("forecast", Cost()).add(Cost(times, times * flops))


def describe_cost(learner: Learner) -> Iterator[str]:
    """Yield a line per part of a run; the learner and its source serve nothing else afterwards."""
    yield "Cost per seed, about, without evaluation:"
    replay, source, data = learner.replay, learner.replay.source, learner.data
    tasks = [data.task(index) for index in range(data.num_tasks)]
    learner.run.ledger = forecast = Forecast(learner.run.runtime, learner.run.folder)
    try:
        yield _line("train", add_up(_training(learner, task, forecast) for task in tasks))
    except Exception as error:  # a loss may ask for whatever a run alone has, and a plan must not end with it
        yield f"  train: not foreseen ({error or type(error).__name__})"
    if not replay.learns:
        return
    if source.foresee is None:
        yield f"  fit, draw: not foreseen of {source.config.name}"
        return
    source.fitted_classes, one = set(range(data.num_classes)), Requests.of_classes([0], 1, ("forecast",))
    fits, rehearsals = [], []
    waits = source.learns_after and not source.config.fit_after_last_task
    for task in tasks[: len(tasks) - waits] if replay.pupil is source else ():
        real = sum(data.class_counts[label] for label in task.classes)
        training = source.foresee(task, real, replay.old_samples()[task.index] if source.wants_past else 0)
        shown = num_shown(training.config, training.samples, training.batch_size, training.whole)
        fits.append(_times(forecast.of(training.step), shown / training.rows))
        rehearsals.append(_times(forecast.of(partial(training.draw, one)), training.rehearsed))
    if fits:
        yield _line("fit", add_up(fits))
    if (rehearse := add_up(rehearsals)).evaluations:
        yield _line("rehearse", rehearse)
    if count := replay.expected():
        yield _line("draw", _times(forecast.of(partial(replay.try_drawing, tasks[-1], one)), count))


def _training(learner: Learner, task: Task, forecast: Forecast) -> Cost:
    """Foresee the classifier's training on a task; it must have been done for all tasks before."""
    counts, memory, shown = learner.data.class_counts, learner.memory, learner.replay.num_shown(task)
    if shown is None or (type(learner).batches is not Learner.batches and learner.replay_kind is None):
        raise NotImplementedError("its batches are its own")
    new, old = (sum(counts[: task.num_seen]), 0) if learner.upper_bound else shown
    if learner.uses_exemplars and task.num_old:
        new += sum(min(memory.budget(task.num_old), count) for count in counts[: task.num_old])
    learner.grow_network(task)
    forecast.forget()
    learner.past = ImageSet.of(torch.zeros(old, 1, 1, 1, dtype=torch.uint8), torch.zeros(old, dtype=torch.int64))
    replayed, size = torch.arange(ROWS) < round(ROWS * old / (new + old)), learner.transform.size
    batch = Batch(torch.zeros(ROWS, 3, size, size), torch.where(replayed, 0, task.num_old), replayed)
    cost = forecast.of(partial(learner.compute_loss, batch, task))
    learner.old_network = learner.network.frozen_copy()
    whole = learner.replay.whole_batches
    return _times(cost, num_shown(learner.train_config(task), new + old, learner.config.batch_size, whole) / ROWS)


def num_shown(config: TrainConfig, samples: int, batch_size: int, whole: bool) -> float:
    """Count the images that a training shows, one as often as it is shown.

    Args:
        config: of the training.
        samples: of an epoch.
        batch_size: of a step.
        whole: whether each step has so many, or an epoch's last one fewer.
    """
    steps = max(1, samples // batch_size) if whole else math.ceil(samples / batch_size)
    return config.num_steps(steps) * (batch_size if whole else samples / steps)


def _times(cost: Cost, factor: float) -> Cost:
    return Cost(round(cost.evaluations * factor), round(cost.flops * factor))


def _line(part: str, cost: Cost) -> str:
    return f"  {part}: {human_count(cost.evaluations)} evaluations, {human_count(cost.flops)} FLOPs"
