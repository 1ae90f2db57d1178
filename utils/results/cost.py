"""What a part of a run costs, and in which words `results.json` and tables say so."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

# The classifier's training, the source's, what it draws for its own training, replay, evaluation, and what is none.
PARTS = ("train", "fit", "rehearse", "draw", "evaluate", "other")
TITLES = {"evaluations": "evaluations", "flops": "FLOPs", "seconds": "time", "peak_memory": "peak memory"}


@dataclass
class Cost:
    """What some work took.

    Attributes:
        evaluations: forward passes of one image, or of what stands for one; a backward pass is two more.
        flops: floating point operations: of an evaluation those of a forward pass.
        seconds: of wall time.
        peak_memory: bytes at the highest.
    """

    evaluations: int = 0
    flops: int = 0
    seconds: float = 0.0
    peak_memory: int = 0

    def add(self, other: Cost) -> None:
        self.evaluations += other.evaluations
        self.flops += other.flops
        self.seconds += other.seconds
        self.peak_memory = max(self.peak_memory, other.peak_memory)


Costs = dict[str, Cost]  # by part


def add_up(costs: Iterable[Cost]) -> Cost:
    """Return what all of them took together."""
    total = Cost()
    for cost in costs:
        total.add(cost)
    return total


def join(*tables: Costs) -> Costs:
    """Add tables up part by part, in the order of `PARTS`; parts of other names come last."""
    names = dict.fromkeys((*PARTS, *(part for table in tables for part in table)))
    found = {part: [table[part] for table in tables if part in table] for part in names}
    return {part: add_up(costs) for part, costs in found.items() if costs}


def as_json(costs: Costs) -> dict[str, dict[str, Any]]:
    """Return costs as JSON has them."""
    return {part: asdict(cost) for part, cost in costs.items()}


def read_costs(costs: dict[str, dict[str, Any]]) -> Costs:
    """Return what ``as_json`` was given."""
    return {part: Cost(**cost) for part, cost in costs.items()}


def seconds_of(costs: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return the seconds of a run by kind of work, and "total"; a source's rehearsal belongs to its fit."""
    spent = {part: cost["seconds"] for part, cost in costs.items()}
    kinds = {"train": ("train",), "fit_source": ("fit", "rehearse"), "generate": ("draw",), "evaluate": ("evaluate",)}
    seconds = {kind: sum(spent.get(part, 0.0) for part in parts) for kind, parts in kinds.items()}
    return {kind: round(value, 2) for kind, value in {**seconds, "total": sum(spent.values())}.items()}
