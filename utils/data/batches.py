"""Batches in a known order: every epoch's permutation and every step's augmentation has its own random key.

Position alone restores an iteration, so nothing about the past has to be stored to resume it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from utils.data.images import FeatureSet, ImageSet, Samples
from utils.data.transforms import stack_by_size
from utils.training import seeding


class Mixed(NamedTuple):
    """Images and, for the samples behind them, features in their place; an `IncrementalNet` takes both."""

    images: Tensor  # float (B - R, C, H, W)
    features: Tensor  # float (R, D)


@dataclass
class Batch:
    """One training step's data.

    Attributes:
        images: float (B, C, H, W) on the device, as the network wants it; or `Mixed`.
        labels: int64 (B,), in learning order, on the device.
        is_replay: bool (B,), True where the sample is replay of an old class; a kept exemplar is none.
        soft_targets: float (B, K), a distribution over classes for each sample; None: the labels are all there is.
        replay: a second batch, of old classes, that goes through the network on its own; None: there is none.
    """

    images: Tensor | Mixed
    labels: Tensor
    is_replay: Tensor
    soft_targets: Tensor | None = None
    replay: Batch | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Loading:
    """How samples become batches.

    Attributes:
        transform: `utils.data.transforms.ClassifierTransform` or its like; None for samples that need none.
        batch_size: samples per batch; the last one of an epoch may be smaller.
        key: random key such as (seed, task, purpose).
        device: where batches go. Small images live there as uint8.
        num_workers: processes that decode large images.
        shard: (rank, world size): this process takes every world-size-th sample of each batch; where the batch does
            not divide, ranks with one sample less weigh theirs a little more.
        drop_last: leave out what does not fill a batch, unless there is no other.
    """

    transform: Any
    batch_size: int
    key: tuple[int | str, ...]
    device: torch.device
    num_workers: int = 0
    shard: tuple[int, int] = (0, 1)
    drop_last: bool = False


class Batches(ABC):
    """What `fit` iterates over."""

    @abstractmethod
    def __len__(self) -> int:
        """Count the steps of an epoch."""

    @abstractmethod
    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch from step ``start`` on."""

    def state_dict(self) -> dict:
        """Return tensors and JSON values that position alone does not restore; mostly none."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Restore what ``state_dict`` gave."""


class ShuffledBatches(Batches):
    """Batches of N samples, each epoch in an order of its own; subclasses say in ``batches`` what a batch holds.

    Args:
        labels: int64 (N,).
        loading: size, random key, device, share of this process.
    """

    def __init__(self, labels: Tensor, loading: Loading):
        self.loading, self.device = loading, loading.device
        self.labels = labels.to(loading.device)

    def __len__(self) -> int:
        whole, rest = divmod(len(self.labels), self.loading.batch_size)
        return whole if self.loading.drop_last and whole else whole + (rest > 0)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        order = torch.randperm(len(self.labels), generator=seeding.generator(*self.loading.key, "shuffle", epoch))
        picks = [self._share(pick) for pick in order.split(self.loading.batch_size)[start : len(self)]]
        generators = (
            seeding.generator(*self.loading.key, "augment", epoch, step, self.loading.shard[0])
            for step in range(start, start + len(picks))
        )
        yield from self.batches(epoch, picks, generators)

    @abstractmethod
    def batches(self, epoch: int, picks: list[Tensor], generators: Iterator[torch.Generator]) -> Iterator[Batch]:
        """Yield a batch for every pick, int64 (B,); each has a generator for its augmentation."""

    def _share(self, pick: Tensor) -> Tensor:
        """Return this process's part of a batch; one with fewer samples than processes goes to all of them whole.

        None then has an empty batch, whose mean would not be a number, and the mean over processes stays that of one.
        """
        rank, world = self.loading.shard
        return pick[rank::world] if len(pick) >= world else pick


