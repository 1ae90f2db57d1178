"""Data sets by name: class folders in `data_dir` first, else a download or a package.

Any folder `<data_dir>/<name>/<train|test>/<class>/<image>` is a data set by its name alone.
"""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from utils.data.datasets.base import (
    LARGE_FOLDER,
    LARGE_SIDE,
    SMALL_FOLDER,
    Availability,
    Dataset,
    DatasetRecipe,
    LoadedData,
)
from utils.data.datasets.folders import describe_left_out, list_class_names, read_folders, read_through
from utils.run.errors import ConfigError, DataError
from utils.run.registry import Registry, nearest

__all__ = ["DATASETS", "PROVIDER_ERRORS", "Availability", "Dataset", "find_dataset", "load_dataset"]

DATASETS: Registry[DatasetRecipe] = Registry("data set", __name__)
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
    location = _locate(name, Path(data_dir))
    if location.folder is None:
        data = _provide(location, Path(data_dir), offline)
    else:
        data = read_folders(location.folder, location.recipe.test_folders, left_out=location.recipe.left_out)
    recipe = location.recipe if location.known or not data.side else SMALL_FOLDER
    if recipe.view is not None:
        data = read_through(data, recipe.view)
    return Dataset(
        **data._asdict(),
        name=name.lower() if location.known else name,
        image_size=recipe.image_size or data.side or LARGE_SIDE,
        in_memory=data.side is not None,
        mean=recipe.mean,
        std=recipe.std,
        augmentation=recipe.augmentation,
    )


def find_dataset(name: str, data_dir: str | Path = "data") -> Availability:
    """Say what ``load_dataset`` would read, without reading an image or fetching anything.

    Raises:
        ConfigError: if the name is neither known nor a folder.
    """
    return _look(_locate(name, Path(data_dir)), Path(data_dir))


class _Location(NamedTuple):
    """Place that a name stands for."""

    known: bool
    recipe: DatasetRecipe
    folder: Path | None  # None: there are no class folders
    absent: str  # what is missing, and where to put it


def _locate(name: str, data_dir: Path) -> _Location:
    known = name.lower() in DATASETS
    recipe = DATASETS[name.lower()] if known else LARGE_FOLDER
    folders = [data_dir / item for item in dict.fromkeys((name, name.lower(), *recipe.folders))]
    if not known and not any(folder.is_dir() for folder in folders):
        raise ConfigError(
            f"unknown data set {name!r}{nearest(name.lower(), DATASETS.names()) or '.'} Known: "
            f"{', '.join(DATASETS.names())}, and any folder {folders[0]}/<train|test>/<class>/<image>"
        )
    absent = (
        f"the data set {name!r} is not there: looked for class folders in {', '.join(map(str, folders))}; "
        f"put its images into {folders[0]}/train/<class>/<image> and {folders[0]}/test/<class>/<image>"
    )
    # A folder without train/ may be something else, such as torchvision's MNIST on a disk that ignores case.
    return _Location(known, recipe, next((item for item in folders if (item / "train").is_dir()), None), absent)


def _look(location: _Location, data_dir: Path) -> Availability:
    folder, provider, left_out = location.folder, location.recipe.provider, location.recipe.left_out
    if folder is not None:
        count = len(set(list_class_names(folder / "train")) - set(left_out))
        without = describe_left_out(folder, left_out)
        return Availability(True, False, f"class folders in {folder}{without} ({count} classes)", count)
    if provider is None:
        return Availability(False, False, location.absent, None)
    present, _, text = provider.look(data_dir)
    text = text if present or provider.fetchable else f"{location.absent}; {text}"
    return Availability(present, provider.fetchable, text, provider.num_classes)


def _provide(location: _Location, data_dir: Path, offline: bool) -> LoadedData:
    found = _look(location, data_dir)
    if not (found.present or found.fetchable):
        raise DataError(found.text)
    try:
        return location.recipe.provider.load(data_dir, offline)
    except PROVIDER_ERRORS as error:
        if offline and found.fetchable:
            raise DataError(f"{location.absent}; without --offline it would be downloaded into {data_dir}") from error
        tried = "Downloading" if found.fetchable else "Deriving"
        raise DataError(f"{location.absent}. {tried} it failed: {str(error).strip()}") from error
