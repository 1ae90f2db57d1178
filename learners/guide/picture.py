"""What bending does to some images, for the report."""

from __future__ import annotations

import torch
from torch import Tensor

from learners.base import Learner
from synth.requests import Requests
from utils.data.manager import Task
from utils.results.panels import Cell, Panel, PanelRow

PICTURED = 8  # replay images of a task
NOTE = "Replay from the same noise, and how sure the trained classifier is of its class and of the likeliest new one."


def picture(learner: Learner, task: Task) -> Panel:
    """Draw images from the same noise with and without bending, and say what the classifier sees in them."""
    labels = torch.linspace(0, task.num_old - 1, min(PICTURED, task.num_old)).round().long()
    requests, names = Requests.of_labels(labels, (learner.run.seed, "picture", task.index)), learner.data.class_names
    columns = []
    for guided in (False, True):
        images = learner.replay.draw(task, requests, guided)
        chances = learner.logits(images)[:, : task.num_seen].softmax(1)
        captions = [caption(names, label, task.num_old, row) for label, row in zip(labels.tolist(), chances)]
        columns.append([Cell(images.image(position), words) for position, words in enumerate(captions)])
    rows = [PanelRow(names[label], cells) for label, cells in zip(labels, zip(*columns))]
    return Panel("Guidance", NOTE, ["unguided", "guided"], rows, f"Task {task.index}")


def caption(names: list[str], label: int, num_old: int, probabilities: Tensor) -> str:
    """Write the probabilities, (num_seen,), of the class asked for and of the likeliest new one."""
    best_new = num_old + int(probabilities[num_old:].argmax())
    return " · ".join(f"{names[known]} {probabilities[known]:.0%}" for known in (label, best_new))
