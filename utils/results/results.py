"""From scores to `results.json`: one seed's numbers as they grow task by task, and PyCIL's log lines."""

from __future__ import annotations

from itertools import product
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from utils.data.manager import DataManager, Task
from utils.results import metrics
from utils.results.cost import seconds_of
from utils.run.log import log

Scores = dict[str, Tensor]  # "cnn" and perhaps "nme", float (N, num_seen), the larger the likelier
Amounts = dict[str, float]  # by name
STATE = ("accuracy_matrix", "curves", "class_accuracies", "test_counts", "replay_quality")


class Results:
    """Numbers that one seed has to report.

    Args:
        header: what names the run: name, model_name, source, dataset, seed, ...
        data: order, names and counts of the classes.
    """

    def __init__(self, header: dict[str, Any], data: DataManager):
        self.header, self.data = header, data
        self.accuracy_matrix: list[list[float]] = []
        self.curves: dict[str, list[float | None]] = {}
        self.class_accuracies: list[list[float | None]] = []  # a row per task, over the classes seen by then
        self.test_counts: list[int] = []
        self.replay_quality: dict[str, Any] | None = None  # of the whole run, where it is asked for

    def state(self) -> dict[str, Any]:
        """Return what restores a half-finished run's numbers, for JSON."""
        return {name: getattr(self, name) for name in STATE}

    def load(self, state: dict[str, Any]) -> None:
        """Restore what ``state`` returned."""
        vars(self).update({name: state[name] for name in STATE if name in state})

    def add(self, task: Task, scores: Scores, labels: Tensor, val: tuple[Scores, Tensor] | None = None,
            train_seconds: float = 0.0) -> None:  # fmt: skip
        """Take in one task's evaluation and log it in PyCIL's words.

        Args:
            task: the task just learned.
            scores: of the test images of all seen classes.
            labels: int64 (N,), of the same images.
            val: scores and labels of the held-out training images of all seen classes.
            train_seconds: that its training took, without the source's, drawing and evaluation.
        """
        sizes = self.data.task_sizes[: task.index + 1]
        predictions = scores["cnn"].argmax(1)
        self.accuracy_matrix.append(metrics.accuracy_row(scores["cnn"], labels, sizes))
        self.class_accuracies.append(metrics.per_class_accuracy(predictions, labels, task.num_seen))
        self.test_counts = torch.bincount(labels, minlength=task.num_seen).tolist()
        for kind, values in scores.items():
            log.info("%s: %s", kind.upper(), metrics.group_accuracies(values.argmax(1), labels, task.num_old, sizes))
        if "nme" not in scores:
            log.info("No NME accuracy.")
        for kind, k in product(scores, (1, 5)):
            curve = self._extend(f"{kind}_top{k}", metrics.topk(scores[kind], labels, k))
            log.info("%s top%d curve: %s", kind.upper(), k, curve)
        for kind in scores:
            known = [value for value in self.curves[f"{kind}_top1"] if value is not None]
            log.info("Average Accuracy (%s): %s", kind.upper(), fmean(known))
        curve = self._extend("task_incremental", metrics.within_task(scores["cnn"], labels, sizes))
        log.info("Task-incremental curve: %s", curve)
        self._extend("train_seconds", train_seconds)
        if val is not None:
            curve = self._extend("val_top1", metrics.topk(val[0]["cnn"], val[1], 1))
            log.info("VAL top1 curve: %s", curve)
        if self.data.split.kshot:
            self._add_session(predictions, labels)

    def _extend(self, name: str, percentage: float) -> list[float | None]:
        """Add a task's value to a curve; earlier tasks that had none, as before images were held out, keep a place."""
        curve = self.curves.setdefault(name, [])
        curve += [None] * (len(self.accuracy_matrix) - 1 - len(curve)) + [round(percentage, 2)]
        return curve

    def _add_session(self, predictions: Tensor, labels: Tensor) -> None:
        """Log a few-shot session in one line, and keep its averages over groups of classes."""
        averages = metrics.group_averages(predictions, labels, self.data.split.init_cls, self.data.split.increment)
        for name, value in averages.items():
            self.curves.setdefault(f"group_{name}", []).append(value)
        figures = {name.replace("_", " "): values[-1] for name, values in self._fscil().items()}
        words = (f"{name} {'-' if value is None else f'{value:.2f}'}" for name, value in figures.items())
        log.info("Few-shot session %d: %s", len(self.accuracy_matrix) - 1, ", ".join(words))

    def _fscil(self) -> dict[str, list[float | None]]:
        """Return `metrics.fscil` with the averages over groups."""
        spans = metrics.spans(self.data.task_sizes[: len(self.accuracy_matrix)])
        per_task = [sum(self.test_counts[first : last + 1]) for first, last in spans]
        groups = {name: self.curves[name] for name in ("group_old", "group_new", "group_harmonic_mean")}
        return {**metrics.fscil(self.accuracy_matrix, per_task), **groups}

    def log_end(self) -> None:
        """Log PyCIL's last lines."""
        log.info("Accuracy Matrix (CNN): %s", [[round(value, 2) for value in row] for row in self.accuracy_matrix])
        log.info("Forgetting (CNN): %s", round(metrics.forgetting(self.accuracy_matrix), 2))

    def to_dict(self, memory_bytes: Amounts, memory_units: Amounts, cost: dict[str, Any]) -> dict[str, Any]:
        """Return the content of `results.json`.

        Args:
            memory_bytes: what the run keeps, by kind; a kind that the report does not know is shown by its name.
            memory_units: exemplars counted in raw images.
            cost: see `utils.training.ledger.Ledger.report`.
        """
        matrix, counts, split = self.accuracy_matrix, self.data.class_counts, self.data.split
        accuracies = self.class_accuracies[-1]
        return {
            **self.header,
            "finished": len(matrix) == self.data.num_tasks,
            "task_sizes": self.data.task_sizes, "class_order": self.data.class_order,
            "class_names": self.data.class_names, "accuracy_matrix": matrix,
            "top1_curve": self.curves["cnn_top1"], "top5_curve": self.curves["cnn_top5"],
            "nme_top1_curve": self.curves.get("nme_top1"), "val_top1_curve": self.curves.get("val_top1"),
            "task_incremental_curve": self.curves["task_incremental"], "train_seconds": self.curves["train_seconds"],
            "average_incremental_accuracy": fmean(self.curves["cnn_top1"]),  # Rebuffi et al., 2017
            "final_accuracy": self.curves["cnn_top1"][-1],
            "forgetting": metrics.forgetting(matrix),
            "class_forgetting": metrics.class_forgetting(self.class_accuracies),
            "backward_transfer": metrics.backward_transfer(matrix),
            "per_class_accuracy": accuracies, "train_counts": counts, "test_counts": self.test_counts,
            "few_shot_indices": self.data.few_shot_indices or None,
            "fscil": self._fscil() if split.kshot else None,
            "long_tail": metrics.many_medium_few(accuracies, counts) if self.data.long_tailed else None,
            "replay_quality": self.replay_quality,
            "memory_bytes": memory_bytes, "memory_units": memory_units,
            "seconds": seconds_of(cost.get("total", {})), "cost": cost,
        }  # fmt: skip


SUMMARISED = ("final_accuracy", "average_incremental_accuracy", "forgetting", "backward_transfer")


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return mean and sample standard deviation over seeds (0.0 for one seed) of the headline figures.

    Few-shot runs also have the figures of their last session, under ``fscil``.
    """
    spreads = {name: _spread([result[name] for result in results]) for name in SUMMARISED}
    summary = {"seeds": [result["seed"] for result in results], **spreads}
    if runs := [result["fscil"] for result in results if result.get("fscil")]:
        last = {name: [figures[name][-1] for figures in runs] for name in metrics.FSCIL}
        summary["fscil"] = {name: _spread(values) for name, values in last.items() if None not in values}
    return summary


def _spread(values: list[float]) -> dict[str, float]:
    return {"mean": fmean(values), "std": stdev(values) if len(values) > 1 else 0.0}
