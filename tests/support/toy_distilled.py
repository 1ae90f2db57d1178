"""A source that replaces the present: the classifier sees mean images of halves of a class, with soft targets."""

from collections.abc import Iterable
from pathlib import Path

import torch

from synth.base import ReplaySource
from synth.replay import Replay
from synth.requests import Requests
from utils.data.images import ImageSet
from utils.data.manager import Task
from utils.run.files import load_tensors, save_tensors


class Distilled(Replay):
    """Distilled images stand for the new classes and the old ones; no real image trains the classifier."""

    def present(self, task: Task, real: ImageSet) -> ImageSet:
        return self.source.images(task.classes)

    def past(self, task: Task) -> ImageSet:
        return self.source.images(range(task.num_old))


class MeanImages(ReplaySource):
    """The mean images of halves of every class; each is a little unsure of its class."""

    usual_replay: type[Replay] | None = Distilled
    SURE = 0.9

    def __init__(self, *args):
        super().__init__(*args)
        self.means: dict[int, torch.Tensor] = {}  # class -> uint8 (2, C, H, W)

    def fit_before(self, task: Task, images: ImageSet) -> None:
        for label in task.classes:
            own = torch.cat([part.decoded().images for part in images.select([label]).parts])
            halves = [half.float().mean(0) for half in own.chunk(2)]
            self.means[label] = torch.stack(halves).round().to(torch.uint8)
        self.fitted_classes |= set(task.classes)

    def images(self, labels: Iterable[int]) -> ImageSet:
        """Return all images of classes with their soft targets."""
        return self.generate(Requests.of_classes(list(labels), 2, ("means",)))

    def generate(self, requests: Requests) -> ImageSet:
        self.require_fitted(requests.labels)
        rows = [self.means[label][copy % 2] for label, copy in zip(requests.labels.tolist(), requests.copy.tolist())]
        known = len(self.fitted_classes)
        targets = torch.full((len(rows), known), (1 - self.SURE) / (known - 1))
        targets = targets.scatter(1, requests.labels[:, None], self.SURE)
        return ImageSet.of(torch.stack(rows), requests.labels, soft_targets=targets)

    def save(self, directory: Path) -> None:
        save_tensors(directory / "means.safetensors", {str(label): value for label, value in self.means.items()})

    def load(self, directory: Path) -> None:
        self.means = {int(label): value for label, value in load_tensors(directory / "means.safetensors").items()}
        self.fitted_classes = set(self.means)
