"""What is asked of a replay source: labels, items and copies, each sample with a seed of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.training import seeding


@dataclass(frozen=True)
class Requests:
    """What to generate: N samples, each with a seed of its own.

    Attributes:
        labels: int64 (N,), classes in learning order.
        item: int64 (N,), exemplar to start from, -1 for none.
        copy: int64 (N,), tells apart samples of one class and item.
        key: (run seed, source, task): with label, item and copy it makes the seed of a sample, whatever else is
            asked for and in whatever order.
    """

    labels: Tensor
    item: Tensor
    copy: Tensor
    key: tuple[int | str, ...]

    @classmethod
    def of_classes(cls, classes: list[int], per_class: int, key: tuple[int | str, ...]) -> Requests:
        """Ask for the same number of samples of every class, class by class."""
        labels = torch.tensor(classes, dtype=torch.int64).repeat_interleave(per_class)
        return cls(labels, torch.full_like(labels, -1), torch.arange(per_class).repeat(len(classes)), key)

    @classmethod
    def of_labels(cls, labels: Tensor, key: tuple[int | str, ...]) -> Requests:
        """Ask for one sample per label, int64 (N,), all told apart by their numbers."""
        return cls(labels, torch.full_like(labels, -1), torch.arange(len(labels)), key)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, positions: Tensor) -> Requests:
        """Return only these requests, in this order."""
        return Requests(self.labels[positions], self.item[positions], self.copy[positions], self.key)

    def chunks(self, size: int) -> Iterator[Requests]:
        """Cut into pieces of ``size`` requests by position: the same ones on one process and on many."""
        yield from (self.take(positions) for positions in torch.arange(len(self)).split(size))

    def generators(self) -> list[torch.Generator]:
        """Make one CPU generator per sample."""
        rows = zip(self.labels.tolist(), self.item.tolist(), self.copy.tolist())
        return [seeding.generator(*self.key, *row) for row in rows]


def draw_noise(generators: list[torch.Generator], shape: tuple[int, ...]) -> Tensor:
    """Draw standard normal noise, (N, *shape), each row from its own generator.

    It is drawn on the CPU, so that a seed means the same noise on every device.
    """
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def draw_labels(classes: list[int], count: int, generator: torch.Generator, balanced: bool) -> Tensor:
    """Draw labels to ask for, int64 (count,).

    Args:
        classes: at least one.
        count: of labels.
        generator: on the CPU.
        balanced: equal counts of every class, the remainder going to classes drawn by chance; else each label is drawn
            by itself, as Cywinski et al. do (2024, arXiv:2403.03938).
    """
    known = torch.tensor(classes)
    if not balanced:
        return known[torch.randint(len(known), (count,), generator=generator)]
    rest = torch.randperm(len(known), generator=generator)[: count % len(known)].sort().values
    return torch.cat([known.repeat_interleave(count // len(known)), known[rest]])
