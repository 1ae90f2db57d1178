"""Small-image benchmarks that torchvision can download."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.data.datasets import DATASETS
from utils.data.datasets.base import CIFAR100_MEAN, CIFAR100_STD, DatasetRecipe, LoadedData, pack_tensors

CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


@dataclass(frozen=True)
class Torchvision:
    """A data set of ``torchvision.datasets``: uint8 (N, H, W) or (N, H, W, 3) under `data`, labels under `targets`.

    Args:
        class_name: the class in ``torchvision.datasets``.
        folder: what it unpacks into, below ``data_dir``.
    """

    class_name: str
    folder: str
    num_classes: int = 10
    fetchable: bool = True

    def describe(self, data_dir: Path) -> tuple[bool, str]:
        if (data_dir / self.folder).is_dir():
            return True, f"torchvision's {self.class_name} in {data_dir / self.folder}"
        return False, f"torchvision's {self.class_name}, to be downloaded into {data_dir / self.folder}"

    def load(self, data_dir: Path, offline: bool) -> LoadedData:
        import torchvision

        dataset = getattr(torchvision.datasets, self.class_name)
        # With download=True, torchvision fetches only what is not there yet.
        splits = [dataset(str(data_dir), train=train, download=not offline) for train in (True, False)]
        names = [name.split(" - ")[0] for name in splits[0].classes]  # MNIST calls its classes "0 - zero"
        source = f"torchvision's {self.class_name} in {data_dir / self.folder}"
        return pack_tensors(*map(_read_arrays, splits), names, source)


def _read_arrays(split) -> tuple[Tensor, Tensor]:
    images = torch.from_numpy(np.asarray(split.data))
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    return images, torch.as_tensor(split.targets, dtype=torch.int64)


MNIST, FASHION_MNIST = Torchvision("MNIST", "MNIST"), Torchvision("FashionMNIST", "FashionMNIST")
CIFAR10 = Torchvision("CIFAR10", "cifar-10-batches-py")
CIFAR100 = Torchvision("CIFAR100", "cifar-100-python", num_classes=100)

for name, recipe in {
    "mnist": DatasetRecipe("crop", (0.1307,) * 3, (0.3081,) * 3, provider=MNIST),
    "fashion_mnist": DatasetRecipe("cifar", (0.2860,) * 3, (0.3530,) * 3, provider=FASHION_MNIST),
    "cifar10": DatasetRecipe("cifar", CIFAR10_MEAN, CIFAR10_STD, provider=CIFAR10),
    "cifar100": DatasetRecipe("cifar", CIFAR100_MEAN, CIFAR100_STD, provider=CIFAR100),
    # PILOT's CIFAR-100 for ViTs: 32x32 straight to 224, pixels in [0, 1] without mean and deviation.
    "cifar224": DatasetRecipe("vit_crop", (0.0,) * 3, (1.0,) * 3, 224, folders=("cifar100",), provider=CIFAR100),
}.items():
    DATASETS.register(name)(recipe)
