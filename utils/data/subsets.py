"""The order of classes and the choice of their images: pure functions of labels and seeds.

The references draw from one global generator; here every draw has a generator of its own, which gives the same
numbers where parity asks for it.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from utils.run.errors import ConfigError, DataError
from utils.training.seeding import numpy_generator

Tail = Literal["exp", "step"]


def class_order(num_classes: int, shuffle: bool, seed: int) -> list[int]:
    """Return original class ids in the order of learning: PyCIL's permutation, or the identity without ``shuffle``."""
    return np.random.RandomState(seed).permutation(num_classes).tolist() if shuffle else list(range(num_classes))


def task_sizes(num_classes: int, init_cls: int, increment: int, dataset: str = "the data set") -> list[int]:
    """Return new classes per task: ``init_cls``, then ``increment`` while they last, then the rest.

    Raises:
        ConfigError: if there are fewer than ``init_cls`` classes.
    """
    if not 1 <= init_cls <= num_classes:
        remedy = f"use a value from 1 to {num_classes}"
        raise ConfigError(f"init_cls={init_cls}, but {dataset} has only {num_classes} classes: {remedy}")
    full, rest = divmod(num_classes - init_cls, increment)
    return [init_cls] + [increment] * full + [rest] * (rest > 0)


def reorder_tasks(order: list[int], sizes: list[int], wanted: list[int]) -> tuple[list[int], list[int]]:
    """Return class order and task sizes with the tasks in another order.

    Args:
        order: all classes in the order of learning.
        sizes: classes of each task, which sum to all.
        wanted: numbers of all tasks, from 0, as they are to come.

    Raises:
        ConfigError: if it has other tasks.
    """
    if len(wanted) != len(sizes):
        raise ConfigError(f"task_order names {len(wanted)} tasks: name all {len(sizes)} that the classes are cut into")
    stops = list(accumulate(sizes))
    blocks = [order[stop - size : stop] for size, stop in zip(sizes, stops)]
    return [label for task in wanted for label in blocks[task]], [sizes[task] for task in wanted]


def first_indices(labels: Tensor, per_class: int) -> Tensor:
    """Return positions of the first ``per_class`` images of every class, int64 (M,), ascending.

    Args:
        labels: int64 (N,). A class with fewer images keeps them all.
    """
    firsts = [(labels == label).nonzero().flatten()[:per_class] for label in labels.unique()]
    return torch.cat(firsts).sort().values if firsts else torch.arange(0)


def long_tail_counts(num_images: int, num_classes: int, imb_factor: float, kind: Tail = "exp") -> list[int]:
    """Return images per class of a long-tailed set, by label index (Cao et al., NeurIPS 2019, arXiv:1906.07413).

    Args:
        num_images: N, of a balanced set; class 0 keeps N / K of them.
        imb_factor: smallest over largest class, in (0, 1].
        kind: "exp" falls from class to class, "step" gives the second half of the classes the smallest count.
    """
    most = num_images / num_classes
    if kind == "step":
        head = num_classes // 2
        return [int(most)] * head + [int(most * imb_factor)] * (num_classes - head)
    # int() truncates; rounding would change CIFAR-100's total from 10847 to 10899.
    return [int(most * imb_factor ** (c / max(num_classes - 1, 1))) for c in range(num_classes)]


def long_tail_indices(labels: Tensor, num_classes: int, imb_factor: float, kind: Tail = "exp",
                      class_names: Sequence[str] | None = None) -> Tensor:  # fmt: skip
    """Return positions of the images that a long-tailed set keeps, class by class in label order.

    The seed is 0 as in the reference (Qin et al., CVPR 2023, arXiv:2305.00562), so all runs share one set.

    Args:
        labels: int64 (N,), original class ids: class 0 is the head, whatever the order of learning.
        class_names: by original id, for messages.

    Returns:
        int64 (M,).

    Raises:
        ConfigError: if a class would keep no image.
    """
    counts = long_tail_counts(len(labels), num_classes, imb_factor, kind)
    if 0 in counts:
        least = math.ceil(num_classes / len(labels) * 1e6) / 1e6
        first = counts.index(0)
        name = repr(class_names[first]) if class_names else first
        raise ConfigError(f"imb_factor={imb_factor} leaves class {name} no image: use at least {least:g}")
    stream, kept = np.random.RandomState(0), []
    for label, count in enumerate(counts):
        positions = np.flatnonzero(labels.numpy() == label)
        stream.shuffle(positions)
        kept.append(positions[:count])
    return torch.from_numpy(np.concatenate(kept))


def few_shot_indices(labels: Tensor, sessions: Sequence[Sequence[int]], kshot: int, seed: int,
                     draw: Literal["own", "reference"] = "own",
                     class_names: Sequence[str] | None = None) -> dict[int, list[int]]:  # fmt: skip
    """Draw K images for each class of the sessions after the first.

    Args:
        labels: int64 (N,), in learning order.
        sessions: the new classes of every few-shot session, sessions in order, without the first task.
        kshot: K, images per class.
        draw: "own" draws every class by itself; "reference" is the reference's draw (Liu et al., arXiv:2403.09857), one
            stream of Python's generator.
        class_names: for messages.

    Returns:
        Per class, K positions within the class: 0 is its first image in ``labels``.

    Raises:
        DataError: if a class has fewer than K images.
    """
    counts, stream, chosen = Counter(labels.tolist()), random.Random(seed), {}
    for session in sessions:
        sizes = {label: counts[label] for label in sorted(session)}
        least = min(sizes, key=sizes.__getitem__)
        if sizes[least] < kshot:
            name, size = repr(class_names[least]) if class_names else least, sizes[least]
            remedy = f"use kshot of at most {size}, or add images"
            raise DataError(f"kshot={kshot}, but class {name} has only {size} training images: {remedy}")
        if draw == "reference":
            # Its code draws every session twice, first for augmented data that it never uses.
            for _ in range(2):
                shuffled = {label: list(range(size)) for label, size in sizes.items()}
                for positions in shuffled.values():
                    stream.shuffle(positions)
        else:
            draws = {label: numpy_generator(seed, "few_shot", label) for label in sizes}
            shuffled = {label: draws[label].permutation(size).tolist() for label, size in sizes.items()}
        chosen |= {label: positions[:kshot] for label, positions in shuffled.items()}
    return chosen


def split_validation(labels: Tensor, share: float, *key: int | str) -> tuple[Tensor, Tensor]:
    """Cut every class into training and validation images.

    Args:
        labels: int64 (N,).
        share: of every class that is held out, in [0, 1), rounded; at least one training image stays.
        key: what the draw depends on.

    Returns:
        Ascending positions of the training and of the validation images, int64.
    """
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist() if share > 0 else ():
        positions = (labels == label).nonzero().flatten()
        count = min(round(share * len(positions)), len(positions) - 1)
        shuffled = numpy_generator(*key, "validation", label).permutation(len(positions))
        held_out[positions[shuffled[:count]]] = True
    return (~held_out).nonzero().flatten(), held_out.nonzero().flatten()
