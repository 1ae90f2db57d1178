"""From scores to `results.json`: one seed's numbers as they grow task by task, and PyCIL's log lines."""

from __future__ import annotations

import logging
import statistics
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from utils.data.manager import DataManager, Task
from utils.results import metrics

log = logging.getLogger("reprise")
STATE = ("accuracy_matrix", "curves", "class_accuracies", "test_counts")


class Results:
    """Numbers that one seed has to report.

    Args:
        header: what names the run: name, model_name, source, dataset, seed, ...
        data: order, names and counts of the classes.
        few_shot: whether later tasks bring few images per class.
        long_tailed: whether the training set is long-tailed.
    """

    def __init__(self, header: dict[str, Any], data: DataManager, few_shot: bool, long_tailed: bool):
        self.header, self.data = header, data
        self.few_shot, self.long_tailed = few_shot, long_tailed
        self.accuracy_matrix: list[list[float]] = []
        self.curves: dict[str, list[float | None]] = {}
        self.class_accuracies: list[list[float | None]] = []  # a row per task, over the classes seen by then
        self.test_counts: list[int] = []

    @property
    def per_class_accuracy(self) -> list[float | None]:
        """Return the percentage per class seen, after the newest task."""
        return self.class_accuracies[-1] if self.class_accuracies else []

    def state(self) -> dict[str, Any]:
        """Return what restores a half-finished run's numbers, for JSON."""
        return {name: getattr(self, name) for name in STATE}

    def load(self, state: dict[str, Any]) -> None:
        """Restore what ``state`` returned."""
        for name in STATE:
            setattr(self, name, state[name])

    def add(
        self, task: Task, scores: dict[str, Tensor], labels: Tensor, val: tuple[dict[str, Tensor], Tensor] | None = None
    ) -> None:
        """Take in one task's evaluation and log it in PyCIL's words.

        Args:
            task: the task just learned.
            scores: "cnn" and perhaps "nme", float (N, num_seen), the larger the likelier.
            labels: int64 (N,), of the test images of all seen classes.
            val: scores and labels of the same form, on the held-out training images of all seen classes.
        """
        sizes = self.data.task_sizes[: task.index + 1]
        predictions = scores["cnn"].argmax(1)
        self.accuracy_matrix.append(metrics.accuracy_row(scores["cnn"], labels, sizes))
        self.class_accuracies.append(metrics.per_class_accuracy(predictions, labels, task.num_seen))
        self.test_counts = torch.bincount(labels, minlength=task.num_seen).tolist()
        kinds = [kind for kind in ("cnn", "nme") if kind in scores]
        for kind in kinds:
            for k in (1, 5):
                self._extend(f"{kind}_top{k}", metrics.topk(scores[kind], labels, k))
            table = metrics.group_accuracies(scores[kind].argmax(1), labels, task.num_old, sizes)
            log.info("%s: %s", kind.upper(), table)
        if "nme" not in scores:
            log.info("No NME accuracy.")
        for kind in kinds:
            for k in (1, 5):
                log.info("%s top%d curve: %s", kind.upper(), k, self.curves[f"{kind}_top{k}"])
        for kind in kinds:
            average = metrics.average_incremental_accuracy(self.curves[f"{kind}_top1"])
            log.info("Average Accuracy (%s): %s", kind.upper(), average)
        if val is not None:
            self._add_val(task, *val)
        if self.few_shot:
            self._add_session(predictions, labels)

    def _extend(self, curve: str, percentage: float) -> None:
        self.curves.setdefault(curve, []).append(round(percentage, 2))

    def _add_val(self, task: Task, scores: dict[str, Tensor], labels: Tensor) -> None:
        # Tasks of a run that began before it held images out have no value, but keep their place.
        curve = self.curves.setdefault("val_top1", [])
        curve += [None] * (task.index - len(curve))
        self._extend("val_top1", metrics.topk(scores["cnn"], labels, 1))
        log.info("VAL top1 curve: %s", curve)

    def _add_session(self, predictions: Tensor, labels: Tensor) -> None:
        """Log a few-shot session in one line, and keep its averages over groups of classes."""
        init_cls, *later = self.data.task_sizes
        averages = metrics.group_averages(predictions, labels, init_cls, later[0] if later else init_cls)
        for name, value in averages.items():
            self.curves.setdefault(f"group_{name}", []).append(value)
        session = len(self.accuracy_matrix) - 1
        figures = {name.replace("_", " "): values[session] for name, values in self._fscil().items()}
        words = (f"{name} {'-' if value is None else f'{value:.2f}'}" for name, value in figures.items())
        log.info("Few-shot session %d: %s", session, ", ".join(words))

    def _fscil(self) -> dict[str, list[float | None]]:
        """Return `metrics.fscil` with the averages over groups."""
        bounds = pairwise(accumulate(self.data.task_sizes[: len(self.accuracy_matrix)], initial=0))
        per_task = [sum(self.test_counts[first:last]) for first, last in bounds]
        groups = {name: self.curves[name] for name in ("group_old", "group_new", "group_harmonic_mean")}
        return {**metrics.fscil(self.accuracy_matrix, per_task), **groups}

    def log_end(self) -> None:
        """Log PyCIL's last lines."""
        log.info("Accuracy Matrix (CNN): %s", [[round(value, 2) for value in row] for row in self.accuracy_matrix])
        log.info("Forgetting (CNN): %s", round(metrics.forgetting(self.accuracy_matrix), 2))

    def to_dict(
        self, memory_bytes: dict[str, int], memory_units: dict[str, float], seconds: dict[str, float]
    ) -> dict[str, Any]:
        """Return the content of `results.json`.

        Args:
            memory_bytes: what the run keeps, by kind; a kind that the report does not know is shown by its name.
            memory_units: exemplars counted in raw images.
            seconds: time by phase, and "total".
        """
        matrix, counts = self.accuracy_matrix, self.data.class_counts
        seen = len(self.per_class_accuracy)
        return {
            **self.header,
            "finished": len(matrix) == self.data.num_tasks,
            "task_sizes": self.data.task_sizes,
            "class_order": self.data.class_order,
            "class_names": self.data.class_names,
            "accuracy_matrix": matrix,
            "top1_curve": self.curves["cnn_top1"],
            "top5_curve": self.curves["cnn_top5"],
            "nme_top1_curve": self.curves.get("nme_top1"),
            "val_top1_curve": self.curves.get("val_top1"),
            "average_incremental_accuracy": metrics.average_incremental_accuracy(self.curves["cnn_top1"]),
            "final_accuracy": self.curves["cnn_top1"][-1],
            "forgetting": metrics.forgetting(matrix),
            "class_forgetting": metrics.class_forgetting(self.class_accuracies),
            "backward_transfer": metrics.backward_transfer(matrix),
            "per_class_accuracy": self.per_class_accuracy,
            "train_counts": counts,
            "test_counts": self.test_counts,
            "few_shot_indices": self.data.few_shot_indices or None,
            "fscil": self._fscil() if self.few_shot else None,
            "long_tail": metrics.many_medium_few(self.per_class_accuracy, counts[:seen]) if self.long_tailed else None,
            "memory_bytes": memory_bytes,
            "memory_units": memory_units,
            "seconds": {name: round(value, 2) for name, value in seconds.items()},
        }


SUMMARISED = ("final_accuracy", "average_incremental_accuracy", "forgetting", "backward_transfer")


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return mean and sample standard deviation over seeds (0.0 for one seed) of the headline figures.

    Few-shot runs also have the figures of their last session, under ``fscil``.
    """
    summary: dict[str, Any] = {"seeds": [result["seed"] for result in results]}
    summary |= {name: _spread([result[name] for result in results]) for name in SUMMARISED}
    sessions = [result["fscil"] for result in results if result.get("fscil")]
    if sessions:
        last = {
            name: [values[name][-1] for values in sessions if values[name][-1] is not None] for name in metrics.FSCIL
        }
        summary["fscil"] = {name: _spread(values) for name, values in last.items() if values}
    return summary


def _spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}
