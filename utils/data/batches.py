"""Batches in a known order: every epoch's permutation and every step's augmentation has its own random key.

Position alone restores an iteration, so nothing about the past has to be stored to resume it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from utils.data.images import ImageSet
from utils.data.transforms import stacks
from utils.training import seeding


@dataclass
class Batch:
    """One training step's data.

    Attributes:
        images: float (B, C, H, W) on the device, as the network wants it.
        labels: int64 (B,), in learning order, on the device.
        is_replay: bool (B,), True where the sample is of the replay: generated images of old classes.
        index: int64 (B,), number of the sample in the set that the batches were cut from.
        soft_targets: float (B, num_classes) or None.
        replay: a second batch, of old classes, that goes through the network on its own; None: there is none.
    """

    images: Tensor
    labels: Tensor
    is_replay: Tensor
    index: Tensor
    soft_targets: Tensor | None = None
    replay: Batch | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, wanted: Tensor) -> Batch:
        """The rows where the bool mask (B,) is True."""
        soft = None if self.soft_targets is None else self.soft_targets[wanted]
        return Batch(self.images[wanted], self.labels[wanted], self.is_replay[wanted], self.index[wanted], soft)


class Batches(Protocol):
    """What `fit` iterates over."""

    def __len__(self) -> int:
        """Steps per epoch."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from step ``start`` on."""

    def state_dict(self) -> dict:
        """Tensors and JSON values that position alone does not restore."""

    def load_state_dict(self, state: dict) -> None: ...


