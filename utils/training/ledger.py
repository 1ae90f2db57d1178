"""What a run costs: evaluations of networks, FLOPs, seconds and peak memory, by task and by part of the work.

A network says with `counted` which of its methods is an evaluation. While a part of a run is timed, every call of one
counts its images, and a backward pass through it counts them twice more.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial, wraps
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from utils.results.cost import Cost, Costs, as_json, join, read_costs
from utils.training.flops import count_flops
from utils.training.runtime import Runtime


def counted(method: Callable) -> Callable:
    """Make every call of a network's method an evaluation of it; calls inside it are part of this one.

    The first tensor among the arguments has a row per image.
    """

    @wraps(method)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        ledger = Ledger.current
        return method(self, *args, **kwargs) if ledger is None else ledger.evaluate(method, self, args, kwargs)

    return call


def peak_memory(device: torch.device) -> int:
    """Return bytes at the highest: those allocated on a GPU since the last call, else the process's resident set.

    That of a process only rises, and is 0 where the system does not tell it.
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    with suppress(ImportError):  # Windows
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return 0


class Ledger:
    """Costs of a run, and where new ones go: to the innermost part that is timed, of the task that is learned.

    Counts of a task come back after a kill from where its work does: what a training counted from its checkpoint, what
    was drawn onto the disk from a journal, which stays as long as checkpoints do.

    Args:
        runtime: device and processes.
        folder: for the journal of each process, `drawn_<rank>.jsonl`: a line for everything that was drawn at once.

    Attributes:
        tasks: costs of the tasks that were closed, in all processes.
    """

    current: ClassVar[Ledger | None] = None  # whose part is being timed; None inside an evaluation
    foresees = False  # whether a few steps and images stand for all; see `learners.run.forecast`

    def __init__(self, runtime: Runtime, folder: Path):
        self.runtime, self.folder = runtime, Path(folder)
        self.tasks: list[Costs] = []
        self.now: Costs = {}  # of the present task, but for what the journal has
        self.kept: dict[str, Costs] = {}  # of the present task, by what was drawn
        self._counting = self.now  # where evaluations are counted
        self._parts: list[str] = []  # that are being timed, the innermost last
        self._inside = 0.0  # seconds of the parts inside the present one
        self._flops: WeakKeyDictionary[nn.Module, dict[tuple, int]] = WeakKeyDictionary()  # per image

    def total(self) -> Costs:
        """Return the costs of all tasks together."""
        return join(*self.tasks, self.now, *self.kept.values())

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Attribute to a part what is spent inside, but for what a part inside it spends."""
        start, outside, before = time.perf_counter(), self._inside, Ledger.current
        self._look_at_memory()
        self._parts.append(name)
        self._inside, Ledger.current = 0.0, self
        try:
            yield
        finally:
            self._look_at_memory()
            spent = time.perf_counter() - start
            self.now[self._parts.pop()].seconds += spent - self._inside
            self._inside, Ledger.current = outside + spent, before

    def _look_at_memory(self) -> None:
        """Give the present part the peak since the last look."""
        peak = peak_memory(self.runtime.device)
        if self._parts:
            cost = self.now.setdefault(self._parts[-1], Cost())
            cost.peak_memory = max(cost.peak_memory, peak)

    # ------------------------------------------------------------------ evaluations

    def evaluate(self, method: Callable, network: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Call a network's method and count it."""
        tensors = list(_tensors((*args, *kwargs.values())))
        Ledger.current = None
        try:
            out, flops = self._call(partial(method, network, *args, **kwargs), network, tensors)
        finally:
            Ledger.current = self
        self._count(next(_tensors((out,)), None), len(tensors[0]), flops)
        return out

    def _call(self, call: partial, network: nn.Module, tensors: list[Tensor]) -> tuple[Any, int]:
        """Return what a call gives, and the FLOPs of a row, which are measured once per shape."""
        known, key = self._flops.setdefault(network, {}), (call.func.__name__, *(one.shape[1:] for one in tensors))
        if key in known or not len(tensors[0]):
            return call(), known.get(key, 0)
        out, flops = count_flops(call)
        known[key] = flops // len(tensors[0])
        return out, known[key]

    def _count(self, result: Tensor | None, rows: int, flops: int) -> None:
        """Count an evaluation of so many rows, and each time that a gradient comes back to its result."""
        cost = self._counting.setdefault(self._parts[-1], Cost())
        cost.add(Cost(rows, rows * flops))
        if result is not None and result.requires_grad:
            result.register_hook(lambda gradient: cost.add(Cost(2 * rows, 2 * rows * flops)))

    # ------------------------------------------------------------------ tasks

    def close_task(self) -> None:
        """End the present task: add up what all processes counted. Seconds are the first one's."""
        own = join(self.now, *self.kept.values())
        first, *others = self.runtime.share(list(range(self.runtime.shard[1])), lambda rank: own)
        for cost in chain.from_iterable(table.values() for table in others):
            cost.seconds = 0.0
        self.tasks.append(join(first, *others))
        self._begin_task()

    def _begin_task(self) -> None:
        self.now.clear()
        self.kept.clear()
        self._flops.clear()  # networks grow from task to task

    def state(self) -> list[dict[str, dict[str, Any]]]:
        """Return the costs of the closed tasks, part by part, for JSON."""
        return list(map(as_json, self.tasks))

    def report(self) -> dict[str, Any]:
        """Return for `results.json` what all tasks cost together, what each did, and whose memory had that peak."""
        whose = "GPU" if self.runtime.device.type == "cuda" else "process"
        return {"total": as_json(self.total()), "tasks": self.state(), "peak_memory_of": whose}

    def load(self, state: list[dict[str, dict[str, Any]]]) -> None:
        """Take over what ``state`` returned, and what was drawn onto the disk for the task after it."""
        self.tasks = [read_costs(costs) for costs in state]
        self._begin_task()
        if not self.runtime.is_main:
            return  # counted once
        for line in chain.from_iterable(path.read_text().splitlines() for path in self.folder.glob("drawn_*.jsonl")):
            with suppress(ValueError, TypeError, LookupError):  # cut off by a kill
                entry = json.loads(line)
                if entry["task"] == len(self.tasks):
                    self.kept[entry["name"]] = read_costs(entry["costs"])

    # ------------------------------------------------------------------ inside a task

    def counts(self) -> dict[str, list[int]]:
        """Return evaluations and FLOPs of the present task, by part, but for what the journal has."""
        return {part: [cost.evaluations, cost.flops] for part, cost in self.now.items()}

    def since(self, before: dict[str, list[int]]) -> dict[str, list[int]]:
        """Return how much ``counts`` has grown."""
        return {part: [new - old for new, old in zip(counts, before.get(part, [0, 0]))]
                for part, counts in self.counts().items()}  # fmt: skip

    def add(self, counts: dict[str, list[int]]) -> None:
        """Count what an earlier process did."""
        for part, both in counts.items():
            self.now.setdefault(part, Cost()).add(Cost(*both))

    @contextmanager
    def drawing(self, name: str) -> Iterator[None]:
        """Note what is counted inside beside what is drawn, which lies on the disk from then on under this name."""
        before, self._counting = self._counting, {}
        try:
            yield
            if self._parts:
                self.kept[name] = self._counting
                self.folder.mkdir(parents=True, exist_ok=True)
                entry = {"task": len(self.tasks), "name": name, "costs": as_json(self._counting)}
                with open(self.folder / f"drawn_{self.runtime.shard[0]}.jsonl", "a") as file:
                    file.write("\n" + json.dumps(entry))  # a new line first: the last one may have been cut off
        finally:
            self._counting = before


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)
