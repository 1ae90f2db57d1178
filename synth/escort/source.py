"""ESCORT: exemplars kept as edge maps of one bit per pixel, and drawn again from them whenever they are wanted."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torchvision.transforms.v2.functional import rgb_to_grayscale

from synth.base import ReplaySource
from synth.escort.copies import Copied
from synth.escort.edges import EdgeMap, canny, pack, resize, unpack
from synth.requests import Requests
from utils.data.images import ImageSet, Part
from utils.data.manager import DataManager, Task
from utils.run.carried import Carried, Items
from utils.run.config import PerClass, SourceConfig
from utils.run.errors import NotFittedError
from utils.run.files import load_tensors, save_tensors
from utils.run.log import log

EDGE_MAPS = "edge_maps.safetensors"


class ExemplarCompression(ReplaySource):
    """Herded exemplars as edge maps, which a frozen generator turns into images again, as many copies as are wanted.

    Duan et al., "Prompt-Based Exemplar Super-Compression and Regeneration for Class-Incremental Learning", BMVC 2025,
    arXiv:2311.18266 (ESCORT). The images can be drawn again from what is kept, so they are no memory of the past. A
    subclass says in ``draw`` how a map becomes an image, and in ``map_shape`` at which size maps are made.

    `Requests.item` names a map, of an exemplar or of an image at hand (`read`); -1 takes the class's exemplars in turn.
    """

    class Config(SourceConfig):
        elsewhere: ClassVar[set[str]] = SourceConfig.elsewhere | {"real_per_class", "augmentation_prob",
                                                                  "augmentations_per_image", "prepare"}  # fmt: skip
        places: ClassVar[set[str]] = set()  # keys that say where weights lie, and not what they are

        replay: Literal["keep"] = Field("keep", description="copies are drawn when they are wanted, and stay on disk")
        fit_after_last_task: bool = Field(True, description="also compress the exemplars of the last task")
        real_per_class: PerClass | None = Field(None, description="R, of a class, stay images; null: what S leaves")
        syn_per_class: PerClass = Field(0, description="S, exemplars per class that become edge maps")
        augmentation_prob: float = Field(0.0, ge=0, le=1, description="p, that a real image is shown as its own copy")
        augmentations_per_image: int = Field(5, ge=1, le=10**4, description="K, copies of each image")
        # needed: a copy is drawn when an epoch first shows it; all: all copies before a training
        prepare: Literal["needed", "all"] = Field("needed", description="copies that are drawn before a training")
        canny_low: int = Field(100, ge=0, description="lower threshold of the gradient")
        canny_high: int = Field(200, ge=0, description="upper threshold of the gradient")
        copy_noise: Literal["own", "reference"] = Field("own", description="reference: noise of copy s is of seed s")

        @model_validator(mode="after")
        def _draws_itself(self) -> ExemplarCompression.Config:
            if not self.need_syn_imgs or self.adopt_syn_images:
                raise ValueError("copies are drawn here: need_syn_imgs must be true and adopt_syn_images false")
            if self.source_dir is not None:
                remedy = "leave it out, and let synth.weights name the folder of a trained small_controlnet"
                raise ValueError(f"synth.source_dir={self.source_dir!r}: maps are a run's own; {remedy}")
            if self.canny_low > self.canny_high:
                raise ValueError(f"synth.canny_low={self.canny_low} is above canny_high={self.canny_high}")
            return self

    usual_replay = Copied

    def __init__(self, config, run, num_classes, class_names, dataset):
        super().__init__(config, run, num_classes, class_names, dataset)
        self.maps: dict[int, list[EdgeMap]] = {}  # class -> its compressed exemplars, best first
        self.at_hand: dict[int, EdgeMap] = {}  # maps of images that are there anyway; not kept
        self.originals: dict[int, Tensor] = {}  # class -> best exemplar, of the newest task, to be looked at
        self._said_that_a_map_is_empty = False

    def published_weights(self) -> str:
        """Return the fingerprint of weights that came from elsewhere; "" where all is learned here."""
        return self.fingerprint()

    # ------------------------------------------------------------------ the budget

    @abstractmethod
    def map_shape(self, height: int, width: int) -> tuple[int, int]:
        """Return (H, W) of the map of an image (height, width)."""

    def drawing_size(self, height: int, width: int) -> tuple[int, int]:
        """Return (H, W) at which an image (height, width) is drawn; those of one size are drawn together."""
        return self.map_shape(height, width)

    def maps_per_image(self, data: DataManager) -> float:
        """Count how many maps cost what an image costs: eight bits of C channels at every pixel, against one of a map.

        24 for coloured images and maps of their size; of a data set with images of many sizes it is the mean's. The
        bits that fill a map's last byte count in the ledger, and not here, where they would leave 23.9995 of 24.
        """
        sizes = data.image_sizes
        raw = sum(count * math.prod(size) for size, count in sizes.items()) * 8 * self.dataset.channels
        return raw / sum(count * math.prod(self.map_shape(*size)) for size, count in sizes.items())

    # ------------------------------------------------------------------ compressing

    def fit_before(self, task: Task, images: ImageSet) -> None:
        """Forget what was at hand in the task before."""
        self.at_hand, self.originals = {}, {}

    def fit_after(self, task: Task, images: ImageSet, past: ImageSet, exemplars: ImageSet, encoder) -> None:
        """Compress the exemplars; without any, as outside a run, the first images of every class."""
        if not self.config.syn_per_class:
            return
        for label in task.classes:
            own = exemplars.select([label]) or images.select([label]).take(range(self.config.syn_per_class))
            self.maps[label], self.originals[label] = self._compress_all(own), own.image(0)
        self.fitted_classes |= set(task.classes)

    def compress(self, image: Tensor) -> EdgeMap:
        """Find the edge map of one image, uint8 (C, h, w)."""
        config, size = self.config, tuple(image.shape[-2:])
        shape = self.map_shape(*size)
        image = resize(image, *shape, enlarges=math.prod(shape) >= math.prod(size))
        return EdgeMap.of(canny(image, config.canny_low, config.canny_high), size)

    def _compress_all(self, images: ImageSet) -> list[EdgeMap]:
        with ThreadPoolExecutor() as pool:
            made = list(pool.map(lambda position: self.compress(images.image(position)), range(len(images))))
        if not all(any(one.bits) for one in made) and not self._said_that_a_map_is_empty:
            self._said_that_a_map_is_empty = True
            log.warning("An image has no edges at all: copies of it, and of others like it, have none to follow")
        return made

    def read(self, images: ImageSet) -> Tensor:
        """Make maps of images that are at hand, so that copies of them can be asked for.

        Returns:
            int64 (N,), what `Requests.item` calls them, until the next task.
        """
        made = self._compress_all(images)
        self.at_hand |= {one.item: one for one in made}
        return torch.tensor([one.item for one in made], dtype=torch.int64)

    def requests(self, classes: Iterable[int], num_copies: int = 1) -> Requests:
        """Ask for all compressed exemplars of these classes, best first, so many copies of each, copy by copy."""
        rows = [(label, one.item) for label in classes for one in self.maps.get(label, [])]
        labels, items = torch.tensor(rows, dtype=torch.int64).view(-1, 2).unbind(1)
        copies = torch.arange(num_copies).repeat_interleave(len(rows))
        return self.ask(labels.repeat(num_copies), items.repeat(num_copies), copies)

    def ask(self, labels: Tensor, items: Tensor, copies: Tensor) -> Requests:
        """Make requests whose images stay the same in every task."""
        return Requests(labels, items, copies, (self.run.seed, self.config.name))

    # ------------------------------------------------------------------ drawing

    @abstractmethod
    def draw(self, requests: Requests, maps: list[EdgeMap], generators: list[torch.Generator]) -> list[Tensor]:
        """Draw N images uint8 (C, H, W) of the maps, of any size; C = 1 or 3."""

    @torch.no_grad()
    def generate(self, requests: Requests) -> ImageSet:
        """Draw one image per request along the edges of its map.

        Returns:
            N images in the order of ``requests``, uint8, each at the size of the image that its map was made of.

        Raises:
            NotFittedError: if a class has no compressed exemplar, or an item is unknown.
        """
        self.require_fitted(requests.labels[requests.item < 0])
        images = self.in_chunks(requests, self._draw)
        if black := sum(not image.any() for image in images):
            log.warning("%d of %d copies are black all over: see whether the weights are whole", black, len(images))
        return ImageSet(Part(image[None], label[None]) for image, label in zip(images, requests.labels)).merged()

    def _draw(self, requests: Requests) -> list[Tensor]:
        maps = self._maps_of(requests)
        drawn = self.draw(requests, maps, self._generators(requests))
        for place, (image, one) in enumerate(zip(drawn, maps)):
            drawn[place] = resize(image, *one.size, enlarges=min(image.shape[-2:]) <= min(one.size))
        return list(map(rgb_to_grayscale, drawn)) if self.dataset.channels == 1 else drawn

    def _maps_of(self, requests: Requests) -> list[EdgeMap]:
        """Find the map of every request."""
        known = {one.item: one for maps in self.maps.values() for one in maps} | self.at_hand
        found = []
        for label, item, copy in zip(requests.labels.tolist(), requests.item.tolist(), requests.copy.tolist()):
            if item >= 0 and item not in known:
                raise NotFittedError(f"no edge map of item {item}: images at hand are forgotten with the next task")
            if item < 0 and not self.maps.get(label):
                raise NotFittedError(f"class {label} has no compressed exemplar: none was kept, or a budget took it")
            found.append(known[item] if item >= 0 else self.maps[label][copy % len(self.maps[label])])
        return found

    def _generators(self, requests: Requests) -> list[torch.Generator]:
        if self.config.copy_noise == "own":
            return requests.generators()
        return [torch.Generator().manual_seed(copy) for copy in requests.copy.tolist()]

    def in_drawing_order(self, requests: Requests) -> Requests:
        """Return the same requests with those of one size side by side, so that they are drawn together."""
        sizes = [self.drawing_size(*one.size) for one in self._maps_of(requests)]
        return requests.take(torch.tensor(sorted(range(len(sizes)), key=sizes.__getitem__), dtype=torch.int64))

    # ------------------------------------------------------------------ keeping

    def carried(self) -> list[Carried]:
        """Name the edge maps, and what a subclass has learned beside them."""
        # A map of an image's own size costs a bit against the 24 of a coloured pixel, or the 8 of a grey one.
        share = 1 / (8 * self.dataset.channels)
        items = Items("compressed exemplars", True, share, self._counts, self._drop_last)
        return [Carried("edge_maps", (f"source/{EDGE_MAPS}",), items=items), *super().carried()]

    def _counts(self) -> dict[int, int]:
        return {label: len(maps) for label, maps in self.maps.items() if maps}

    def _drop_last(self, label: int, count: int) -> int:
        return sum(len(self.maps[label].pop().bits) for _ in range(count))

    def describe(self) -> str:
        """Say what becomes of an exemplar and of a new image."""
        config, probability = self.config, self.config.augmentation_prob
        also = f"; with probability {probability:g} other images as copies of themselves" if probability else ""
        return f"{config.syn_per_class} edge maps per class, {config.augmentations_per_image} copies of each{also}"

    def save(self, directory: Path) -> None:
        """Write the edge maps; a subclass adds its generator if that was learned here."""
        if self._counts():
            save_tensors(directory / EDGE_MAPS, pack(self.maps))

    def load(self, directory: Path) -> None:
        """Take over what ``save`` wrote."""
        path = directory / EDGE_MAPS
        self.maps = unpack(load_tensors(path)) if path.exists() else {}
        self.fitted_classes = set(self.maps)
