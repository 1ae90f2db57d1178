"""Sources that are no more than their contract: one of features, and one whose images replace the present."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from synth.base import ReplaySource
from synth.replay import Replay
from synth.requests import Requests, draw_noise
from utils.data.batches import test_batches
from utils.data.images import FeatureSet, ImageSet, Samples
from utils.data.manager import Task
from utils.data.transforms import classifier_transform, stack_images
from utils.run.files import load_tensors, save_tensors


class Remembers(ReplaySource):
    """What it has learned of a class is one tensor."""

    def __init__(self, *args):
        super().__init__(*args)
        self.known: dict[int, torch.Tensor] = {}

    def learn(self, label: int, value: torch.Tensor) -> None:
        self.known[label] = value
        self.fitted_classes.add(label)

    def save(self, directory: Path) -> None:
        save_tensors(directory / "known.safetensors", {str(label): value for label, value in self.known.items()})

    def load(self, directory: Path) -> None:
        self.known = {int(label): value for label, value in load_tensors(directory / "known.safetensors").items()}
        self.fitted_classes = set(self.known)


class Gaussians(Remembers):
    """Mean and deviation of every class's features, (2, D); a sample is drawn around the mean."""

    samples = "features"

    def fit_after(self, task: Task, images: ImageSet, past: Samples, exemplars: ImageSet, encoder: nn.Module) -> None:
        transform = classifier_transform(self.dataset)
        with torch.no_grad():
            batches = test_batches(images, transform, 64, self.run.device)
            features = torch.cat([encoder.eval().features(batch).float().cpu() for batch in batches])
        for label in task.classes:
            own = features[images.labels == label]
            self.learn(label, torch.stack([own.mean(0), own.std(0)]))

    def generate(self, requests: Requests) -> FeatureSet:
        self.require_fitted(requests.labels)
        means, deviations = torch.stack([self.known[label] for label in requests.labels.tolist()]).unbind(1)
        noise = draw_noise(requests.generators(), means.shape[1:])
        return FeatureSet.of(means + deviations * noise, requests.labels)


class Distilled(Replay):
    """Distilled images stand for the new classes and the old ones; no real image trains the classifier."""

    def present(self, task: Task, real: ImageSet) -> ImageSet:
        return self.source.images(task.classes)

    def past(self, task: Task) -> ImageSet:
        return self.source.images(range(task.num_old))


class MeanImages(Remembers):
    """The mean images of halves of every class, uint8 (2, C, H, W); each is a little unsure of its class."""

    usual_replay: type[Replay] | None = Distilled
    SURE = 0.9

    def fit_before(self, task: Task, images: ImageSet) -> None:
        for label in task.classes:
            own = stack_images(images.select([label]), self.dataset.image_size)
            self.learn(label, torch.stack([half.float().mean(0) for half in own.chunk(2)]).round().to(torch.uint8))

    def images(self, labels: Iterable[int]) -> ImageSet:
        """Return all images of classes with their soft targets."""
        return self.generate(Requests.of_classes(list(labels), 2, ("means",)))

    def generate(self, requests: Requests) -> ImageSet:
        self.require_fitted(requests.labels)
        rows = [self.known[label][copy % 2] for label, copy in zip(requests.labels.tolist(), requests.copy.tolist())]
        known = len(self.fitted_classes)
        targets = torch.full((len(rows), known), (1 - self.SURE) / (known - 1))
        targets = targets.scatter(1, requests.labels[:, None], self.SURE)
        return ImageSet.of(torch.stack(rows), requests.labels, soft_targets=targets)
