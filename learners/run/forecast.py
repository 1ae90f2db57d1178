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

import torch
from torch import Tensor, nn

from learners.run.experiment import Experiment
from synth.bank import Bank
from synth.drawing import ImageFolder
from synth.replay import Features, Replay
from synth.requests import Requests
from utils.data.images import ImageSet
from utils.data.manager import DataManager, Task
from utils.results.cost import Cost
from utils.results.figures import human_count
from utils.training.ledger import Ledger

PARTS = ("train", "fit", "rehearse", "draw")
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
        self._answers: dict[tuple, tuple[torch.Size, bool, int]] = {}  # shape of a row, whether it has a gradient

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
        if not len(tensors[0]) or isinstance(call.args[1], tuple):  # no images, or features among them
            return super()._call(call, network, tensors)
        gradients = torch.is_grad_enabled(), *(one.requires_grad for one in tensors)
        key = id(network), call.func.__name__, gradients, *(one.shape[1:] for one in tensors)
        if key not in self._answers:
            few = partial(self._few, len(tensors[0]))
            first = partial(call.func, *map(few, call.args), **{name: few(one) for name, one in call.keywords.items()})
            out, flops = super()._call(first, network, list(map(few, tensors)))
            if not isinstance(out, Tensor):
                return call(), flops
            self._answers[key] = out.shape[1:], out.requires_grad, flops
        shape, has_gradient, flops = self._answers[key]
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
        return black_images(self.data, {label: self.per_class(label) for label in classes})

    def redraw(self, index: int) -> ImageSet:
        return self.stored(label for label, task in self.task_of.items() if task < index)


class Unasked(Replay):
    """Black images of the past, of a published generator that is not built for a plan."""

    def past(self, task: Task) -> ImageSet:
        wanted, counts = self.config.syn_per_class, self.data.class_counts[: task.num_old]
        return black_images(self.data, {label: wanted or count for label, count in enumerate(counts)})


def black_images(data: DataManager, counts: dict[int, int]) -> ImageSet:
    """Return so many black images of each class, which take the memory of one."""
    labels = torch.tensor([label for label, count in counts.items() for _ in range(count)], dtype=torch.int64)
    side = data.dataset.image_size
    pixels = torch.zeros(1, data.dataset.channels, side, side, dtype=torch.uint8)
    return ImageSet.of(pixels.expand(len(labels), -1, -1, -1), labels) if len(labels) else ImageSet()


def describe_cost(experiment: Experiment) -> Iterator[str]:
    """Yield a line per part of a run that is planned."""
    yield "Cost per seed, about, without evaluation:"
    with TemporaryDirectory() as folder:
        yield from _describe(experiment.elsewhere(Path(folder)))


def _describe(experiment: Experiment) -> Iterator[str]:
    learner = experiment.check()
    replay, source, run = learner.replay, learner.replay.source, experiment.run
    run.ledger = ledger = Forecast(run.runtime, run.folder)
    published = source is not None and replay.learns and source.step_flops is None
    if published:
        learner.replay = Unasked(experiment.config, source, learner.data, run, replay.folder)
        learner.replay.learns = False
    elif hasattr(replay, "bank"):
        replay.bank = BlankBank(replay.bank.root, source, learner.data)
    one = Requests.of_classes([0], 1, ("forecast",))
    try:
        for task in learner.data.tasks():
            ledger.forget()
            learner.learn_task(task)
    except Exception as error:  # a learner may ask for whatever a run alone has, and a plan must not end with it
        yield f"  not foreseen ({error or type(error).__name__})"
        return
    if replay.learns and not published and not isinstance(replay, Features):  # of which all were drawn
        ledger.now.pop("draw", None)
        with ledger.part("draw"):
            ledger.times(replay.expected(), lambda: replay.try_drawing(task, one))
    yield from (_line(part, cost) for part in PARTS if (cost := ledger.now.get(part, Cost())).evaluations)
    if published:
        yield f"  fit, draw: not foreseen of {source.config.name}"


def _line(part: str, cost: Cost) -> str:
    return f"  {part}: {human_count(cost.evaluations)} evaluations, {human_count(cost.flops)} FLOPs"
