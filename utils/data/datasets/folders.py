"""Class folders: `<train|test>/<class>/<image>`, the layout of torchvision's ImageFolder.

Small images of one size are decoded at once and stay in memory; of large ones only the headers are read, so that a
broken file is named before hours of training and not after them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from utils.data.datasets.base import LoadedData, pack
from utils.data.images import IMAGE_SUFFIXES, ImageSet, decode_image, read_header
from utils.run.errors import DataError

SMALL_SIDE = 64  # pixels; images up to this side live in memory
THREADS = min(32, (os.cpu_count() or 1) + 4)  # reading waits for the disk
CHUNK = 256  # files per job: a job for each file would cost more than reading its header
ANNOTATIONS = "val_annotations.txt"  # Tiny-ImageNet as published names the classes of its test images in this file


def list_class_names(split: Path) -> list[str]:
    """List the class folders in ``split``: by number where all are numbers, else as ImageFolder sorts them."""
    names = [entry.name for entry in os.scandir(split) if entry.is_dir() and not entry.name.startswith(".")]
    if all(name.isascii() and name.isdigit() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def read_folders(
    folder: Path, test_folders: Sequence[str], class_names: list[str] | None = None, left_out: Sequence[str] = ()
) -> LoadedData:
    """Read ``folder/train`` and the first of ``test_folders`` that holds the same classes.

    Args:
        folder: holds train and test folders.
        test_folders: names to try for the test images.
        class_names: read these classes only; None: all.
        left_out: class folders that are passed over, in either split.

    Raises:
        DataError: if test images are missing, the two splits have other classes, a class has no image, or an image
            is broken. The message names the folder or file.
    """
    splits = [folder / "train", _pick_test_folder(folder, test_folders)]
    train, test = (_list_files(split, class_names, left_out) for split in splits)
    _check_classes(dict(zip(splits, (train, test))))
    source = f"class folders in {folder}{describe_left_out(folder, left_out)}"
    return read_files(train, {name: test[name] for name in train}, source, folder)


def describe_left_out(folder: Path, left_out: Sequence[str]) -> str:
    """Say which of ``left_out`` are class folders of ``folder/train``: " without a, b"; "" where none is."""
    present = [name for name in left_out if (folder / "train" / name).is_dir()]
    return f" without {', '.join(present)}" if present else ""


def read_files(train: dict[str, list[str]], test: dict[str, list[str]], source: str, root: Path) -> LoadedData:
    """Read both splits from the files of every class: small images of one size into memory, others as paths.

    Args:
        train, test: paths by class name, the same names in the same order.
        source: what is read, in words.
        root: folder that all of them lie in.

    Raises:
        DataError: if an image is broken.
    """
    splits = [_flatten(train), _flatten(test)]
    headers = set(_map_in_threads(read_header, [path for paths, _ in splits for path in paths], "checking images"))
    channels = 1 if all(header.grey for header in headers) else 3
    sizes = {(header.width, header.height) for header in headers}
    if len(sizes) == 1 and max(sizes.pop()) <= SMALL_SIDE:
        splits = [(_decode(paths, channels), labels) for paths, labels in splits]
    return pack(splits, list(train), channels, source, str(root))


def read_through(data: LoadedData, view: Callable[[Tensor], Tensor]) -> LoadedData:
    """Read every image into memory, changed by ``view``; see ``DatasetRecipe``.

    Raises:
        DataError: if an image is broken.
    """

    def read(split: ImageSet) -> ImageSet:
        stored = split.parts[0].images
        pixels = view(stored) if isinstance(stored, Tensor) else _decode(list(stored), data.channels, view)
        return ImageSet.of(pixels.contiguous(), split.labels)

    return data._replace(train=read(data.train), test=read(data.test))


def _pick_test_folder(folder: Path, names: Sequence[str]) -> Path:
    present = [folder / name for name in names if (folder / name).is_dir()]
    if not present:
        raise DataError(
            f"{folder} has training images but no folder {' or '.join(names)}: "
            f"put test images into {folder / names[0]}/<class>/<image>"
        )
    # ImageNet's `test` comes without classes; its `val` is what everybody tests on.
    train_classes = list_class_names(folder / "train")
    same = [path for path in present if (path / ANNOTATIONS).is_file() or list_class_names(path) == train_classes]
    return (same or present)[0]


def _list_files(split: Path, class_names: list[str] | None, left_out: Sequence[str]) -> dict[str, list[str]]:
    """Sorted paths of the images of every class."""
    if (split / ANNOTATIONS).is_file():
        files = _read_annotations(split)
        files = {name: files.get(name, []) for name in class_names or sorted(files)}
    else:
        files = {name: _list_images(split / name) for name in class_names or list_class_names(split)}
    return {name: paths for name, paths in files.items() if name not in left_out}


def _list_images(folder: Path) -> list[str]:
    # Of a folder that is not there, os.walk lists nothing.
    return sorted(
        os.path.join(place, name)
        for place, _, names in os.walk(folder, followlinks=True)
        for name in names
        if not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)
    )


def _read_annotations(split: Path) -> dict[str, list[str]]:
    """Paths by class from Tiny-ImageNet's `val`: lines of file name, class and box, divided by tabs."""
    files: dict[str, list[str]] = {}
    for line in sorted((split / ANNOTATIONS).read_text(encoding="utf-8").splitlines()):
        file, name = line.split("\t")[:2]
        files.setdefault(name, []).append(str(split / "images" / file))
    return files


def _check_classes(splits: dict[Path, dict[str, list[str]]]) -> None:
    """Refuse two splits of other classes, and classes without images."""
    (train, train_files), (test, test_files) = splits.items()
    only_train = [name for name in train_files if name not in test_files]
    only_test = [name for name in test_files if name not in train_files]
    if only_train or only_test:
        raise DataError(
            f"{train} and {test} must hold the same classes. Only in {train.name}: {_join_names(only_train)}; "
            f"only in {test.name}: {_join_names(only_test)}. Add or remove these folders"
        )
    for split, files in splits.items():
        if not files:
            raise DataError(f"{split} holds no class folder: put images into {split}/<class>/<image>")
        empty = [name for name, paths in files.items() if not paths]
        if empty:
            raise DataError(
                f"no image in the class folders {_join_names(empty)} of {split}: put images "
                f"({', '.join(IMAGE_SUFFIXES)}) there, or remove these folders from train and test"
            )


def _join_names(names: list[str], most: int = 5) -> str:
    shown = ", ".join(names[:most]) or "none"
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def _flatten(files: dict[str, list[str]]) -> tuple[list[str], Tensor]:
    """All paths, class by class, and their labels, int64 (N,)."""
    counts = torch.tensor([len(paths) for paths in files.values()])
    return [path for paths in files.values() for path in paths], torch.arange(len(files)).repeat_interleave(counts)


def _decode(paths: list[str], channels: int, view: Callable[[Tensor], Tensor] = lambda image: image) -> Tensor:
    """uint8 (N, C, H, W), each image through ``view``; grey files are repeated where the set has colour."""

    def read(path: str) -> Tensor:
        return view(decode_image(path)).expand(channels, -1, -1).contiguous()

    return torch.stack(_map_in_threads(read, paths, "reading images"))


def _map_in_threads(function: Callable[[str], Any], paths: list[str], description: str) -> list[Any]:
    """``function`` of every path, in order; the first error ends the work."""
    with ThreadPool(THREADS) as pool:
        done = pool.imap(function, paths, CHUNK)
        return list(tqdm(done, description, len(paths), delay=2, leave=False))
