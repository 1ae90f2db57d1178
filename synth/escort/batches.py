"""Batches in which a sample may be shown as a generated copy of itself, in every epoch another one."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from utils.data.batches import ImageBatches, Loading
from utils.data.images import ImageSet
from utils.data.transforms import stack_by_size
from utils.training import seeding

if TYPE_CHECKING:
    from synth.escort.copies import TrainingCopies


def swap(chances: Tensor, num_copies: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Choose which samples are shown as a copy, and as which one (ESCORT, arXiv:2311.18266).

    Args:
        chances: float (N,).
        num_copies: K.
        generator: on the CPU.

    Returns:
        bool (N,), and int64 (N,) in [0, K), drawn of all samples alike.
    """
    numbers = torch.randint(num_copies, (len(chances),), generator=generator)
    return torch.rand(len(chances), generator=generator) < chances, numbers


class CopiedBatches(ImageBatches):
    """Image batches whose samples are swapped for copies anew in every epoch.

    Copies are asked for when an epoch first shows them, and kept.

    Args:
        images, replay: the N samples, see `ImageBatches`; a sample without a real image is there as its copy 0.
        copies: of all samples, in this order.
        loading: see `Loading`.
    """

    def __init__(self, images: ImageSet, replay: ImageSet, copies: TrainingCopies, loading: Loading):
        super().__init__(images, replay, loading)
        self.copies = copies
        # Row (sample, copy) says where that copy lies among all images; -1: it was not drawn yet.
        self.row_of = torch.full((len(self.labels), copies.num_copies), -1)
        self.row_of[copies.first, 0] = copies.first
        self.num_rows = len(self.labels)
        self.copied: Tensor | None = None  # copies in memory share one store, so that a new one moves no old one's row

    def rows(self, epoch: int) -> Tensor:
        generator = seeding.generator(*self.loading.key, "copies", epoch)
        swapped, numbers = swap(self.copies.chances, self.copies.num_copies, generator)
        samples = torch.arange(len(numbers))
        absent = swapped & (self.row_of[samples, numbers] < 0)
        if absent.any():
            self._add(samples[absent], numbers[absent])
        return torch.where(swapped, self.row_of[samples, numbers], samples)

    def _add(self, samples: Tensor, numbers: Tensor) -> None:
        drawn = self.copies.draw(samples, numbers)
        self.row_of[samples, numbers] = self.num_rows + torch.arange(len(drawn))
        self.num_rows += len(drawn)
        if not self.transform.whole_batch:
            self.images = self.images + drawn
            return
        new = [pixels.to(self.device) for pixels in stack_by_size(drawn, partial(self.transform.keep, training=True))]
        real = self.stores if self.copied is None else self.stores[:-1]
        self.copied = torch.cat(new if self.copied is None else [self.copied, *new])
        self.stores = [*real, self.copied]
