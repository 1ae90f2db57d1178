"""Photographs, which stay files: class folders and published archives in `data_dir`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torchvision.transforms.v2.functional as F
from torch import Tensor

from utils.data.datasets import DATASETS
from utils.data.datasets.base import IMAGENET_MEAN, IMAGENET_STD, LARGE_SIDE, DatasetRecipe, LoadedData, Provider
from utils.data.datasets.folders import list_class_names, read_files, read_folders
from utils.data.transforms import resize_to_square

EITHER, HALF = ("test", "val"), (0.5,) * 3
IMAGENET_FOLDERS, TINY_FOLDERS = ("imagenet1000", "imagenet"), ("tiny-imagenet-200", "tiny-imagenet")
CUB_TABLES = ("images", "train_test_split", "image_class_labels", "classes")


def read_first_of_imagenet(folder: Path, offline: bool) -> LoadedData:
    """Read ImageNet-100 of PyCIL: the first 100 of the 1000 sorted classes after the shuffle of seed 1993.

    The chosen classes are sorted again, so the labels are those of a folder that holds only them.
    """
    names = list_class_names(folder / "train")
    if len(names) != 1000:
        raise ValueError(f"{folder} has {len(names)} classes, not the 1000 that ImageNet-100 is drawn from")
    others = np.random.RandomState(1993).permutation(1000)[100:]
    return read_folders(folder, EITHER, left_out={names[i] for i in others})


def read_cub(folder: Path, offline: bool) -> LoadedData:
    """Read CUB-200-2011 as published, with the split of `train_test_split.txt` (Wah et al., 2011)."""
    paths, splits, labels, names = (_read_table(folder / f"{name}.txt") for name in CUB_TABLES)
    train, test = ({name: [] for name in names.values()} for _ in range(2))
    for image, path in paths.items():
        files, name = {"1": train, "0": test}.get(splits.get(image)), names.get(labels.get(image))
        if files is None or name is None:
            raise ValueError(f"the tables of {folder} give no split or no class for image {image}, {path}")
        files[name].append(str(folder / "images" / path))
    return read_files(train, test, folder)


def read_food(folder: Path, offline: bool) -> LoadedData:
    """Read Food-101 as torchvision downloads it, with its published split (Bossard et al., ECCV 2014)."""
    import torchvision

    torchvision.datasets.Food101(str(folder.parent), download=not offline)
    train, test = (_list_food(folder, split) for split in ("train", "test"))
    return read_files(train, test, folder)


def squash_and_crop(image: Tensor) -> Tensor:
    """Squash photographs, uint8 (..., C, H, W), to 76x76 and cut out the middle 64x64.

    So the code of Cywiński et al., arXiv:2403.03938, reads ImageNet.
    """
    return F.center_crop(resize_to_square(image, 76, "bilinear"), [64, 64])


def _list_food(folder: Path, split: str) -> dict[str, list[str]]:
    """Paths by class, sorted as class folders would be."""
    images = json.loads((folder / "meta" / f"{split}.json").read_text(encoding="utf-8"))
    files = {name: sorted(str(folder / "images" / f"{image}.jpg") for image in images[name]) for name in sorted(images)}
    missing = next((path for paths in files.values() for path in paths if not Path(path).is_file()), None)
    if missing is not None:
        # torchvision unpacks nothing where the folder is there, whatever an interrupted unpacking left out.
        raise FileNotFoundError(f"{missing} is missing; delete {folder} to unpack it anew")
    return files


def _read_table(path: Path) -> dict[str, str]:
    """Lines of an id and a value, divided by a blank, in their order."""
    rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for number, row in enumerate(rows, 1):
        if len(row) != 2:
            raise ValueError(f"{path}, line {number}: not an id and a value")
    return dict(rows)


IMAGENET = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "test_folders": EITHER}
# PILOT feeds these to a ViT as pixels in [0, 1], without mean and deviation.
VIT = {"augmentation": "vit_crop", "mean": (0.0,) * 3, "std": (1.0,) * 3, "image_size": LARGE_SIDE}
# Duan et al., arXiv:2311.18266, treat all of their data sets alike.
AUTO = {"augmentation": "auto_augment", "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "image_size": LARGE_SIDE}
FIRST_CLASSES = Provider(read_first_of_imagenet, "100 of the classes in {folder}",
                         "class folders of all ImageNet in {folder} would do as well", IMAGENET_FOLDERS,
                         parts=("train",))  # fmt: skip
CUB = Provider(
    read_cub, "CUB-200-2011 and its official split in {folder}",
    "the published archive, unpacked as {folder} with images.txt beside images/, is read as it is",
    ("CUB_200_2011",), parts=("train_test_split.txt",))  # fmt: skip
FOOD = Provider(
    read_food, "torchvision's Food101 and its official split in {folder}",
    "torchvision's Food101, to be downloaded into {folder} (5 GB)", ("food-101",), ("meta", "images"), fetchable=True,
)  # fmt: skip
FIRST = {"test_folders": EITHER, "provider": FIRST_CLASSES}

for name, recipe in {
    "tiny_imagenet": DatasetRecipe("imagenet", image_size=64, folders=TINY_FOLDERS, **IMAGENET),
    "imagenet100": DatasetRecipe("imagenet", image_size=LARGE_SIDE, **IMAGENET | FIRST),
    "imagenet100_64": DatasetRecipe("none", HALF, HALF, None, ("imagenet100",), view=squash_and_crop, **FIRST),
    "imagenet100_autoaugment": DatasetRecipe(folders=("imagenet100", "ImageNet100"), **AUTO, **FIRST),
    "imagenet1000": DatasetRecipe("imagenet_jitter", image_size=LARGE_SIDE, folders=IMAGENET_FOLDERS, **IMAGENET),
    "imagenetr": DatasetRecipe(folders=("imagenet-r",), test_folders=EITHER, **VIT),
    "cub": DatasetRecipe(folders=("cub200",), **VIT),
    "cub_official": DatasetRecipe(provider=CUB, **VIT),
    "food101": DatasetRecipe(folders=("Food101",), provider=FOOD, **AUTO),
    "caltech256": DatasetRecipe(folders=("Caltech256",), left_out=("257.clutter",), **AUTO),
    "places100": DatasetRecipe(folders=("Places100",), **AUTO),
}.items():
    DATASETS.register(name)(recipe)
