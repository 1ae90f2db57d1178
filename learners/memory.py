"""Exemplars: which real images of the past are kept, and how many (PyCIL's meaning of ``memory_*``)."""

from __future__ import annotations

import torch
from torch import Tensor

from utils.data.images import ImageSet, Part


def herding(features: Tensor, num_picks: int) -> list[int]:
    """Greedy choice whose running mean stays closest to the class mean (iCaRL, Rebuffi et al. 2017, Algorithm 4).

    Args:
        features: (N, D) of one class, un-augmented; rows are brought to length 1 here.
        num_picks: images wanted; at most N are picked.

    Returns:
        Positions in order of choice, so that a prefix is the best smaller set; the lower position wins a tie.
    """
    unit = features.double() / (features.double().norm(dim=1, keepdim=True) + 1e-8)
    mean, total = unit.mean(0), unit.new_zeros(unit.shape[1])
    free = torch.ones(len(unit), dtype=torch.bool)
    picks: list[int] = []
    for count in range(1, min(num_picks, len(unit)) + 1):
        distance = (mean - (unit + total) / count).norm(dim=1)
        pick = int(distance.masked_fill(~free, torch.inf).argmin())
        picks.append(pick)
        free[pick] = False
        total += unit[pick]
    return picks


def class_mean(features: Tensor) -> Tensor:
    """Mean direction of one class, (D,) of length 1, from features (N, D) of any length."""
    unit = features / (features.norm(dim=1, keepdim=True) + 1e-8)
    mean = unit.mean(0)
    return mean / mean.norm().clamp_min(1e-12)


def reservoir_slots(num_seen: int, num_new: int, capacity: int, generator: torch.Generator) -> list[tuple[int, int]]:
    """Reservoir sampling (Vitter 1985): which new items go where so that every item seen is kept equally likely.

    Args:
        num_seen: items offered before.
        num_new: items offered now, in order.
        capacity: slots.

    Returns:
        (item, slot) pairs in order; a later pair overwrites an earlier one of its slot.
    """
    slots = []
    for item in range(num_new):
        count = num_seen + item
        slot = count if count < capacity else int(torch.randint(count + 1, (1,), generator=generator))
        if slot < capacity:
            slots.append((item, slot))
    return slots


class ExemplarMemory:
    """Real images of the past in order of importance per class.

    Args:
        size: images in all.
        per_class: images per class.
        fixed: True keeps ``per_class`` of each class, so that the total grows; False shares ``size`` over all seen
            classes. The name of PyCIL's key, ``fixed_memory``, says the opposite of what many read.
    """

    def __init__(self, size: int, per_class: int, fixed: bool):
        self.size, self.per_class, self.fixed = size, per_class, fixed
        self.images = ImageSet()

    def budget(self, num_seen: int) -> int:
        """Exemplars of each class when ``num_seen`` classes are known."""
        return self.per_class if self.fixed else self.size // num_seen

    def trim(self, budget: int) -> None:
        """Keep the first ``budget`` of every class."""
        kept = [self.images.select([label]).take(range(min(budget, count))) for label, count in self.counts().items()]
        self.images = sum(kept, ImageSet())

    def counts(self) -> dict[int, int]:
        """Exemplars of every class that has some."""
        return {label: int((self.images.labels == label).sum()) for label in self.images.classes}

    def drop_last(self, label: int) -> int:
        """Give up the least important exemplar of a class that has some; returns its bytes, its label's among them."""
        position = int((self.images.labels == label).nonzero()[-1])
        freed = self.images.take([position]).nbytes + self.images.labels.element_size()
        self.images = self.images.take((torch.arange(len(self.images)) != position).nonzero().flatten())
        return freed

    def add(self, images: ImageSet) -> None:
        """Append images of new classes, best first."""
        self.images = self.images + images

    def state(self) -> tuple[dict[str, Tensor], list]:
        """Pixels and labels as tensors, and file paths as JSON, in few parts, for each has a header on disk."""
        tensors, layout = {}, []
        for index, part in enumerate(self.images.merged().parts):
            tensors[f"labels_{index}"] = part.labels
            if isinstance(part.images, Tensor):
                tensors[f"images_{index}"] = part.images
                layout.append(None)
            else:
                layout.append(list(part.images))
        return tensors, layout

    def load(self, tensors: dict[str, Tensor], layout: list) -> None:
        """Take over what ``state`` gave."""
        self.images = ImageSet(
            Part(tensors[f"images_{index}"] if paths is None else tuple(paths), tensors[f"labels_{index}"])
            for index, paths in enumerate(layout)
        )