class ImageBatches:
    """Shuffled, augmented batches of images that are real, replayed or both.

    Args:
        images: what is stored: the current task, exemplars.
        replay: generated images; None for none.
        transform: `utils.data.transforms.ClassifierTransform` or its like.
        batch_size: images per batch; the last one of an epoch may be smaller.
        key: random key such as (seed, task, purpose).
        device: where batches go. Small images live there as uint8.
        shard: (rank, world size): this process takes every world-size-th image of each batch; where the batch does
            not divide, ranks with one image less weigh theirs a little more.
        drop_last: leave out what does not fill a batch, unless there is no other.
    """

    def __init__(
        self, images, replay=None, *, transform, batch_size, key, device, num_workers=0, shard=(0, 1), drop_last=False
    ):
        everything = images if replay is None else images + replay
        self.labels = everything.labels.to(device)
        self.is_replay = (torch.arange(len(everything)) >= len(images)).to(device)
        self.transform, self.batch_size, self.key, self.device = transform, batch_size, key, device
        self.num_workers, self.shard, self.drop_last = num_workers, shard, drop_last
        if transform.whole_batch:
            # Mostly one tensor; replay of another size than the real images makes a second one.
            self.stores = [pixels.to(device) for pixels in stacks(everything, partial(transform.keep, training=True))]
        else:
            self.images = everything

    def __len__(self) -> int:
        whole, rest = divmod(len(self.labels), self.batch_size)
        return whole if self.drop_last and whole else whole + (rest > 0)

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Nothing to restore: position is enough."""

    def rows(self, epoch: int) -> Tensor:
        """Where the image lies that stands for each sample in this epoch, int64 (N,)."""
        return torch.arange(len(self.labels))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        order = torch.randperm(len(self.labels), generator=seeding.generator(*self.key, "shuffle", epoch))
        picks = [self._share(pick) for pick in order.split(self.batch_size)[start : len(self)]]
        rows = self.rows(epoch)
        loaded = None if self.transform.whole_batch else self._load(picks, rows, epoch)
        for step, pick in enumerate(picks, start):
            augment = seeding.generator(*self.key, "augment", epoch, step, self.shard[0])
            images = self._take(rows[pick], augment) if loaded is None else self.transform.train(next(loaded), augment)
            pick = pick.to(self.device)
            yield Batch(images, self.labels[pick], self.is_replay[pick], pick)

    def _share(self, pick: Tensor) -> Tensor:
        """This process's part of a batch; one with fewer images than processes goes to all of them whole.

        None then has an empty batch, whose mean would not be a number, and the mean over processes stays that of one.
        """
        rank, world = self.shard
        return pick[rank::world] if len(pick) >= world else pick

    def _take(self, pick: Tensor, augment: torch.Generator) -> Tensor:
        """Augmented float (B, C, S, S): images of one size together, then all in the order of the pick."""
        pieces, places, start = [], [], 0
        for pixels in self.stores:
            place = ((pick >= start) & (pick < start + len(pixels))).nonzero().flatten()
            if len(place):
                pieces.append(pixels[(pick[place] - start).to(self.device)])
                places.append(place)
            start += len(pixels)
        if len(pieces) == 1:
            return self.transform.train(pieces[0], augment)
        if len({piece.shape[1:] for piece in pieces}) == 1:
            pieces = [torch.cat(pieces)]
        views = torch.cat([self.transform.train(piece, augment) for piece in pieces])
        return views[torch.cat(places).argsort().to(self.device)]

    def _load(self, picks: list[Tensor], rows: Tensor, epoch: int) -> Iterator[Tensor]:
        """uint8 (B, C, S, S) on the device, one per pick, decoded and cropped by workers."""
        loader = DataLoader(
            _Decoded(self.images, self.transform.load_train, (*self.key, "crop", epoch)),
            batch_sampler=[list(zip(rows[pick].tolist(), pick.tolist())) for pick in picks],
            num_workers=self.num_workers,
            pin_memory=self.device.type == "cuda",
        )
        yield from (pixels.to(self.device, non_blocking=True) for pixels in loader)


class RenewedBatches(ImageBatches):
    """A few real images beside replay that is drawn anew every so many steps, all of it in every batch.

    So GUIDE trains (Cywinski et al. 2024, arXiv:2403.03938). Between two draws the same replay meets fresh real images
    in a fresh order under fresh augmentation; a checkpoint holds it, since the classifier that bent it has moved on.

    Args:
        images: real ones, kept in memory; the rest of an epoch that does not fill a batch is left out.
        draw: the number of a step, from 0, to the replay of this step and of those up to the next draw; None: real
            images alone.
        interval: steps from one draw to the next.
        options: of `ImageBatches`; ``batch_size`` counts real images.
    """

    def __init__(self, images: ImageSet, draw: Callable[[int], ImageSet] | None, interval: int, **options):
        super().__init__(images, **options)
        self.draw, self.interval = draw, interval
        self.real = (self.stores, self.labels)
        self.replay = ImageSet()

    def __len__(self) -> int:
        return max(1, len(self.real[1]) // self.batch_size)

    def state_dict(self) -> dict:
        """The replay between two draws."""
        if not len(self.replay):
            return {}
        return {"pixels": self.replay.parts[0].images, "labels": self.replay.labels}

    def load_state_dict(self, state: dict) -> None:
        if state:
            self._renew(ImageSet.of(state["pixels"], state["labels"]))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        order = torch.randperm(len(self.real[1]), generator=seeding.generator(*self.key, "shuffle", epoch))
        for step, real in list(enumerate(order.split(self.batch_size)[: len(self)]))[start:]:
            position = epoch * len(self) + step
            if self.draw is not None and position % self.interval == 0:
                self._renew(self.draw(position))
            pick = torch.cat([real, len(order) + torch.arange(len(self.replay))])
            mixed = torch.randperm(len(pick), generator=seeding.generator(*self.key, "mix", epoch, step))
            pick = self._share(pick[mixed])
            images = self._take(pick, seeding.generator(*self.key, "augment", epoch, step, self.shard[0]))
            pick = pick.to(self.device)
            yield Batch(images, self.labels[pick], self.is_replay[pick], pick)

    def _renew(self, replay: ImageSet) -> None:
        self.replay = ImageSet.of(torch.cat([part.images for part in replay.parts]), replay.labels)
        stores, labels = self.real
        pixels = self.transform.keep(self.replay.parts[0].images, training=True)
        self.stores = [*stores, pixels.to(self.device)]
        self.labels = torch.cat([labels, replay.labels.to(self.device)])
        self.is_replay = torch.arange(len(self.labels), device=self.device) >= len(labels)


class PairedBatches:
    """Batches of the present, each with a batch of replay beside it (`Batch.replay`).

    An epoch is one of the present; replay goes round and round beneath it.

    Args:
        current: of the present.
        replay: of the old classes.
    """

    def __init__(self, current: ImageBatches, replay: ImageBatches):
        self.current, self.replay = current, replay

    def __len__(self) -> int:
        return len(self.current)

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Nothing to restore: position is enough."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        beside = self._endless(epoch * len(self) + start)
        for batch in self.current.epoch(epoch, start):
            yield replace(batch, replay=next(beside))

    def _endless(self, step: int) -> Iterator[Batch]:
        epoch, start = divmod(step, len(self.replay))
        while True:
            yield from self.replay.epoch(epoch, start)
            epoch, start = epoch + 1, 0


class _Decoded(Dataset):
    """Large images, decoded and cropped in a worker; every sample's crop has its own key, whatever image it shows."""

    def __init__(self, images: ImageSet, load, key: tuple | None):
        self.images, self.load, self.key = images, load, key

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int | tuple[int, int]) -> Tensor:
        """Of a test image its position; of a training image where it lies, and which sample it stands for."""
        if self.key is None:
            return self.load(self.images.image(place)).contiguous()
        row, sample = place
        return self.load(self.images.image(row), seeding.generator(*self.key, sample)).contiguous()


def test_batches(images: ImageSet, transform, batch_size: int, device, num_workers: int = 0) -> Iterator[Tensor]:
    """Un-augmented batches in stored order: float (B, C, S, S) on the device."""
    if len(images) == 0:
        return
    if transform.whole_batch:
        stores = stacks(images, partial(transform.keep, training=False))
        chunks = (chunk for pixels in stores for chunk in pixels.split(batch_size))
    else:
        chunks = DataLoader(_Decoded(images, transform.load_test, None), batch_size, num_workers=num_workers)
    yield from (transform.test(chunk.to(device)) for chunk in chunks)


test_batches.__test__ = False  # not one of pytest's
