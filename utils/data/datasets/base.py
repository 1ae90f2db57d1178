"""What a data set is, before it is read (Recipe) and after (Dataset)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from utils.data.images import ImageSet

Augmentation = Literal["none", "cifar", "crop", "imagenet", "imagenet_jitter", "asp", "escort"]
Triple = tuple[float, float, float]
Split = tuple[Tensor, Tensor]

LARGE_SIDE = 224  # input of a network on photographs, where the recipe says nothing else

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)  # PyCIL: utils/data.py


class Images(NamedTuple):
    """Both splits as read: labels are original class ids 0..K-1, ``source`` says in words what was read from where."""

    train: ImageSet
    test: ImageSet
    class_names: list[str]
    channels: int
    source: str

    @property
    def side(self) -> int | None:
        """The longer side of images in memory, in pixels; None for files."""
        part = self.train.parts[0]
        return max(part.images.shape[2:]) if isinstance(part.images, Tensor) else None


def tensor_images(train: Split, test: Split, class_names: list[str], source: str) -> Images:
    """Images in memory from two (images, labels) pairs: uint8 (N, C, H, W), int64 (N,)."""
    return Images(
        ImageSet.of(*train),
        ImageSet.of(*test),
        class_names,
        train[0].shape[1],
        f"{source} ({len(train[1])} training and {len(test[1])} test images, {len(class_names)} classes)",
    )


class Provider(Protocol):
    """Where a data set comes from when there are no class folders: a download, a package, another data set."""

    num_classes: int
    fetchable: bool  # whether it can be downloaded

    def describe(self, data_dir: Path) -> tuple[bool, str]:
        """Whether it is on this machine already, and in words what would be read or fetched. Reads no image."""

    def load(self, data_dir: Path, offline: bool) -> Images:
        """Read it, fetching it first unless ``offline``.

        Raises:
            Any of ``utils.data.datasets.PROVIDER_ERRORS`` if it is absent and cannot be fetched.
        """


@dataclass(frozen=True)
class Recipe:
    """How the images of a named data set are found and prepared.

    Args:
        augmentation: name of the training transform (``utils.data.transforms``).
        mean, std: of the network's input, per channel, for pixels in [0, 1].
        image_size: side of the network's input; None: the stored side of small images, 224 for large ones.
        folders: other names of its folder in ``data_dir``.
        test_folders: names of the folder with test images; the first that holds the training classes is read.
        left_out: class folders that are no classes, which are not read.
        provider: what stands in where there are no class folders; None: nothing can.
        view: makes small images of one size from uint8 (..., C, H, W) of any; all of them are read through it into
            memory. None: large images stay files.
    """

    augmentation: Augmentation
    mean: Triple
    std: Triple
    image_size: int | None = None
    folders: tuple[str, ...] = ()
    test_folders: tuple[str, ...] = ("test",)
    left_out: tuple[str, ...] = ()
    provider: Provider | None = None
    view: Callable[[Tensor], Tensor] | None = None


# For a folder that no recipe knows: small images as PyCIL treats CIFAR-100, large ones as it treats ImageNet.
SMALL_FOLDER = Recipe("cifar", CIFAR100_MEAN, CIFAR100_STD)
LARGE_FOLDER = Recipe("imagenet", IMAGENET_MEAN, IMAGENET_STD)


@dataclass(frozen=True)
class Dataset:
    """A labelled data set with original class ids, as it was read.

    Args:
        name: lower case for a known data set, as written for a folder.
        train, test: labels are original class ids, int64 in [0, K).
        class_names: K names in the order of the ids.
        image_size: side of the network's square input, in pixels.
        channels: of the stored images, 1 or 3. With 3, single files of a large set may still decode to 1.
        in_memory: whether both splits are uint8 tensors; if not, they are file paths.
        mean, std: of the network's input, per channel, for pixels in [0, 1].
        augmentation: name of the training transform.
        source: what was read, from where, with counts.
        class_order: the order of learning when the classes are not shuffled; None: by id.
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
    augmentation: Augmentation
    source: str
    class_order: list[int] | None = None

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


@dataclass(frozen=True)
class Found:
    """The answer of ``find_dataset``.

    Args:
        present: whether the data set can be read on this machine as it is.
        fetchable: whether it can be downloaded if it is not present.
        text: what would be read, or which folders were looked in and what to put there.
        num_classes: None where it cannot be told.
    """

    present: bool
    fetchable: bool
    text: str
    num_classes: int | None
