"""A source of features: one Gaussian per class, in the feature space of the classifier as it was."""

from pathlib import Path

import torch
from torch import nn

from synth.base import ReplaySource
from synth.requests import Requests, draw_noise
from utils.data.batches import test_batches
from utils.data.images import FeatureSet, ImageSet, Samples
from utils.data.manager import Task
from utils.data.transforms import classifier_transform
from utils.run.files import load_tensors, save_tensors


class Gaussians(ReplaySource):
    """Mean and deviation of every class's features; a sample is drawn around the mean."""

    samples = "features"

    def __init__(self, *args):
        super().__init__(*args)
        self.moments: dict[int, torch.Tensor] = {}  # class -> (2, D)

    def fit_after(self, task: Task, images: ImageSet, past: Samples, exemplars: ImageSet, encoder: nn.Module) -> None:
        transform = classifier_transform(self.dataset)
        with torch.no_grad():
            batches = test_batches(images, transform, 64, self.run.device)
            features = torch.cat([encoder.eval().features(batch).float().cpu() for batch in batches])
        for label in task.classes:
            own = features[images.labels == label]
            self.moments[label] = torch.stack([own.mean(0), own.std(0)])
        self.fitted_classes |= set(task.classes)

    def generate(self, requests: Requests) -> FeatureSet:
        self.require_fitted(requests.labels)
        means, deviations = torch.stack([self.moments[label] for label in requests.labels.tolist()]).unbind(1)
        noise = draw_noise(requests.generators(), means.shape[1:])
        return FeatureSet.of(means + deviations * noise, requests.labels)

    def save(self, directory: Path) -> None:
        save_tensors(directory / "moments.safetensors", {str(label): value for label, value in self.moments.items()})

    def load(self, directory: Path) -> None:
        self.moments = {int(label): value for label, value in load_tensors(directory / "moments.safetensors").items()}
        self.fitted_classes = set(self.moments)
