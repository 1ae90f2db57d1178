"""Data sets by name: class folders in `data_dir` first, else a download or a package.

Any folder `<data_dir>/<name>/<train|test>/<class>/<image>` is a data set by its name alone.
"""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from utils.data.datasets.base import LARGE_FOLDER, LARGE_SIDE, SMALL_FOLDER, Dataset, Found, Images, Recipe
from utils.data.datasets.folders import describe_left_out, list_class_names, read_folders, read_through
from utils.run.errors import ConfigError, DataError
from utils.run.registry import Registry, nearest

__all__ = ["DATASETS", "PROVIDER_ERRORS", "Dataset", "Found", "find_dataset", "load_dataset"]

DATASETS: Registry[Recipe] = Registry("data set", __name__)
# What a download or an unpacking raises: no network, no right to write, a damaged archive.
PROVIDER_ERRORS = (OSError, RuntimeError, EOFError, ValueError, tarfile.TarError, zipfile.BadZipFile)


def load_dataset(name: str, data_dir: str | Path = "data", offline: bool = False) -> Dataset:
    """Read a data set: its class folders where there are any, else what its recipe provides.

    Args:
        name: a known data set (in any case), or a folder in ``data_dir``.
        data_dir: where data sets lie and downloads go.
        offline: fetch nothing.

    Raises:
        ConfigError: if the name is neither known nor a folder.
        DataError: if the data is absent and cannot be fetched, or is incomplete or broken.
    """
    place = _look_up(name, Path(data_dir))
    if place.folder is not None:
        test_folders = place.recipe.test_folders if place.recipe else ("test",)
        images = read_folders(place.folder, test_folders, left_out=place.left_out)
    elif place.recipe is not None and place.recipe.provider is not None:
        images = _provide(place, Path(data_dir), offline)
    else:
        raise DataError(place.absent)
    recipe = place.recipe or (SMALL_FOLDER if images.side else LARGE_FOLDER)
    if recipe.view is not None:
        images = read_through(images, recipe.view)
    return Dataset(
        name=name.lower() if place.recipe else name,
        train=images.train,
        test=images.test,
        class_names=images.class_names,
        image_size=recipe.image_size or images.side or LARGE_SIDE,
        channels=images.channels,
        in_memory=images.side is not None,
        mean=recipe.mean,
        std=recipe.std,
        augmentation=recipe.augmentation,
        source=images.source,
    )


def find_dataset(name: str, data_dir: str | Path = "data") -> Found:
    """Say what ``load_dataset`` would read, without reading an image or fetching anything.

    Raises:
        ConfigError: if the name is neither known nor a folder.
    """
    place = _look_up(name, Path(data_dir))
    if place.folder is not None:
        count = len(set(list_class_names(place.folder / "train")) - set(place.left_out))
        without = describe_left_out(place.folder, place.left_out)
        return Found(True, False, f"class folders in {place.folder}{without} ({count} classes)", count)
    provider = place.recipe.provider if place.recipe else None
    if provider is None:
        return Found(False, False, place.absent, None)
    present, text = provider.describe(Path(data_dir))
    text = text if present or provider.fetchable else f"{place.absent}; {text}"
    return Found(present, provider.fetchable, text, provider.num_classes)


class _Place(NamedTuple):
    """What a name stands for: a recipe, or None for a folder of the user's; class folders, or None."""

    recipe: Recipe | None
    folder: Path | None
    absent: str

    @property
    def left_out(self) -> tuple[str, ...]:
        return self.recipe.left_out if self.recipe else ()


def _look_up(name: str, data_dir: Path) -> _Place:
    known = name.lower() in DATASETS
    recipe = DATASETS[name.lower()] if known else None
    names = dict.fromkeys((name, name.lower(), *(recipe.folders if recipe else ())))
    folders = [data_dir / item for item in names]
    if recipe is None and not any(folder.is_dir() for folder in folders):
        raise ConfigError(
            f"unknown data set {name!r}{nearest(name.lower(), DATASETS.names()) or '.'} Known: "
            f"{', '.join(DATASETS.names())}, and any folder {folders[0]}/<train|test>/<class>/<image>"
        )
    absent = (
        f"the data set {name!r} is not there: looked for class folders in {', '.join(map(str, folders))}; "
        f"put its images into {folders[0]}/train/<class>/<image> and {folders[0]}/test/<class>/<image>"
    )
    # A folder without train/ may be something else, such as torchvision's MNIST on a disk that ignores case.
    found = [folder for folder in folders if (folder / "train").is_dir()]
    return _Place(recipe, found[0] if found else None, absent)


def _provide(place: _Place, data_dir: Path, offline: bool) -> Images:
    provider = place.recipe.provider
    try:
        return provider.load(data_dir, offline)
    except PROVIDER_ERRORS as error:
        if offline and provider.fetchable:
            raise DataError(f"{place.absent}; without --offline it would be downloaded into {data_dir}") from error
        tried = "Downloading" if provider.fetchable else "Deriving"
        raise DataError(f"{place.absent}. {tried} it failed: {str(error).strip()}") from error
