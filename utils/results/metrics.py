"""What an experiment is judged by: pure functions from scores and accuracy tables to plain Python floats, in percent.

An accuracy matrix is a lower-triangular list of rows: A[i][j] is the percentage of task j's test images that were
right after task i (j <= i), with the argmax over all classes seen by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, islice, zip_longest
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from utils.run.errors import DataError

Array = Tensor | np.ndarray
Matrix = Sequence[Sequence[float]]
FSCIL = ("base", "novel", "harmonic_mean", "performance_drop")  # what `fscil` returns


def accuracy_row(scores: Array, labels: Array, task_sizes: Sequence[int]) -> list[float]:
    """Return one row of the accuracy matrix: the accuracy on every task so far, by the argmax over all scores.

    Args:
        scores: (N, C), the larger the likelier; C may exceed the classes seen.
        labels: (N,) integers in learning order.
        task_sizes: classes of each task so far.

    Returns:
        One percentage per task.

    Raises:
        DataError: if a task has no test image.
    """
    labels = torch.as_tensor(labels)
    correct = torch.as_tensor(scores).argmax(dim=1) == labels  # (N,)
    row = []
    for first, last in spans(task_sizes):
        inside = (labels >= first) & (labels <= last)
        if not inside.any():
            raise DataError(f"task {len(row)} (classes {first} to {last}) has no test image: its accuracy is undefined")
        row.append(_percent(correct[inside]))
    return row


def within_task(scores: Array, labels: Array, task_sizes: Sequence[int]) -> float:
    """Return the percentage right where each image's task is known: the argmax over the classes of its own task alone.

    Task-incremental accuracy (van de Ven and Tolias, 2019, arXiv:1904.07734); arguments as of `accuracy_row`.
    """
    labels, task = torch.as_tensor(labels), torch.arange(len(task_sizes)).repeat_interleave(torch.tensor(task_sizes))
    foreign = task[labels][:, None] != task  # (N, C)
    scores = torch.as_tensor(scores)[:, : len(task)].masked_fill(foreign, -torch.inf)
    return _percent(scores.argmax(dim=1) == labels)


def topk(scores: Array, labels: Array, k: int) -> float:
    """Return the percentage of images whose label is among the k largest scores; k is capped at the number of classes.

    Ties go to the lower class, as in argmax, so ``topk(.., 1)`` is the accuracy. NaN never counts as right.

    Args:
        scores: (N, C).
        labels: (N,) integers in [0, C).
    """
    scores, labels = torch.as_tensor(scores), torch.as_tensor(labels)
    columns = torch.arange(scores.shape[1], device=scores.device)
    own = scores.gather(1, labels[:, None])  # (N, 1)
    before = ~(scores <= own) | ((scores == own) & (columns < labels[:, None]))  # (N, C); a NaN comes before all
    return _percent(before.sum(dim=1) < min(k, scores.shape[1]))


def per_class_accuracy(predictions: Array, labels: Array, num_classes: int) -> list[float | None]:
    """Return the percentage right of each class's test images; None for a class that has none.

    Args:
        predictions, labels: (N,) integers in learning order.
    """
    predictions, labels = torch.as_tensor(predictions), torch.as_tensor(labels)
    totals = torch.bincount(labels, minlength=num_classes).tolist()
    rights = torch.bincount(labels[predictions == labels], minlength=num_classes).tolist()
    return [100 * right / total if total else None for right, total in zip(rights, totals)]


def group_accuracies(predictions: Array, labels: Array, num_old: int, groups: Sequence[int] | int) -> dict[str, float]:
    """Return PyCIL's table of one phase: total, then groups of classes (``00-09``, ...), then old and new.

    Groups come in numeric order, also over 100 classes, and one without any test image is left out. The last class
    of a group of fixed width is nominal: 15 classes in tens give ``10-19``. ``old`` is 0.0 in phase 0, as in PyCIL.

    Args:
        predictions, labels: (N,) integers in learning order.
        num_old: classes known before this phase; 0 in phase 0.
        groups: the real task sizes so far, or one width: 10 is what PyCIL prints whatever the tasks are.

    Returns:
        Percentages, rounded to two decimals.
    """
    predictions, labels = torch.as_tensor(predictions), torch.as_tensor(labels)
    if isinstance(groups, int):
        groups = [groups] * -(-(int(labels.max()) + 1) // groups)
    members = {"total": labels >= 0}
    members |= {f"{first:02d}-{last:02d}": (labels >= first) & (labels <= last) for first, last in spans(groups)}
    members |= {"old": labels < num_old, "new": labels >= num_old}
    correct = predictions == labels
    return {
        name: float(np.round(_percent(correct[inside]), 2))  # np.round, for PyCIL's way with ties
        for name, inside in members.items()
        if inside.any() or name == "old"
    }


def forgetting_per_task(matrix: Matrix) -> list[float]:
    """Return the points that each task but the last has lost since its best; negative where it improved."""
    last = len(matrix) - 1
    return [max(matrix[k][j] for k in range(j, last)) - matrix[last][j] for j in range(last)]


def forgetting(matrix: Matrix) -> float:
    """Return the mean over earlier tasks of max_{k<T} A[k][j] - A[T][j], T the last task; 0.0 after one task.

    It is not clipped (Chaudhry et al., "Riemannian Walk", ECCV 2018, Section 3). PyCIL's is the same where its groups
    are the tasks.
    """
    return fmean(forgetting_per_task(matrix) or [0.0])


def class_forgetting(rows: Sequence[Sequence[float | None]]) -> float:
    """Return the mean loss of every class of earlier tasks since its best; 0.0 after one task.

    The last evaluation may be the best, so that it is never negative (Liang et al., "Diffusion-Driven Data Replay",
    ECCV 2024, arXiv:2409.01128).

    Args:
        rows: accuracy per class after every task, each row as long as the classes seen by then; None (a class
            without test images) is left out.
    """
    return fmean([lost for lost in forgetting_per_class(rows) if lost is not None] or [0.0])


def forgetting_per_class(rows: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Return the loss of every class of earlier tasks, as `class_forgetting` has it; None where nothing is known."""
    old = islice(zip_longest(*rows), len(rows[-2:][0]))  # a tuple over tasks per class; None before it was learned
    known = ([value for value in values if value is not None] for values in old)
    return [max(values) - values[-1] if values else None for values in known]