class ImageBatches(ShuffledBatches):
    """Shuffled, augmented batches of images that are real, replayed or both.

    Args:
        images: what stands for the present, and exemplars.
        replay: what stands for old classes beside them; None for none.
        loading: see `Loading`.
    """

    def __init__(self, images: ImageSet, replay: ImageSet | None, loading: Loading):
        everything = images if replay is None else images + replay
        super().__init__(everything.labels, loading)
        self._take_labels(everything, len(images))
        self.transform = loading.transform
        if self.transform.whole_batch:
            # Mostly one tensor; replay of another size than the real images makes a second one.
            stores = stack_by_size(everything, partial(self.transform.keep, training=True))
            self.stores = [pixels.to(self.device) for pixels in stores]
        else:
            self.images = everything

    def _take_labels(self, samples: Samples, num_present: int) -> None:
        """Take labels and soft targets of all samples, of which those after ``num_present`` stand for old classes."""
        self.labels = samples.labels.to(self.device)
        self.is_replay = torch.arange(len(samples), device=self.device) >= num_present
        soft_targets = samples.soft_targets()
        self.soft_targets = None if soft_targets is None else soft_targets.to(self.device)

    def rows(self, epoch: int) -> Tensor:
        """Return where the image lies that stands for each sample in this epoch, int64 (N,)."""
        return torch.arange(len(self.labels))

    def batches(self, epoch: int, picks: list[Tensor], generators: Iterator[torch.Generator]) -> Iterator[Batch]:
        rows = self.rows(epoch)
        for images, pick in zip(self.views(picks, rows, epoch, generators), picks):
            yield self.batch(images, pick)

    def batch(self, images: Tensor | Mixed, pick: Tensor) -> Batch:
        """Put the labels of a pick, int64 (B,), beside its images."""
        pick = pick.to(self.device)
        soft_targets = None if self.soft_targets is None else self.soft_targets[pick]
        return Batch(images, self.labels[pick], self.is_replay[pick], soft_targets)

    def views(
        self, picks: list[Tensor], rows: Tensor, epoch: int, generators: Iterator[torch.Generator]
    ) -> Iterator[Tensor]:
        """Yield the augmented images of every pick."""
        if self.transform.whole_batch:
            yield from (self.take(rows[pick], generator) for pick, generator in zip(picks, generators))
        else:
            loaded = self._load(picks, rows, epoch)
            yield from (self.transform.train(pixels, generator) for pixels, generator in zip(loaded, generators))

    def take(self, rows: Tensor, augment: torch.Generator) -> Tensor:
        """Return augmented float (B, C, S, S): images of one size together, then all in the order of the rows."""
        pieces, places, start = [], [], 0
        for pixels in self.stores:
            place = ((rows >= start) & (rows < start + len(pixels))).nonzero().flatten()
            if len(place):
                pieces.append(pixels[(rows[place] - start).to(self.device)])
                places.append(place)
            start += len(pixels)
        if len(pieces) == 1:
            return self.transform.train(pieces[0], augment)
        if len({piece.shape[1:] for piece in pieces}) == 1:
            pieces = [torch.cat(pieces)]
        views = torch.cat([self.transform.train(piece, augment) for piece in pieces])
        return views[torch.cat(places).argsort().to(self.device)]

    def _load(self, picks: list[Tensor], rows: Tensor, epoch: int) -> Iterator[Tensor]:
        """Yield uint8 (B, C, S, S) on the device, one per pick, decoded and cropped by workers."""
        loader = DataLoader(
            _Decoded(self.images, self.transform.load_train, (*self.loading.key, "crop", epoch)),
            batch_sampler=[list(zip(rows[pick].tolist(), pick.tolist())) for pick in picks],
            num_workers=self.loading.num_workers,
            pin_memory=self.device.type == "cuda",
        )
        yield from (pixels.to(self.device, non_blocking=True) for pixels in loader)


class MixedBatches(ImageBatches):
    """Image batches with features of old classes among the samples; see `Mixed`.

    Args:
        images: of the present, and exemplars.
        features: of old classes.
        loading: see `Loading`.
    """

    def __init__(self, images: ImageSet, features: FeatureSet, loading: Loading):
        super().__init__(images, None, loading)
        self.num_images, self.features = len(images), features.tensor().to(self.device)
        self._take_labels(Samples([*images.parts, *features.parts]), self.num_images)

    def batches(self, epoch: int, picks: list[Tensor], generators: Iterator[torch.Generator]) -> Iterator[Batch]:
        # Images first, so that the rows of images and features behind each other are those of the labels.
        parts = [(pick[pick < self.num_images], pick[pick >= self.num_images]) for pick in picks]
        # A batch without images uses no generator: those of the others are theirs wherever an epoch is taken up.
        shown = [(real, generator) for (real, _), generator in zip(parts, generators) if len(real)]
        views = self.views([real for real, _ in shown], self.rows(epoch), epoch, iter([g for _, g in shown]))
        for real, replayed in parts:
            features = self.features[(replayed - self.num_images).to(self.device)]
            images = Mixed(next(views), features) if len(real) else Mixed(features.new_empty(0, 3, 1, 1), features)
            yield self.batch(images, torch.cat([real, replayed]))


class PairedBatches(Batches):
    """Batches of the present, each with a batch of replay beside it (`Batch.replay`).

    An epoch is one of the present; replay goes round and round beneath it.

    Args:
        current: of the present.
        replay: of the old classes.
    """

    def __init__(self, current: Batches, replay: Batches):
        self.current, self.replay = current, replay

    def __len__(self) -> int:
        return len(self.current)

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
        """Load the test image at a position, or the training image at a row for the sample that it stands for."""
        if self.key is None:
            return self.load(self.images.image(place)).contiguous()
        row, sample = place
        return self.load(self.images.image(row), seeding.generator(*self.key, sample)).contiguous()


def test_batches(images: ImageSet, transform, batch_size: int, device, num_workers: int = 0) -> Iterator[Tensor]:
    """Yield un-augmented batches in stored order: float (B, C, S, S) on the device."""
    if transform.whole_batch:
        stores = stack_by_size(images, partial(transform.keep, training=False))
        chunks = (chunk for pixels in stores for chunk in pixels.split(batch_size))
    else:
        chunks = DataLoader(_Decoded(images, transform.load_test, None), batch_size, num_workers=num_workers)
    yield from (transform.test(chunk.to(device)) for chunk in chunks)


test_batches.__test__ = False  # not one of pytest's
