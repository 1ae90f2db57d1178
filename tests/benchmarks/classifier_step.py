"""Images per second of a classifier's training: our loop against a plain one in PyCIL's way.

`python -m tests.benchmarks.classifier_step`; exit code 1 if a ratio falls short. Run it on an idle machine.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from models.heads import LinearHead
from tests.benchmarks.parts import cpu_run, new_classifier, pictures, training
from tests.benchmarks.timing import alternate, fast_precision, verdict
from utils.data.images import ImageSet
from utils.data.transforms import AUGMENTATIONS, ClassifierTransform
from utils.training.run import Run
from utils.training.schedule import TrainConfig

NUM_IMAGES, BATCH, WORKERS = 2560, 128, 8  # twenty steps a segment
MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


class PlainImages(Dataset):
    """PIL transforms image by image, as PyCIL's DummyDataset does it."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images, self.labels = images, labels
        self.transform = transforms.Compose([
            transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(brightness=63 / 255), transforms.ToTensor(), transforms.Normalize(MEAN, STD),
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        return index, self.transform(Image.fromarray(self.images[index])), self.labels[index]


def plain_arm(images: ImageSet):
    """One epoch per call: a loader with workers, fp32, the running accuracy that PyCIL keeps."""
    network = new_classifier("resnet32", LinearHead).train()
    pixels = images.parts[0].images.permute(0, 2, 3, 1).numpy()
    loader = DataLoader(PlainImages(pixels, images.labels.numpy()), BATCH, shuffle=True, num_workers=WORKERS)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, 0.9, weight_decay=5e-4)

    def epoch() -> int:
        losses, correct = 0.0, 0
        for _, inputs, targets in loader:
            logits = network(inputs)
            loss = F.cross_entropy(logits, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses += loss.item()
            correct += logits.argmax(1).eq(targets).sum().item()
        return NUM_IMAGES

    return epoch


def our_arm(images: ImageSet, run: Run):
    """One epoch per call through `fit`, its checkpoint and log included."""
    network = new_classifier("resnet32", LinearHead).to(run.device, memory_format=torch.channels_last)
    transform = ClassifierTransform(AUGMENTATIONS["cifar"], 32, MEAN, STD, in_memory=True)
    return training(
        run, network, images, transform, BATCH,
        lambda batch: {"ce": F.cross_entropy(network(batch.images), batch.labels)},
        TrainConfig(epochs=1, lr=0.1, weight_decay=5e-4),
    )  # fmt: skip


def main() -> int:
    images = pictures(NUM_IMAGES, 32, 10)
    print(f"ResNet-32, batch {BATCH}, {NUM_IMAGES} images of 32x32, {torch.get_num_threads()} threads; images/s:")
    with tempfile.TemporaryDirectory() as folder:
        arms = {"plain (PyCIL's way), fp32": plain_arm(images)}
        runs = {name: cpu_run(Path(folder) / name, name) for name in sorted({"fp32", fast_precision()})}
        arms |= {f"ours, {name}": our_arm(images, run) for name, run in runs.items()}
        rates = alternate(arms)
    for name, rate in rates.items():
        print(f"{name}: {rate:.0f} images/s")
    plain = rates.pop("plain (PyCIL's way), fp32")
    wanted = {"ours, fp32": 1.35, "ours, bf16": 2.5}
    good = [verdict(f"{name} against plain", rate / plain, wanted[name]) for name, rate in rates.items()]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
