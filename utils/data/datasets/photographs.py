"""Photographs, which stay files: class folders and published archives in `data_dir`."""

from __future__ import annotations

import json
from functools import partial
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


def read_lists(folder: Path, offline: bool, train: str, test: str) -> LoadedData:
    """Read a data set from its published lists, lines of an image below ``folder`` and the number of its class.

    A class is called as the folder of its first training image; numbers follow the lists.

    Args:
        train, test: names of the lists in ``folder``.

    Raises:
        ValueError: if a line is of another form, if the numbers leave one out, or if a class has no image in a list.
    """
    rows = [list(_read_table(folder / name).items()) for name in (train, test)]
    numbers = {number: Path(path).parent.name for path, number in reversed(rows[0])}
    order = [str(number) for number in range(len(numbers))]
    if any({number for _, number in split} != {*order} for split in rows) or len({*numbers.values()}) < len(order):
        raise ValueError(f"{folder / train} and {test} do not number the same folders from 0 on")
    splits = [{numbers[number]: [] for number in order} for _ in rows]
    for files, split in zip(splits, rows):
        for path, number in split:
            place, name = folder / path, numbers[number]
            # ImageNet's val comes in one folder, but most sort it into those of the classes.
            files[name].append(str(place if place.exists() else place.parent / name / place.name))
    return read_files(*splits, folder)


def listed(lists: tuple[str, str], folders: tuple[str, ...]) -> Provider:
    """Return the provider of a data set that is published as a list for each split."""
    said, missing = f"the published lists {' and '.join(lists)} in {{folder}}", "put the published lists"
    remedy = f"{missing} {' and '.join(lists)} beside the images that they name, into {{folder}}"
    return Provider(partial(read_lists, train=lists[0], test=lists[1]), said, remedy, folders, parts=lists)


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
IMAGENET_LT = listed(("ImageNet_LT_train.txt", "ImageNet_LT_test.txt"), IMAGENET_FOLDERS)  # of one tree with ImageNet
INAT = listed(("iNaturalist18_train.txt", "iNaturalist18_val.txt"), ("iNaturalist18", "inat2018"))
FIRST = {"test_folders": EITHER, "provider": FIRST_CLASSES}

for name, recipe in {
    "tiny_imagenet": DatasetRecipe("imagenet", image_size=64, folders=TINY_FOLDERS, **IMAGENET),
    "imagenet100": DatasetRecipe("imagenet", image_size=LARGE_SIDE, **IMAGENET | FIRST),
    "imagenet100_64": DatasetRecipe("none", HALF, HALF, None, ("imagenet100",), view=squash_and_crop, **FIRST),
    "imagenet100_autoaugment": DatasetRecipe(folders=("imagenet100", "ImageNet100"), **AUTO, **FIRST),
    "imagenet1000": DatasetRecipe("imagenet_jitter", image_size=LARGE_SIDE, folders=IMAGENET_FOLDERS, **IMAGENET),
    "imagenet_lt": DatasetRecipe("imagenet_jitter", image_size=LARGE_SIDE, provider=IMAGENET_LT, **IMAGENET),
    "inaturalist2018": DatasetRecipe("imagenet_jitter", image_size=LARGE_SIDE, provider=INAT, **IMAGENET),
    "imagenetr": DatasetRecipe(folders=("imagenet-r",), test_folders=EITHER, **VIT),
    "cub": DatasetRecipe(folders=("cub200",), **VIT),
    "cub_official": DatasetRecipe(provider=CUB, **VIT),
    "food101": DatasetRecipe(folders=("Food101",), provider=FOOD, **AUTO),
    "caltech256": DatasetRecipe(folders=("Caltech256",), left_out=("257.clutter",), **AUTO),
    "places100": DatasetRecipe(folders=("Places100",), **AUTO),
}.items():
    DATASETS.register(name)(recipe)
