"""What the trainings and drawings of a run will cost, for `--plan`.

The run is gone through from task to task, with its own data, learner and source, but in each training a few steps stand
for all, in each drawing a few images, and a network that has answered once answers noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from learners.run.experiment import Experiment
from learners.run.ledger import keep_to_budget
from synth.bank import Bank
from synth.drawing import ImageFolder
from synth.replay import Features, Replay
from synth.requests import Requests
from utils.data.batches import Mixed
from utils.data.images import ImageSet
from utils.data.manager import Task
from utils.results.cost import Cost
from utils.results.figures import human_count
from utils.training.ledger import Ledger

T = TypeVar("T")


class Forecast(Ledger):
    """Counts by few steps, images and rows, and computes nothing twice.

    Attributes:
        steps: of a training that are taken.
        rows: of what a network is first given, and images of a drawing.
    """

    foresees = True
    steps, rows = 4, 8

    def __init__(self, *args: Any):
        super().__init__(*args)
        # By network and kind of call: shape of a row, whether it has a gradient, FLOPs.
        self._answers: WeakKeyDictionary[nn.Module, dict[tuple, tuple[torch.Size, bool, int]]] = WeakKeyDictionary()

    def times(self, factor: float, work: Callable[[], T]) -> T:
        """Do some work and count it so many times."""
        before = self.counts()
        result = work()
        for part, counted in self.since(before).items():
            self.now[part].add(Cost(*(round(count * (factor - 1)) for count in counted)))
        return result

    def forget(self) -> None:
        """Ask every network again: it has grown."""
        self._answers.clear()
        self._flops.clear()

    def _call(self, call: partial, network: nn.Module, tensors: list[Tensor]) -> tuple[Any, int]:
        if not len(tensors[0]) or any(isinstance(one, Mixed) for one in call.args):  # no images, or features among them
            return super()._call(call, network, tensors)
        gradients = torch.is_grad_enabled(), *(one.requires_grad for one in tensors)
        known = self._answers.setdefault(network, {})
        key = call.func.__name__, gradients, *(one.shape[1:] for one in tensors)
        if key not in known:
            few = partial(self._few, len(tensors[0]))
            first = partial(call.func, *map(few, call.args), **{name: few(one) for name, one in call.keywords.items()})
            out, flops = super()._call(first, network, list(map(few, tensors)))
            if not isinstance(out, Tensor):
                return call(), flops
            known[key] = out.shape[1:], out.requires_grad, flops
        shape, has_gradient, flops = known[key]
        out = torch.randn(len(tensors[0]), *shape, device=tensors[0].device)
        # A sampler that is bent asks for the gradient with respect to what the network is given.
        out = sum((0 * one.sum() for one in tensors if one.requires_grad), out)
        return out.requires_grad_() if has_gradient and not out.requires_grad else out, flops

    def _few(self, rows: int, one: Any) -> Any:
        """Return the first rows of whatever has as many."""
        return one[: self.rows] if isinstance(one, Tensor) and one.ndim and len(one) == rows else one

    def _count(self, result: Any, rows: int, flops: int) -> None:
        times = rows * (3 if result is not None and result.requires_grad else 1)
        self.now.setdefault(self._parts[-1], Cost()).add(Cost(times, times * flops))


class BlankBank(Bank):
    """Black images in the place of those that a run draws and keeps."""

    def fill(self, index: int, later: int | None = None) -> ImageFolder:
        return ImageFolder(self._folder(index), self.run, {}, "")  # in which nothing is drawn

    def stored(self, classes: Iterable[int]) -> ImageSet:
        labels = [label for label in classes for _ in range(self.per_class(label))]
        side = getattr(self.source, "image_shape", (self.data.dataset.image_size,))[-1]
        pixels = torch.zeros(1, self.data.dataset.channels, side, side, dtype=torch.uint8)
        images = pixels.expand(len(labels), -1, -1, -1)  # which takes the memory of one
        return ImageSet.of(images, torch.tensor(labels)) if labels else ImageSet()

    def redraw(self, index: int) -> ImageSet:
        return self.stored(label for label, task in self.task_of.items() if task < index)


def describe_cost(experiment: Experiment) -> Iterator[str]:
    """Yield a line per part of a run that is planned."""
    yield "Cost per seed, about, without evaluation:"
    with TemporaryDirectory() as folder:
        yield from _describe(experiment.elsewhere(Path(folder)))


def _describe(experiment: Experiment) -> Iterator[str]:
    learner = experiment.check()
    replay, source, run = learner.replay, learner.replay.source, experiment.run
    run.ledger = ledger = Forecast(run.runtime, run.folder)
    if source is not None and replay.learns and source.step_flops is None:
        yield f"  not foreseen of {source.config.name}, which is published and is not loaded for a plan"
        return
    if hasattr(replay, "bank"):
        replay.bank = BlankBank(replay.bank.root, source, learner.data)
    try:
        for task in learner.data.tasks():
            ledger.forget()
            learner.learn_task(task)
            keep_to_budget(learner, task.index)
        if replay.learns and not isinstance(replay, Features):  # of which all were drawn
            _count_drawing(replay, task, ledger)
    except Exception as error:  # a learner may ask for whatever a run alone has, and a plan must not end with it
        yield f"  not foreseen ({error or type(error).__name__})"
        return
    for part in ("train", "fit", "rehearse", "draw"):
        if (cost := ledger.now.get(part, Cost())).evaluations:
            yield f"  {part}: {human_count(cost.evaluations)} evaluations, {human_count(cost.flops)} FLOPs"


def _count_drawing(replay: Replay, task: Task, ledger: Forecast) -> None:
    """Draw one image as the last task's training would, and count it as often as a run is expected to."""
    ledger.now.pop("draw", None)
    if count := replay.expected():
        one = Requests.of_classes(sorted(replay.source.fitted_classes)[:1], 1, ("forecast",))
        with ledger.part("draw"):
            ledger.times(count, lambda: replay.try_drawing(task, one))
