"""Small-image benchmarks that torchvision can download."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.data.datasets import DATASETS
from utils.data.datasets.base import CIFAR100_MEAN, CIFAR100_STD, DatasetRecipe, LoadedData, Provider
from utils.data.transforms import resize_to_square

CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def torchvision_provider(name: str, folder: str) -> Provider:
    """Return the provider of a class of ``torchvision.datasets``, which unpacks into this folder of ``data_dir``."""
    found, absent = f"torchvision's {name} in {{folder}}", f"torchvision's {name}, to be downloaded into {{folder}}"
    return Provider(partial(_read_torchvision, name), found, absent, (folder,), parts=(".",), fetchable=True)


def _read_torchvision(name: str, folder: Path, offline: bool) -> LoadedData:
    import torchvision

    dataset, splits = getattr(torchvision.datasets, name), []
    for train in (True, False):
        # With download=True, torchvision fetches only what is not there yet.
        split = dataset(str(folder.parent), train=train, download=not offline)
        images = torch.from_numpy(np.asarray(split.data))  # uint8 (N, H, W) or (N, H, W, 3)
        images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
        splits.append((images, torch.as_tensor(split.targets, dtype=torch.int64)))
    names = [name.split(" - ")[0] for name in split.classes]  # MNIST calls its classes "0 - zero"
    return LoadedData(splits, names, channels=images.shape[1])


def shrink_to_12(images: Tensor) -> Tensor:
    """Shrink images, uint8 (..., C, H, W), to 12x12."""
    return resize_to_square(images, 12, "bilinear")


MNIST, FASHION_MNIST = (torchvision_provider(name, name) for name in ("MNIST", "FashionMNIST"))
CIFAR10 = torchvision_provider("CIFAR10", "cifar-10-batches-py")
CIFAR100 = torchvision_provider("CIFAR100", "cifar-100-python")

for name, recipe in {
    "mnist": DatasetRecipe("crop", (0.1307,) * 3, (0.3081,) * 3, provider=MNIST),
    "fashion_mnist": DatasetRecipe("cifar", (0.2860,) * 3, (0.3530,) * 3, provider=FASHION_MNIST),
    # Small enough for a processor; whole garments, so none is cropped or mirrored.
    "fashion_mnist12": DatasetRecipe("none", (0.2879,) * 3, (0.3120,) * 3, provider=FASHION_MNIST, view=shrink_to_12),
    "cifar10": DatasetRecipe("cifar", CIFAR10_MEAN, CIFAR10_STD, provider=CIFAR10),
    "cifar100": DatasetRecipe("cifar", CIFAR100_MEAN, CIFAR100_STD, provider=CIFAR100),
    "cifar10_aa": DatasetRecipe("cifar_aa", CIFAR10_MEAN, CIFAR10_STD, folders=("cifar10",), provider=CIFAR10),
    "cifar100_aa": DatasetRecipe("cifar_aa", CIFAR100_MEAN, CIFAR100_STD, folders=("cifar100",), provider=CIFAR100),
    # PILOT's CIFAR-100 for ViTs: 32x32 straight to 224, pixels in [0, 1] without mean and deviation.
    "cifar224": DatasetRecipe("vit_crop", (0.0,) * 3, (1.0,) * 3, 224, folders=("cifar100",), provider=CIFAR100),
}.items():
    DATASETS.register(name)(recipe)