def backward_transfer(matrix: Matrix) -> float:
    """Return the mean over earlier tasks of A[T][j] - A[j][j]; 0.0 after one task.

    Lopez-Paz and Ranzato, "Gradient Episodic Memory", NeurIPS 2017, Eq. 3.
    """
    return fmean([matrix[-1][j] - matrix[j][j] for j in range(len(matrix) - 1)] or [0.0])


def harmonic_mean(base: float | None, novel: float | None) -> float | None:
    """Return 2 b n / (b + n): high only if base and novel classes both are; 0.0 where both are 0, None without both."""
    if base is None or novel is None:
        return None
    return 2 * base * novel / (base + novel) if base + novel else 0.0


def fscil(matrix: Matrix, test_counts: Sequence[int]) -> dict[str, list[float | None]]:
    """Return the few-shot figures of every session; session 0 teaches the base classes, later ones the novel classes.

    Means run over test images; `group_averages` run over groups of classes. The two agree where all groups have
    equally many test images.

    Args:
        matrix: accuracy matrix, T rows.
        test_counts: test images of each task, at least T.

    Returns:
        Lists of T percentages: ``base``, ``novel`` and ``harmonic_mean`` (both None in session 0), and
        ``performance_drop``: points that the accuracy over all seen classes lies below session 0's.
    """
    base = [float(row[0]) for row in matrix]
    novel = [_weighted(row[1:], test_counts[1:]) for row in matrix]
    overall = [_weighted(row, test_counts) for row in matrix]
    drop = [overall[0] - value for value in overall]
    return dict(zip(FSCIL, (base, novel, list(map(harmonic_mean, base, novel)), drop)))


def group_averages(predictions: Array, labels: Array, init_cls: int, increment: int) -> dict[str, float | None]:
    """Return old, new and harmonic mean accuracy as means over groups of ``increment`` classes, not over test images.

    Liu et al., "Few-Shot Class Incremental Learning with Attention-Aware Self-Adaptive Prompt", ECCV 2024,
    arXiv:2403.09857. The base classes of a session are one task here, but many groups.

    Args:
        predictions, labels: (N,) integers in learning order.
        init_cls: classes of the first task.
        increment: classes of every later task.

    Returns:
        Percentages ``old``, ``new``, ``harmonic_mean``; None where there is no group.
    """
    # As in the authors' code, groups begin below the last label: a last one of a single class is left out.
    table = group_accuracies(predictions, labels, init_cls, [increment] * -(-int(labels.max()) // increment))
    ends = {int(name.split("-")[1]): value for name, value in table.items() if "-" in name}
    # There, too, a group that ends exactly at init_cls (``increment`` 1) is neither old nor new.
    old = _mean([value for end, value in ends.items() if end < init_cls])
    new = _mean([value for end, value in ends.items() if end > init_cls])
    return {"old": old, "new": new, "harmonic_mean": harmonic_mean(old, new)}


def many_medium_few(accuracies: Sequence[float | None], counts: Sequence[int]) -> dict[str, float | None]:
    """Return the mean accuracy of classes with many (> 100), medium and few (< 20) training images; None if empty.

    Liu et al., "Large-Scale Long-Tailed Recognition in an Open World", CVPR 2019, Section 4.

    Args:
        accuracies: percentage per class; None (a class without test images) is left out.
        counts: training images of at least as many classes.
    """
    groups: dict[str, list[float]] = {"many": [], "medium": [], "few": []}
    for accuracy, count in zip(accuracies, counts):
        if accuracy is not None:
            groups[frequency_group(count)].append(accuracy)
    return {name: _mean(members) for name, members in groups.items()}


def frequency_group(count: int) -> str:
    """Return the group of a class with so many training images; see `many_medium_few`."""
    return "many" if count > 100 else "few" if count < 20 else "medium"


def spans(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Return the first and the last class of each group."""
    return [(end - size, end - 1) for size, end in zip(sizes, accumulate(sizes))]


def _percent(correct: Tensor) -> float:
    return 100 * int(correct.sum()) / max(correct.numel(), 1)


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _weighted(values: Sequence[float], counts: Sequence[int]) -> float | None:
    """Mean of the values by their counts, of which there may be more."""
    return sum(value * count for value, count in zip(values, counts)) / sum(counts[: len(values)]) if values else None
