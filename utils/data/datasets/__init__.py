"""Data sets by name: class folders in `data_dir` first, else a download or a package.

Any folder `<data_dir>/<name>/<train|test>/<class>/<image>` is a data set by its name alone.
"""

from __future__ import annotations

import tarfile
import zipfile
from functools import partial
from pathlib import Path

from utils.data.datasets.base import (
    LARGE_FOLDER,
    LARGE_SIDE,
    SMALL_FOLDER,
    Dataset,
    DatasetRecipe,
    Found,
    LoadedData,
    Provider,
)
from utils.data.datasets.folders import list_class_names, read_folders, read_through
from utils.data.images import ImageSet
from utils.run.errors import ConfigError, DataError
from utils.run.registry import Registry, nearest

DATASETS: Registry[DatasetRecipe] = Registry("data set", "dataset", __name__)
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
    found = find_dataset(name, data_dir)
    if found.read is None:
        raise DataError(found.text)
    data = found.read(offline)
    recipe = SMALL_FOLDER if found.recipe is LARGE_FOLDER and data.side else found.recipe
    if recipe.view is not None:
        data = read_through(data, recipe.view)
    train, test = (ImageSet.of(*split) for split in data.splits)
    counts = f"{len(train)} training and {len(test)} test images, {len(data.class_names)} classes"
    return Dataset(
        name=name.lower() if name.lower() in DATASETS else name, train=train, test=test, class_names=data.class_names,
        image_size=recipe.image_size or data.side or LARGE_SIDE, channels=data.channels, in_memory=bool(data.side),
        mean=recipe.mean, std=recipe.std, augmentation=recipe.augmentation,
        source=f"{found.source} ({counts})", root=data.root)  # fmt: skip


def find_dataset(name: str, data_dir: str | Path = "data") -> Found:
    """Say what ``load_dataset`` would read, without reading an image or fetching anything.

    Raises:
        ConfigError: if the name is neither known nor a folder.
    """
    known = name.lower() in DATASETS
    recipe = DATASETS[name.lower()] if known else LARGE_FOLDER
    folders = [Path(data_dir, item) for item in dict.fromkeys((name, name.lower(), *recipe.folders))]
    if not known and not any(folder.is_dir() for folder in folders):
        raise ConfigError(
            f"dataset: unknown data set {name!r}{nearest(name.lower(), DATASETS.names()) or '.'} Known: "
            f"{', '.join(DATASETS.names())}, and any folder {folders[0]}/<train|test>/<class>/<image>"
        )
    # A folder without train/ may be something else, such as torchvision's MNIST on a disk that ignores case.
    folder = next((item for item in folders if (item / "train").is_dir()), None)
    if folder is None:
        absent = (
            f"the data set {name!r} is not there: looked for class folders in {', '.join(map(str, folders))}; "
            f"put its images into {folders[0]}/train/<class>/<image> and {folders[0]}/test/<class>/<image>"
        )
        return _find_elsewhere(recipe, Path(data_dir), absent)
    names = list_class_names(folder / "train")
    left_out = [item for item in recipe.left_out if item in names]
    source = f"class folders in {folder}" + (f" without {', '.join(left_out)}" if left_out else "")
    text = f"{source} ({len(names) - len(left_out)} classes)"
    return Found(recipe, True, text, source, lambda offline: read_folders(folder, recipe.test_folders, recipe.left_out))


def _find_elsewhere(recipe: DatasetRecipe, data_dir: Path, absent: str) -> Found:
    provider = recipe.provider
    if provider is None:
        return Found(recipe, False, absent)
    folders = [data_dir / name for name in provider.folders]
    present = [folder for folder in folders if all((folder / part).exists() for part in provider.parts)]
    folder = (present or folders)[0]
    source, missing = provider.found.format(folder=folder), provider.absent.format(folder=folder)
    if not present and not provider.fetchable:
        return Found(recipe, False, f"{absent}; {missing}")
    text, read = source if present else missing, partial(_provide, provider, folder, absent)
    return Found(recipe, bool(present), text, source, read)


def _provide(provider: Provider, folder: Path, absent: str, offline: bool) -> LoadedData:
    try:
        return provider.read(folder, offline)
    except PROVIDER_ERRORS as error:
        if offline and provider.fetchable:
            raise DataError(f"{absent}; without --offline it would be downloaded into {folder.parent}") from error
        tried = "Downloading" if provider.fetchable else "Deriving"
        raise DataError(f"{absent}. {tried} it failed: {str(error).strip()}") from error
