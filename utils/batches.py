"""Batches in a known order: every epoch's permutation and every step's augmentation has its own random key.

Position alone restores an iteration, so nothing about the past has to be stored to resume it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from utils import seeding
from utils.images import ImageSet
from utils.transforms import stack


@dataclass
class Batch:
    """One training step's data.

    Attributes:
        images: float (B, C, H, W) on the device, as the network wants it.
        labels: int64 (B,), in learning order, on the device.
        is_replay: bool (B,), True where the image was generated.
        index: int64 (B,), position in the set that the batches were cut from.
        soft_targets: float (B, num_classes) or None.
    """

    images: Tensor
    labels: Tensor
    is_replay: Tensor
    index: Tensor
    soft_targets: Tensor | None = None

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
        transform: `utils.transforms.ClassifierTransform` or its like.
        batch_size: images per batch; the last one of an epoch may be smaller.
        key: random key such as (seed, task, purpose).
        device: where batches go. Small images live there as uint8.
        shard: (rank, world size): this process takes every world-size-th image of each batch; where the batch does
            not divide, ranks with one image less weigh theirs a little more.
    """

    def __init__(self, images, replay=None, *, transform, batch_size, key, device, num_workers=0, shard=(0, 1)):
        everything = images if replay is None else images + replay
        self.labels = everything.labels.to(device)
        self.is_replay = (torch.arange(len(everything)) >= len(images)).to(device)
        self.transform, self.batch_size, self.key, self.device = transform, batch_size, key, device
        self.num_workers, self.shard = num_workers, shard
        if transform.whole_batch:
            self.pixels = stack(everything, transform.size, transform.resize).to(device)
        else:
            self.images = everything

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Nothing to restore: position is enough."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        order = torch.randperm(len(self.labels), generator=seeding.generator(*self.key, "shuffle", epoch))
        rank, world = self.shard
        # A last batch with fewer images than processes goes to all of them whole: none has an empty batch, whose mean
        # would not be a number, and the mean over processes stays that of one.
        picks = [pick[rank::world] if len(pick) >= world else pick for pick in order.split(self.batch_size)][start:]
        for step, (pick, pixels) in enumerate(zip(picks, self._pixels(picks, epoch)), start):
            augment = seeding.generator(*self.key, "augment", epoch, step, rank)
            pick = pick.to(self.device)
            images = self.transform.train(pixels, augment)
            yield Batch(images, self.labels[pick], self.is_replay[pick], pick)

    def _pixels(self, picks: list[Tensor], epoch: int) -> Iterator[Tensor]:
        """uint8 (B, C, S, S) on the device, one per pick."""
        if self.transform.whole_batch:
            yield from (self.pixels[pick.to(self.device)] for pick in picks)
            return
        loader = DataLoader(
            _Decoded(self.images, self.transform.load_train, (*self.key, "crop", epoch)),
            batch_sampler=[pick.tolist() for pick in picks],
            num_workers=self.num_workers,
            pin_memory=self.device.type == "cuda",
        )
        yield from (pixels.to(self.device, non_blocking=True) for pixels in loader)


class _Decoded(Dataset):
    """Large images, decoded and cropped in a worker; every image's crop has its own key."""

    def __init__(self, images: ImageSet, load, key: tuple | None):
        self.images, self.load, self.key = images, load, key

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> Tensor:
        image = self.images.image(position)
        if self.key is None:
            return self.load(image).contiguous()
        return self.load(image, seeding.generator(*self.key, position)).contiguous()


def test_batches(images: ImageSet, transform, batch_size: int, device, num_workers: int = 0) -> Iterator[Tensor]:
    """Un-augmented batches in stored order: float (B, C, S, S) on the device."""
    if len(images) == 0:
        return
    if transform.whole_batch:
        chunks = stack(images, transform.size, transform.resize).split(batch_size)
    else:
        chunks = DataLoader(_Decoded(images, transform.load_test, None), batch_size, num_workers=num_workers)
    yield from (transform.test(chunk.to(device)) for chunk in chunks)


test_batches.__test__ = False  # not one of pytest's
