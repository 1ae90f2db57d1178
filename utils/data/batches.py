"""Batches in a known order: every epoch's permutation and every step's augmentation has its own random key.

Position alone restores an iteration, so nothing about the past has to be stored to resume it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from utils.data.images import FeatureSet, ImageSet, Samples, located
from utils.data.transforms import stack_by_size
from utils.run.errors import ConfigError
from utils.training import seeding

TOO_SMALL = "BatchNorm of this network cannot train on one image alone; take two or more, or another convnet_type"


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
        balanced: an epoch draws its samples by chance, each class equally often, instead of showing each of them once.
        network: says by `least_batch` how many samples a step needs; a last batch with fewer joins the one before it.
            None: one will do.
    """

    transform: Any
    batch_size: int
    key: tuple[int | str, ...]
    device: torch.device
    num_workers: int = 0
    shard: tuple[int, int] = (0, 1)
    drop_last: bool = False
    balanced: bool = False
    network: Any = None


def class_shares(labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return what each sample, int64 (N,), is of its class, by weights > 0 or in equal parts: float64 (N,)."""
    weights = torch.ones(len(labels), dtype=torch.float64) if weights is None else weights.double()
    return weights / torch.bincount(labels, weights)[labels]


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
        self.draw_weights = class_shares(labels) if loading.balanced else None  # to be drawn; None: each is shown once
        network, smallest = loading.network, len(labels) % loading.batch_size or loading.batch_size
        # The network is asked only where a process may get one sample alone.
        self.least = network.least_batch(loading.transform.size) if network and smallest < 2 * loading.shard[1] else 1

    def __len__(self) -> int:
        whole, rest = divmod(len(self.labels), self.loading.batch_size)
        return whole if whole and (self.loading.drop_last or rest < self.least) else whole + (rest > 0)

    def picks(self, epoch: int) -> list[Tensor]:
        """Return which samples each step of an epoch shows, int64 (B,) each, of all processes together."""
        count, size, total = len(self), self.loading.batch_size, len(self.labels)
        generator = seeding.generator(*self.loading.key, "shuffle", epoch)
        if self.draw_weights is None:
            order = torch.randperm(total, generator=generator)
        else:
            order = torch.multinomial(self.draw_weights, total, replacement=True, generator=generator)
        stop = count * size if self.loading.drop_last else None  # None: the last batch has all that is left
        return list(order[:stop].tensor_split(tuple(range(size, count * size, size)))[:count])

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        picks, key, rank = self.picks(epoch)[start:], self.loading.key, self.loading.shard[0]
        generators = (seeding.generator(*key, "augment", epoch, step, rank) for step in count(start))
        yield from self.batches(epoch, [self.share(pick) for pick in picks], generators)

    @abstractmethod
    def batches(self, epoch: int, picks: list[Tensor], generators: Iterator[torch.Generator]) -> Iterator[Batch]:
        """Yield a batch for every pick, int64 (B,); each has a generator for its augmentation."""

    def share(self, pick: Tensor) -> Tensor:
        """Return this process's part of a batch; one without enough samples for each process goes to all of them whole.

        None then has an empty batch, whose mean would not be a number, and the mean over processes stays that of one.
        A ConfigError says that the batch itself is too small for the network.
        """
        rank, world = self.loading.shard
        if len(pick) < self.least:
            raise ConfigError(f"{len(pick)} of {len(self.labels)} images in a batch: {TOO_SMALL}")
        return pick[rank::world] if len(pick) >= self.least * world else pick


class ImageBatches(ShuffledBatches):
    """Shuffled, augmented batches of images that are real, replayed or both.

    Args:
        images: what stands for the present, and exemplars.
        replay: what stands for old classes beside them; None for none.
        loading: see `Loading`.
        features: what stands for old classes behind the images; see `MixedBatches`.
    """

    def __init__(self, images: ImageSet, replay: ImageSet | None, loading: Loading, features: Samples | None = None):
        shown = images if replay is None else images + replay
        samples = shown if features is None else Samples(shown.parts + features.parts)
        super().__init__(samples.labels, loading)
        self.is_replay = torch.arange(len(samples), device=self.device) >= len(images)
        soft_targets = samples.soft_targets()
        self.soft_targets = None if soft_targets is None else soft_targets.to(self.device)
        self.transform = loading.transform
        if self.transform.whole_batch:
            # Mostly one tensor; replay of another size than the real images makes a second one.
            stores = stack_by_size(shown, partial(self.transform.keep, training=True))
            self.stores = [pixels.to(self.device) for pixels in stores]
        else:
            self.images = shown

    def rows(self, epoch: int) -> Tensor:
        """Return where the image lies that stands for each sample in this epoch, int64 (N,)."""
        return torch.arange(len(self.labels))

    def batches(self, epoch: int, picks: list[Tensor], generators: Iterator[torch.Generator]) -> Iterator[Batch]:
        for images, pick in zip(self.views(picks, epoch, generators), picks):
            yield self.batch(images, pick)

    def batch(self, images: Tensor | Mixed, pick: Tensor) -> Batch:
        """Put the labels of a pick, int64 (B,), beside its images."""
        pick = pick.to(self.device)
        soft_targets = None if self.soft_targets is None else self.soft_targets[pick]
        return Batch(images, self.labels[pick], self.is_replay[pick], soft_targets)

    def views(self, picks: list[Tensor], epoch: int, generators: Iterator[torch.Generator]) -> Iterator[Tensor]:
        """Yield the augmented images of every pick."""
        rows = self.rows(epoch)
        if self.transform.whole_batch:
            yield from (self.take(rows[pick], generator) for pick, generator in zip(picks, generators))
        else:
            for pixels, generator in zip(self._load(picks, rows, epoch), generators):
                yield self.transform.train(pixels, generator)

    def take(self, rows: Tensor, augment: torch.Generator) -> Tensor:
        """Return augmented float (B, C, S, S): images of one size together, then all in the order of the rows."""
        found = located(rows, self.stores)
        pieces, places = zip(*((pixels[inside.to(self.device)], place) for pixels, place, inside in found))
        if len(pieces) == 1:
            return self.transform.train(pieces[0], augment)
        if len({piece.shape[1:] for piece in pieces}) == 1:
            pieces = [torch.cat(pieces)]
        views = torch.cat([self.transform.train(piece, augment) for piece in pieces])
        return views[torch.cat(places).argsort().to(self.device)]

    def _load(self, picks: list[Tensor], rows: Tensor, epoch: int) -> Iterator[Tensor]:
        """Yield uint8 (B, C, S, S) on the device, one per pick, decoded and cropped by workers."""
        places = [list(zip(rows[pick].tolist(), pick.tolist())) for pick in picks]  # each entry is a batch already
        decode = partial(_decode_training, self.images, self.transform, (*self.loading.key, "crop", epoch))
        workers, pinned = self.loading.num_workers, self.device.type == "cuda"
        loader = DataLoader(places, None, num_workers=workers, collate_fn=decode, pin_memory=pinned)
        yield from (pixels.to(self.device, non_blocking=True) for pixels in loader)


class MixedBatches(ImageBatches):
    """Image batches with features of old classes among the samples; see `Mixed`.

    Args:
        images: of the present, and exemplars.
        features: of old classes.
        loading: see `Loading`.
    """

    def __init__(self, images: ImageSet, features: FeatureSet, loading: Loading):
        super().__init__(images, None, loading, features)
        self.num_images, self.features = len(images), features.tensor().to(self.device)

    def batches(self, epoch: int, picks: list[Tensor], generators: Iterator[torch.Generator]) -> Iterator[Batch]:
        # Images first, so that the rows of images and features behind each other are those of the labels.
        parts = [(pick[pick < self.num_images], pick[pick >= self.num_images]) for pick in picks]
        # A batch without images uses no generator: those of the others are theirs wherever an epoch is taken up.
        shown = [(real, generator) for (real, _), generator in zip(parts, generators) if len(real)]
        views = self.views([real for real, _ in shown], epoch, iter([g for _, g in shown]))
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
        current, skipped = divmod(epoch * len(self) + start, len(self.replay))
        later = chain.from_iterable(self.replay.epoch(number) for number in count(current + 1))
        beside = chain(self.replay.epoch(current, skipped), later)
        for batch, replayed in zip(self.current.epoch(epoch, start), beside):
            yield replace(batch, replay=replayed)


def _decode_training(images: ImageSet, transform, key: tuple, places: list[tuple[int, int]]) -> Tensor:
    """Load one batch in a worker: at every place a row's image, cropped by the key of the sample that it stands for."""
    loaded = [transform.load_train(images.image(row), seeding.generator(*key, sample)) for row, sample in places]
    return torch.stack([image.contiguous() for image in loaded])


def _decode_test(images: ImageSet, transform, rows: list[int]) -> Tensor:
    return torch.stack([transform.load_test(images.image(row)).contiguous() for row in rows])


def test_batches(images: ImageSet, transform, batch_size: int, device, num_workers: int = 0) -> Iterator[Tensor]:
    """Yield un-augmented batches in stored order: float (B, C, S, S) on the device."""
    if transform.whole_batch:
        stores = stack_by_size(images, partial(transform.keep, training=False))
        chunks = (chunk for pixels in stores for chunk in pixels.split(batch_size))
    else:
        decode = partial(_decode_test, images, transform)
        chunks = DataLoader(range(len(images)), batch_size, num_workers=num_workers, collate_fn=decode)
    yield from (transform.test(chunk.to(device)) for chunk in chunks)


test_batches.__test__ = False  # not one of pytest's
