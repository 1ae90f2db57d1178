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
from models.incremental import IncrementalNet
from models.options import BackboneOptions
from models.timm_backbone import build_backbone
from tests.benchmarks.timing import alternate, verdict
from utils.data.batches import ImageBatches
from utils.data.images import ImageSet
from utils.data.transforms import AUGMENTATIONS, ClassifierTransform
from utils.training.fit import Training, fit
from utils.training.run import Run
from utils.training.runtime import Runtime, fast_bf16
from utils.training.schedule import TrainConfig

NUM_IMAGES, BATCH, WORKERS = 2560, 128, 8  # twenty steps a segment
MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


class PlainImages(Dataset):
    """PIL transforms image by image, as PyCIL's DummyDataset does it."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images, self.labels = images, labels
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ColorJitter(brightness=63 / 255),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        return index, self.transform(Image.fromarray(self.images[index])), self.labels[index]


def new_network() -> IncrementalNet:
    torch.manual_seed(0)
    backbone = build_backbone("resnet32", BackboneOptions())
    network = IncrementalNet(backbone, LinearHead(backbone.num_features))
    network.grow(10)
    return network


def plain_arm(pixels: torch.Tensor, labels: torch.Tensor):
    """One epoch per call: a loader with workers, fp32, the running accuracy that PyCIL keeps."""
    network = new_network().train()
    images = PlainImages(pixels.permute(0, 2, 3, 1).numpy(), labels.numpy())
    loader = DataLoader(images, BATCH, shuffle=True, num_workers=WORKERS)
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


def our_arm(pixels: torch.Tensor, labels: torch.Tensor, precision: str, folder: Path):
    """One epoch per call through `fit`, its checkpoint and log included."""
    runtime = Runtime(["cpu"], precision)
    run = Run(folder / precision, 0, runtime, progress=False)
    network = new_network().to(memory_format=torch.channels_last)
    transform = ClassifierTransform(AUGMENTATIONS["cifar"], 32, MEAN, STD, in_memory=True)
    count = iter(range(10**6))

    def epoch() -> int:
        task = next(count)
        batches = ImageBatches(ImageSet.of(pixels, labels), None, run.loading(transform, BATCH, task, "bench"))
        config = TrainConfig(epochs=1, lr=0.1, weight_decay=5e-4)
        fit(
            network, batches, lambda batch: {"ce": F.cross_entropy(network(batch.images), batch.labels)}, config,
            Training(run, task, "bench"),
        )  # fmt: skip
        return NUM_IMAGES

    return epoch


def main() -> int:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (NUM_IMAGES, 3, 32, 32), generator=generator).to(torch.uint8)
    labels = torch.randint(10, (NUM_IMAGES,), generator=generator)
    print(f"ResNet-32, batch {BATCH}, {NUM_IMAGES} images of 32x32, {torch.get_num_threads()} threads; images/s:")
    with tempfile.TemporaryDirectory() as folder:
        arms = {"plain (PyCIL's way), fp32": plain_arm(pixels, labels)}
        arms["ours, fp32"] = our_arm(pixels, labels, "fp32", Path(folder))
        if fast_bf16(torch.device("cpu")):
            arms["ours, bf16"] = our_arm(pixels, labels, "bf16", Path(folder))
        rates = alternate(arms)
    plain = rates["plain (PyCIL's way), fp32"]
    for name, rate in rates.items():
        print(f"{name}: {rate:.0f} images/s")
    good = verdict("fp32 against plain", rates["ours, fp32"] / plain, 1.35)
    if "ours, bf16" in rates:
        good &= verdict("bf16 against plain", rates["ours, bf16"] / plain, 2.5)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
