"""Real images beside replay that is drawn anew inside the training."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from utils.data.batches import Batch, ImageBatches, Loading
from utils.data.images import ImageSet
from utils.training import seeding


class RenewedBatches(ImageBatches):
    """A few real images beside replay that is drawn anew every so many steps, all of it in every batch.

    So GUIDE trains (Cywinski et al., 2024, arXiv:2403.03938). Between two draws the same replay meets fresh real images
    in a fresh order under fresh augmentation; a checkpoint holds it, since the classifier that bent it has moved on.

    Args:
        images: real ones, kept in memory; the rest of an epoch that does not fill a batch is left out.
        draw: the number of a step, from 0, to the replay of this step and of those up to the next draw; None: real
            images alone.
        interval: steps from one draw to the next.
        loading: see `Loading`; its ``batch_size`` counts real images.
    """

    def __init__(self, images: ImageSet, draw: Callable[[int], ImageSet] | None, interval: int, loading: Loading):
        super().__init__(images, None, loading)
        self.draw, self.interval = draw, interval
        self.real_stores, self.real_labels = self.stores, self.labels
        self.replay = ImageSet()

    def __len__(self) -> int:
        return max(1, len(self.real_labels) // self.loading.batch_size)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the replay between two draws."""
        return {"pixels": self.replay.parts[0].images, "labels": self.replay.labels} if len(self.replay) else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state:
            self._renew(ImageSet.of(state["pixels"], state["labels"]))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        key = self.loading.key
        order = torch.randperm(len(self.real_labels), generator=seeding.generator(*key, "shuffle", epoch))
        for step, real in list(enumerate(order.split(self.loading.batch_size)[: len(self)]))[start:]:
            position = epoch * len(self) + step
            if self.draw is not None and position % self.interval == 0:
                self._renew(self.draw(position))
            pick = torch.cat([real, len(order) + torch.arange(len(self.replay))])
            mixed = torch.randperm(len(pick), generator=seeding.generator(*key, "mix", epoch, step))
            pick = self.share(pick[mixed])
            augment = seeding.generator(*key, "augment", epoch, step, self.loading.shard[0])
            yield self.batch(self.take(pick, augment), pick)

    def _renew(self, replay: ImageSet) -> None:
        self.replay = ImageSet.of(torch.cat([part.images for part in replay.parts]), replay.labels)
        pixels = self.transform.keep(self.replay.parts[0].images, training=True)
        self.stores = [*self.real_stores, pixels.to(self.device)]
        self.labels = torch.cat([self.real_labels, replay.labels.to(self.device)])
        self.is_replay = torch.arange(len(self.labels), device=self.device) >= len(self.real_labels)
