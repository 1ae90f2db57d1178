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
    from synth.escort.copies import Copied


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

    Copies are asked for when an epoch first shows them, and kept. With ``prepare: all`` they are drawn beforehand.

    Args:
        present: real images, each shown as a copy with ``augmentation_prob``.
        past: compressed exemplars as their copies 0, of which there is no other image: their items name the maps.
        replay: draws copies.
        loading: see `Loading`.
    """

    def __init__(self, present: ImageSet, past: ImageSet, replay: Copied, loading: Loading):
        super().__init__(present, past, loading)
        self.replay, config, samples = replay, replay.config, present + past
        self.items, self.num_copies = samples.items(), config.augmentations_per_image
        real = self.items < 0
        self.chances = torch.where(real, config.augmentation_prob, 1.0)
        if config.augmentation_prob and real.any():
            self.items[real] = replay.source.read(samples.take(real.nonzero().flatten()))
        if config.prepare == "all":
            shown = (self.chances > 0).nonzero().flatten()
            self._draw(shown.repeat(self.num_copies), torch.arange(self.num_copies).repeat_interleave(len(shown)))
        # Row (sample, copy) says where that copy lies among all images; -1: it was not drawn yet.
        self.row_of = torch.full((len(samples), self.num_copies), -1)
        self.row_of[~real, 0] = (~real).nonzero().flatten()
        self.num_rows = len(samples)
        self.copied: Tensor | None = None  # copies in memory share one store, so that a new one moves no old one's row

    def rows(self, epoch: int) -> Tensor:
        generator = seeding.generator(*self.loading.key, "copies", epoch)
        swapped, numbers = swap(self.chances, self.num_copies, generator)
        samples = torch.arange(len(numbers))
        absent = swapped & (self.row_of[samples, numbers] < 0)
        if absent.any():
            self._add(samples[absent], numbers[absent])
        return torch.where(swapped, self.row_of[samples, numbers], samples)

    def _draw(self, samples: Tensor, numbers: Tensor) -> ImageSet:
        """Return the copies of these numbers, int64 (M,), of these samples, int64 (M,), in their order."""
        return self.replay.copies(self.replay.source.ask(self.labels.cpu()[samples], self.items[samples], numbers))

    def _add(self, samples: Tensor, numbers: Tensor) -> None:
        drawn = self._draw(samples, numbers)
        self.row_of[samples, numbers] = self.num_rows + torch.arange(len(drawn))
        self.num_rows += len(drawn)
        if not self.transform.whole_batch:
            self.images = self.images + drawn
            return
        new = [pixels.to(self.device) for pixels in stack_by_size(drawn, partial(self.transform.keep, training=True))]
        real = self.stores if self.copied is None else self.stores[:-1]
        self.copied = torch.cat(new if self.copied is None else [self.copied, *new])
        self.stores = [*real, self.copied]
