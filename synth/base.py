"""What a replay source is: something that learns classes and can then be asked for samples of them."""

from __future__ import annotations

import logging
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from synth.requests import Requests
from utils.data.images import ImageSet
from utils.data.manager import DataManager, Task
from utils.run.config import SourceConfig
from utils.run.errors import ConfigError, NotFittedError, WeightsError
from utils.training.checkpoint import folder_bytes
from utils.training.run import Run

log = logging.getLogger("reprise")


@dataclass(frozen=True)
class Guide:
    """How a learner wants its samples drawn, where it does not leave that to the source.

    Attributes:
        timestep_respacing: the time steps of sampling, such as "ddim50".
        sampler: "ddim" or "ddpm".
        bend: the requests of one chunk to a function that sampling follows uphill: from clean predictions (B, C, H, W)
            in [-1, 1] to one log-likelihood per image, (B,), times its scale. None: nothing bends it.
    """

    timestep_respacing: str
    sampler: Literal["ddim", "ddpm"] = "ddim"
    bend: Callable[[Requests], Callable[[Tensor], Tensor]] | None = None


class ReplaySource(ABC):
    """Learns classes task by task and generates samples of them.

    Args:
        config: the frozen Config of this very class.
        run: device, random keys, checkpoints inside trainings.
        num_classes: of the whole run.
        class_names: in learning order, for sources that read text.
        dataset: for image size, channels and augmentation; its images are not touched.
    """

    class Config(SourceConfig):
        pass

    kind = "images"  # or "features"
    can_be_guided = False  # whether `generate` takes a guide
    makes_copies = False  # whether its samples are copies of single images: see `synth/compression.py`
    drawing_keys: frozenset[str] = frozenset()  # its own keys in which a run that takes its weights may differ
    ledger_parts: dict[str, str] = {}  # file that `save` writes -> its kind in the ledger; others are "generator"
    num_compressed = 0  # compressed exemplars kept, all classes together
    nominal_share = 0.0  # of a raw image, what one of them takes by its method's own count

    def __init__(self, config, run: Run, num_classes: int, class_names: list[str], dataset):
        self.config, self.run, self.num_classes = config, run, num_classes
        self.class_names, self.dataset = class_names, dataset
        self.fitted_classes: set[int] = set()
        self.chunk_size = config.sample_batch  # halved for good where the device's memory is too small for it
        self.watcher: Callable[[int], None] | None = None  # looks on while it learns; see `let_watch`

    @classmethod
    def check_weights(cls, config, offline: bool) -> None:
        """See that the weights a source starts from are here or can be fetched. Default: it needs none.

        Raises:
            WeightsError: if not; it names them and where they go.
        """

    def weights_place(self) -> str:
        """Whether the weights that it starts from are on this machine, in words."""
        try:
            self.check_weights(self.config, offline=True)
        except WeightsError:
            return "not yet on this machine"
        return "on this machine"

    def fit_before(self, task: Task, images: ImageSet) -> None:
        """Learn from the task's real images before the classifier trains. Default: nothing."""

    def fit_after(
        self, task: Task, images: ImageSet, replay: ImageSet, exemplars: ImageSet, encoder: nn.Module
    ) -> None:
        """Learn after the classifier has trained. Default: nothing.

        Args:
            task: the task just learned.
            images: its real images.
            replay: the generated images of old classes that the classifier was trained on.
            exemplars: the herded images of the task that follow those that the learner keeps, best first within a
                class, as many as ``split_memory`` gave to the source.
            encoder: the trained classifier.
        """

    @classmethod
    def learns_after(cls) -> bool:
        """Whether it learns a task once the classifier has trained, in ``fit_after``; else it does before."""
        return cls.fit_after is not ReplaySource.fit_after

    @classmethod
    def wants_replay(cls, config) -> bool:
        """Whether ``fit_after`` looks at the replay that it is given."""
        return cls.learns_after()

    def split_memory(self, memory_per_class: int | None, data: DataManager) -> tuple[int, int]:
        """How many exemplars per class the learner keeps, and how many more the source does, in its own form.

        Args:
            memory_per_class: images' worth per class; None: the learner keeps none.
            data: for the sizes of its images.

        Raises:
            ConfigError: if what the config wants is more than that.
        """
        return memory_per_class or 0, 0

    def require(self) -> None:
        """See that all that it will learn from is there, beside its weights. Default: it needs nothing more."""

    @classmethod
    def training_settings(cls, config) -> dict[str, Any]:
        """The keys that shape what is learned; sources that differ in others alone can take each other's weights.

        The keys that all sources share say where samples lie, how many there are and how long they are kept.
        """
        return config.dump_without({*SourceConfig.model_fields, *cls.drawing_keys})

    def first_task_settings(self) -> dict[str, Any]:
        """The keys that shape the classifier's training of the first task, for `init_from`. Default: none does."""
        return {}

    @abstractmethod
    def generate(self, requests: Requests, guide: Guide | None = None) -> ImageSet:
        """One sample per request, in their order; see `Requests` for what makes it reproducible.

        Raises:
            NotFittedError: if a label was never learned.
        """

    def check_guide(self, guide: Guide) -> None:
        """See that `generate` can take this guide. Default: it cannot.

        Raises:
            ConfigError: if not.
        """
        raise ConfigError(f"the source {self.config.name!r} cannot be guided")

    def generate_together(self, requests: Requests, guide: Guide | None = None) -> ImageSet:
        """`generate` with its chunks shared by all processes: each gets every sample, with the bits of one process."""
        chunks = list(requests.chunks(self.config.sample_batch))
        return sum(self.run.runtime.share(chunks, lambda chunk: self.generate(chunk, guide)), ImageSet())

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write everything that the next task needs."""

    @abstractmethod
    def load(self, directory: Path) -> None:
        """Take over what ``save`` wrote."""

    def memory_bytes(self) -> int:
        """Bytes that ``save`` writes: the price of carrying this source to the next task."""
        return self.saved_bytes() if self.fitted_classes else 0

    def saved_bytes(self) -> int:
        """Bytes that ``save`` writes at this moment."""
        with tempfile.TemporaryDirectory() as directory:
            self.save(Path(directory))
            return folder_bytes(directory)

    def compressed_counts(self) -> dict[int, int]:
        """Compressed exemplars of every class that has some. Default: it keeps none."""
        return {}

    def drop_compressed(self, label: int) -> int:
        """Give up the last compressed exemplar of a class, for a memory budget; returns the bytes freed, 0: none."""
        return 0

    def frozen_bytes(self) -> int:
        """Bytes of weights that are used as they came and stay the same for every task."""
        return 0

    def describe(self) -> str:
        """One line for `--plan`: what will be trained, or which weights are needed."""
        return ""

    def fingerprint(self) -> str:
        """A hash of the weights that generate; it changes whenever the images would."""
        return ""

    def let_watch(self, task: Task, epoch: int, before: int = 0) -> None:
        """Let the watcher see what would be drawn by now.

        A source that learns calls it before every epoch and after the last one; ``generate`` must then draw with what
        is learned so far.

        Args:
            task: that is being learned.
            epoch: epochs of this training that are done.
            before: epochs of earlier trainings of the task.
        """
        if self.watcher is not None:
            self.fitted_classes |= set(task.classes)
            self.watcher(before + epoch)

    def require_fitted(self, labels: Tensor) -> None:
        """Raise NotFittedError if a label was never learned."""
        unknown = sorted(set(labels.tolist()) - self.fitted_classes)
        if unknown:
            raise NotFittedError(
                f"cannot generate classes {unknown}: this source has learned {sorted(self.fitted_classes)}; "
                "fit it on their task first"
            )

    def in_chunks(self, requests: Requests, draw: Callable[[Requests], Sequence[Tensor]]) -> list[Tensor]:
        """Draw chunk by chunk, in order; where the device runs out of memory, on in chunks of half the size.

        Args:
            requests: N of them.
            draw: one chunk to its samples.

        Returns:
            N samples.

        Raises:
            torch.OutOfMemoryError: if a single request is too many.
        """
        samples: list[Tensor] = []
        done = 0
        while done < len(requests):
            chunk = requests.take(torch.arange(done, min(done + self.chunk_size, len(requests))))
            drawn = _if_it_fits(draw, chunk)
            if drawn is not None:
                samples += drawn
                done += len(chunk)
                continue
            self.chunk_size = len(chunk) // 2
            log.warning(
                "Too little memory to draw %d images at once: going on with %d at a time, which may move a pixel by a "
                "grey level; synth.sample_batch=%d says so from the start", len(chunk), *[self.chunk_size] * 2,
            )  # fmt: skip
        return samples


def _if_it_fits(draw: Callable[[Requests], Sequence[Tensor]], chunk: Requests) -> Sequence[Tensor] | None:
    """The drawn samples, or None where memory ran out; leaving this frame frees what the failed draw held."""
    try:
        return draw(chunk)
    except torch.OutOfMemoryError:
        if len(chunk) == 1:
            raise
        return None
