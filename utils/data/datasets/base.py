"""What a data set is, before it is read (DatasetRecipe) and after (Dataset)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from utils.data.images import ImageSet

Triple = tuple[float, float, float]

LARGE_SIDE = 224  # input of a network on photographs, where the recipe says nothing else

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)  # PyCIL: utils/data.py


class LoadedData(NamedTuple):
    """Both splits as read.

    Args:
        splits: training and test images, uint8 (N, C, H, W) or N paths, each with labels, int64 (N,): original class
            ids in [0, K).
        class_names: K names in the order of the ids.
        channels: of the stored images, 1 or 3.
        root: folder that all files lie in; None for images that came from a package or a download.
    """

    splits: list[tuple[Tensor | list[str], Tensor]]
    class_names: list[str]
    channels: int
    root: str | None = None

    @property
    def side(self) -> int | None:
        """The longer side of images in memory, in pixels; None for files."""
        images = self.splits[0][0]
        return max(images.shape[2:]) if isinstance(images, Tensor) else None


class Provider(NamedTuple):
    """Origin of a data set that has no class folders: a download, a package, another data set.

    Args:
        read: takes its folder and ``offline``, without which it may fetch it first; where ``fetchable`` is false,
            called only if it is there. Raises any of ``utils.data.datasets.PROVIDER_ERRORS`` if it is broken, or
            absent and cannot be fetched.
        found, absent: what would be read, and what would be fetched or could be put there; ``{folder}`` is its folder.
        folders: names of its folder in ``data_dir``.
        parts: files or folders in it, without which it is not there.
        fetchable: whether it can be downloaded.
    """

    read: Callable[[Path, bool], LoadedData]
    found: str
    absent: str = ""
    folders: tuple[str, ...] = ("",)
    parts: tuple[str, ...] = ()
    fetchable: bool = False


class DatasetRecipe(NamedTuple):
    """Rules by which the images of a named data set are found and prepared.

    Args:
        augmentation: a name in ``utils.data.transforms.AUGMENTATIONS``.
        mean, std: of the network's input, per channel, for pixels in [0, 1].
        image_size: side of the network's input; None: the stored side of small images, 224 for large ones.
        folders: other names of its folder in ``data_dir``.
        test_folders: names of the folder with test images; the first that holds the training classes is read.
        left_out: class folders that are no classes, which are not read.
        provider: stands in where there are no class folders; None: nothing can.
        view: makes small images of one size from uint8 (..., C, H, W) of any; all of them are read through it into
            memory. None: large images stay files.
    """

    augmentation: str
    mean: Triple
    std: Triple
    image_size: int | None = None
    folders: tuple[str, ...] = ()
    test_folders: tuple[str, ...] = ("test",)
    left_out: tuple[str, ...] = ()
    provider: Provider | None = None
    view: Callable[[Tensor], Tensor] | None = None


# For a folder that no recipe knows: small images as PyCIL treats CIFAR-100, large ones as it treats ImageNet.
SMALL_FOLDER = DatasetRecipe("cifar", CIFAR100_MEAN, CIFAR100_STD)
LARGE_FOLDER = DatasetRecipe("imagenet", IMAGENET_MEAN, IMAGENET_STD)


@dataclass(frozen=True)
class Dataset:
    """A labelled data set with original class ids, as it was read.

    Args:
        name: lower case for a known data set, as written for a folder.
        train, test: labels are original class ids, int64 in [0, K).
        class_names: K names in the order of the ids.
        image_size: side of the network's square input, in pixels.
        channels: of the stored images, 1 or 3. With 3, single files of a large set may still decode to 1.
        in_memory: True where both splits are uint8 tensors, False where they are file paths.
        mean, std: of the network's input, per channel, for pixels in [0, 1].
        augmentation: a name in ``utils.data.transforms.AUGMENTATIONS``.
        source: what was read, from where, with counts.
        root: folder that all files lie in; None for images that came from a package or a download.
    """

    name: str
    train: ImageSet
    test: ImageSet
    class_names: list[str]
    image_size: int
    channels: int
    in_memory: bool
    mean: Triple
    std: Triple
    augmentation: str
    source: str
    root: str | None = None

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


class Found(NamedTuple):
    """Answer of ``find_dataset``.

    Args:
        recipe: how the images are prepared.
        present: whether the data set can be read on this machine as it is.
        text: what would be read, or which folders were looked in and what to put there.
        source: what ``read`` reads, and from where.
        read: takes ``offline``, without which it may fetch the data first; None: there is nothing to read or fetch.
    """

    recipe: DatasetRecipe
    present: bool
    text: str
    source: str = ""
    read: Callable[[bool], LoadedData] | None = None
