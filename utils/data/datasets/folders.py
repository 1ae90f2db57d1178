"""Class folders: `<train|test>/<class>/<image>`, the layout of torchvision's ImageFolder.

Small images of one size are decoded at once and stay in memory; of large ones only the headers are read, so that a
broken file is named before hours of training and not after them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor

from utils.data.datasets.base import LoadedData
from utils.data.images import decode_image, map_in_threads, read_header
from utils.data.listing import IMAGE_SUFFIXES, list_folder, list_images
from utils.run.errors import DataError

SMALL_SIDE = 64  # pixels; images up to this side live in memory
ANNOTATIONS = "val_annotations.txt"  # Tiny-ImageNet as published names the classes of its test images in this file


def list_class_names(split: Path) -> list[str]:
    """List the class folders in ``split``: by number where all are numbers, else as ImageFolder sorts them."""
    names = [path.name for path in list_folder(split) if path.is_dir()]
    return sorted(names, key=int) if all(name.isascii() and name.isdigit() for name in names) else names


def read_folders(folder: Path, test_folders: Sequence[str], left_out: Collection[str] = ()) -> LoadedData:
    """Read ``folder/train`` and the first of ``test_folders`` that holds the same classes.

    Args:
        folder: holds train and test folders.
        test_folders: names to try for the test images.
        left_out: class folders that are passed over, in either split.

    Raises:
        DataError: if test images are missing, the two splits have other classes, a class has no image, or an image
            is broken. The message names the folder or file.
    """
    splits = [folder / "train", _pick_test_folder(folder, test_folders)]
    train, test = (_list_files(split, left_out) for split in splits)
    _check_classes(dict(zip(splits, (train, test))))
    return read_files(train, {name: test[name] for name in train}, folder)


def read_files(train: dict[str, list[str]], test: dict[str, list[str]], root: Path) -> LoadedData:
    """Read both splits from the files of every class: small images of one size into memory, others as paths.

    Args:
        train, test: paths by class name, the same names in the same order.
        root: folder that all of them lie in.

    Raises:
        DataError: if an image is broken.
    """
    splits = [_flatten(train), _flatten(test)]
    headers = set(map_in_threads(read_header, [path for paths, _ in splits for path in paths], "checking images"))
    channels = 1 if all(grey for *_, grey in headers) else 3
    sizes = {(height, width) for height, width, _ in headers}
    if len(sizes) == 1 and max(sizes.pop()) <= SMALL_SIDE:
        splits = [(_decode(paths, channels), labels) for paths, labels in splits]
    return LoadedData(splits, list(train), channels, str(root))


def read_through(data: LoadedData, view: Callable[[Tensor], Tensor]) -> LoadedData:
    """Read every image into memory, changed by ``view``; see ``DatasetRecipe``.

    Raises:
        DataError: if an image is broken.
    """

    def read(images: Tensor | list[str]) -> Tensor:
        return view(images).contiguous() if isinstance(images, Tensor) else _decode(images, data.channels, view)

    return data._replace(splits=[(read(images), labels) for images, labels in data.splits])


def _pick_test_folder(folder: Path, names: Sequence[str]) -> Path:
    present = [folder / name for name in names if (folder / name).is_dir()]
    if not present:
        remedy = f"put test images into {folder / names[0]}/<class>/<image>"
        raise DataError(f"{folder} has training images but no folder {' or '.join(names)}: {remedy}")
    # ImageNet's `test` comes without classes; its `val` is what everybody tests on.
    train_classes = list_class_names(folder / "train")
    same = [path for path in present if (path / ANNOTATIONS).is_file() or list_class_names(path) == train_classes]
    return (same or present)[0]


def _list_files(split: Path, left_out: Collection[str]) -> dict[str, list[str]]:
    """Return sorted paths of the images of every class."""
    if (split / ANNOTATIONS).is_file():
        return _read_annotations(split)
    return {name: list_images(split / name, split) for name in list_class_names(split) if name not in left_out}


def _read_annotations(split: Path) -> dict[str, list[str]]:
    """Return paths by class from Tiny-ImageNet's `val`: lines of file name, class and box, divided by tabs."""
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
        names = f"Only in {train.name}: {_join_names(only_train)}; only in {test.name}: {_join_names(only_test)}"
        raise DataError(f"{train} and {test} must hold the same classes. {names}. Add or remove these folders")
    for split, files in splits.items():
        if not files:
            raise DataError(f"{split} holds no class folder: put images into {split}/<class>/<image>")
        if empty := [name for name, paths in files.items() if not paths]:
            remedy = f"put images ({', '.join(IMAGE_SUFFIXES)}) there, or remove these folders from train and test"
            raise DataError(f"no image in the class folders {_join_names(empty)} of {split}: {remedy}")


def _join_names(names: list[str], most: int = 5) -> str:
    shown = ", ".join(names[:most]) or "none"
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def _flatten(files: dict[str, list[str]]) -> tuple[list[str], Tensor]:
    """Return all paths, class by class, and their labels, int64 (N,)."""
    counts = torch.tensor([len(paths) for paths in files.values()])
    return [path for paths in files.values() for path in paths], torch.arange(len(files)).repeat_interleave(counts)


def _decode(paths: list[str], channels: int, view: Callable[[Tensor], Tensor] = lambda image: image) -> Tensor:
    """Read uint8 (N, C, H, W), each image through ``view``; grey files are repeated where the set has colour."""

    def read(path: str) -> Tensor:
        return view(decode_image(path)).expand(channels, -1, -1).contiguous()

    return torch.stack(map_in_threads(read, paths, "reading images"))
