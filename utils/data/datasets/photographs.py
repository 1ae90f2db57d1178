"""Photographs, which stay files: class folders and published archives in `data_dir`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torchvision.transforms.v2.functional as F
from torch import Tensor

from utils.data.datasets import DATASETS
from utils.data.datasets.base import IMAGENET_MEAN, IMAGENET_STD, LARGE_SIDE, Images, Recipe
from utils.data.datasets.folders import list_class_names, read_files, read_folders
from utils.data.transforms import square

EITHER = ("test", "val")
IMAGENET_FOLDERS = ("imagenet1000", "imagenet")
FOOD_FOLDER = "food-101"
CUB_FOLDER = "CUB_200_2011"
CUB_TABLES = ("images", "train_test_split", "image_class_labels", "classes")


@dataclass(frozen=True)
class FirstOfImageNet:
    """ImageNet-100 of PyCIL: the first 100 of the 1000 sorted classes after the shuffle of seed 1993.

    The chosen classes are sorted again, so the labels are those of a folder that holds only them.
    """

    num_classes: int = 100
    fetchable: bool = False

    def describe(self, data_dir: Path) -> tuple[bool, str]:
        folder = self._folder(data_dir)
        if folder is None:
            return False, f"class folders of all ImageNet in {data_dir / IMAGENET_FOLDERS[0]} would do as well"
        return True, f"{self.num_classes} of the classes in {folder}"

    def load(self, data_dir: Path, offline: bool) -> Images:
        folder = self._folder(data_dir)
        if folder is None:
            raise FileNotFoundError(f"no class folders of all ImageNet in {data_dir / IMAGENET_FOLDERS[0]} either")
        names = list_class_names(folder / "train")
        if len(names) != 1000:
            raise ValueError(f"{folder} has {len(names)} classes, not the 1000 that ImageNet-100 is drawn from")
        order = np.random.RandomState(1993).permutation(1000)[: self.num_classes]
        return read_folders(folder, EITHER, [names[i] for i in sorted(order)])

    def _folder(self, data_dir: Path) -> Path | None:
        folders = [data_dir / name for name in IMAGENET_FOLDERS]
        return next((folder for folder in folders if (folder / "train").is_dir()), None)


@dataclass(frozen=True)
class OfficialCub:
    """CUB-200-2011 as published, with the split of `train_test_split.txt` (Wah et al., 2011)."""

    num_classes: int = 200
    fetchable: bool = False

    def describe(self, data_dir: Path) -> tuple[bool, str]:
        folder = data_dir / CUB_FOLDER
        if (folder / "train_test_split.txt").is_file():
            return True, f"CUB-200-2011 and its official split in {folder}"
        return False, f"the published archive, unpacked as {folder} with images.txt beside images/, is read as it is"

    def load(self, data_dir: Path, offline: bool) -> Images:
        present, text = self.describe(data_dir)
        if not present:
            raise FileNotFoundError(text)
        folder = data_dir / CUB_FOLDER
        paths, splits, labels, names = (_read_table(folder / f"{name}.txt") for name in CUB_TABLES)
        train, test = ({name: [] for name in names.values()} for _ in range(2))
        for image, path in paths.items():
            files, name = {"1": train, "0": test}.get(splits.get(image)), names.get(labels.get(image))
            if files is None or name is None:
                raise ValueError(f"the tables of {folder} give no split or no class for image {image}, {path}")
            files[name].append(str(folder / "images" / path))
        return read_files(train, test, text)


@dataclass(frozen=True)
class OfficialFood:
    """Food-101 as torchvision downloads it, with its published split (Bossard et al., ECCV 2014)."""

    num_classes: int = 101
    fetchable: bool = True

    def describe(self, data_dir: Path) -> tuple[bool, str]:
        folder = data_dir / FOOD_FOLDER
        if (folder / "meta").is_dir() and (folder / "images").is_dir():
            return True, f"torchvision's Food101 and its official split in {folder}"
        return False, f"torchvision's Food101, to be downloaded into {folder} (5 GB)"

    def load(self, data_dir: Path, offline: bool) -> Images:
        import torchvision

        torchvision.datasets.Food101(str(data_dir), download=not offline)
        folder = data_dir / FOOD_FOLDER
        train, test = (_food_files(folder, split) for split in ("train", "test"))
        return read_files(train, test, f"torchvision's Food101 and its official split in {folder}")


def squashed_middle(image: Tensor) -> Tensor:
    """ImageNet as GUIDE sees it (GUIDE card, 4): uint8 (..., C, H, W) squashed to 76x76, then the middle 64x64."""
    return F.center_crop(square(image, 76, "bilinear"), [64, 64])


def _food_files(folder: Path, split: str) -> dict[str, list[str]]:
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
    short = [number for number, row in enumerate(rows, 1) if len(row) != 2]
    if short:
        raise ValueError(f"{path}, line {short[0]}: not an id and a value")
    return dict(rows)


IMAGENET = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "test_folders": EITHER}
# ASP and PILOT feed these to a ViT as pixels in [0, 1], without mean and deviation (ASP card, 2.4).
ASP = {"augmentation": "asp", "mean": (0.0,) * 3, "std": (1.0,) * 3, "image_size": LARGE_SIDE}
# ESCORT treats all of its data sets alike (ESCORT card, 1.6).
ESCORT = {"augmentation": "escort", "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "image_size": LARGE_SIDE}

for name, recipe in {
    "tiny_imagenet": Recipe("imagenet", folders=("tiny-imagenet-200", "tiny-imagenet"), image_size=64, **IMAGENET),
    "imagenet100": Recipe("imagenet", image_size=LARGE_SIDE, provider=FirstOfImageNet(), **IMAGENET),
    "imagenet100_64": Recipe(
        "none",
        (0.5,) * 3,
        (0.5,) * 3,
        folders=("imagenet100",),
        test_folders=EITHER,
        provider=FirstOfImageNet(),
        view=squashed_middle,
    ),
    "imagenet1000": Recipe("imagenet_jitter", image_size=LARGE_SIDE, folders=IMAGENET_FOLDERS, **IMAGENET),
    "imagenetr": Recipe(folders=("imagenet-r",), test_folders=EITHER, **ASP),
    "cub": Recipe(folders=("cub200",), **ASP),
    "cub_official": Recipe(provider=OfficialCub(), **ASP),
    "food101": Recipe(folders=("Food101",), provider=OfficialFood(), **ESCORT),
    "caltech256": Recipe(folders=("Caltech256",), left_out=("257.clutter",), **ESCORT),
    "places100": Recipe(folders=("Places100",), **ESCORT),
    "imagenet100_escort": Recipe(
        folders=("imagenet100", "ImageNet100"), test_folders=EITHER, provider=FirstOfImageNet(), **ESCORT
    ),
}.items():
    DATASETS.register(name)(recipe)
