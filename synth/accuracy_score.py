"""Classification accuracy score: what a classifier that has only seen generated images gets right of real ones."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from models.heads import LinearHead
from models.incremental import IncrementalNet
from models.options import BackboneOptions
from models.timm_backbone import build_backbone
from utils.data.batches import Batch, ImageBatches, test_batches
from utils.data.datasets import Dataset
from utils.data.images import ImageSet
from utils.data.manager import Task
from utils.data.transforms import classifier_transform
from utils.training import seeding
from utils.training.fit import Training, fit
from utils.training.run import Run
from utils.training.runtime import Runtime
from utils.training.schedule import TrainConfig

BATCH, RATE, DECAY = 64, 0.1, 5e-4


def score_images(images: ImageSet, dataset: Dataset, epochs: int, seed: int, runtime: Runtime) -> Tensor:
    """Train a new ResNet on images and test it on the data set's own; Ravuri and Vinyals, 2019, arXiv:1905.10887.

    A ResNet-20 for small images, a ResNet-18 for others, by SGD with cosine decay.

    Args:
        images: labelled by original class id.
        dataset: its test images of the same classes are classified.
        epochs: at least 1.
        seed: of weights and batches.
        runtime: device.

    Returns:
        For every test image 100.0 if it was right, else 0.0; their mean is the score in percent.
    """
    test, transform = dataset.test.select(images.classes), classifier_transform(dataset)
    task = Task(0, range(dataset.num_classes), tuple(dataset.class_names))
    seeding.seed_everything(seed, "accuracy score")
    options = BackboneOptions("cifar" if dataset.in_memory else "imagenet", dataset.image_size)
    backbone = build_backbone("resnet20" if dataset.in_memory else "resnet18", options)
    network = IncrementalNet(backbone, LinearHead(backbone.num_features))
    network.grow(task.num_seen, seeding.generator(seed, "accuracy score"))
    network.to(runtime.device)

    def loss(batch: Batch) -> dict[str, Tensor]:
        return {"cross_entropy": F.cross_entropy(network(batch.images), batch.labels)}

    with tempfile.TemporaryDirectory() as folder:  # nothing of this training is kept
        run = Run(Path(folder), seed, runtime)
        batches = ImageBatches(images, None, run.loading(transform, BATCH, 0, "score", network=network))
        schedule = TrainConfig(RATE, epochs, weight_decay=DECAY, schedule="cosine")
        fit(network, batches, loss, schedule, Training(run, task, "score"))
    network.eval()
    with torch.no_grad():
        views = test_batches(test, transform, BATCH, runtime.device, run.num_workers)
        predictions = torch.cat([network(view).argmax(1).cpu() for view in views])
    return 100.0 * (predictions == test.labels)
