"""What a replay source is: something that learns classes and can then be asked for samples of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import torch
from torch import Tensor, nn

from synth.requests import Requests
from utils.data.datasets import Dataset
from utils.data.images import ImageSet, Samples
from utils.data.manager import Task
from utils.run.carried import Carried
from utils.run.command import promised_offline
from utils.run.config import SourceConfig
from utils.run.errors import NotFittedError, WeightsError
from utils.run.log import log
from utils.training.flops import forward_flops
from utils.training.run import Run


class ReplaySource(ABC):
    """Learns classes task by task and generates samples of them.

    Args:
        config: the frozen Config of this very class.
        run: device, random keys, checkpoints inside trainings.
        num_classes: of the whole run.
        class_names: in learning order, for sources that read text.
        dataset: for image size, channels and augmentation; its images are not touched.
    """

    Config: type[SourceConfig] = SourceConfig
    usual_replay: type | None = None  # kind of `synth.replay.Replay` that it needs; None: what its config says
    samples = "images"  # or "features": what `generate` makes
    wants_past = False  # whether `fit_after` looks at the samples of the past
    step_flops: int | None = None  # of a forward pass of one training batch; None: a published model's, which are many

    def __init__(self, config, run: Run, num_classes: int, class_names: list[str], dataset: Dataset):
        self.config, self.run, self.num_classes = config, run, num_classes
        self.class_names, self.dataset = class_names, dataset
        if config.need_syn_imgs:
            self.check_weights(config, promised_offline())
        self.fitted_classes: set[int] = set()
        # What learns once the classifier has trained is not asked for its last task.
        self.learns_after = type(self).fit_after is not ReplaySource.fit_after
        self.chunk_size = config.sample_batch  # halved for good where the device's memory is too small for it
        self.watcher: Callable[[int], None] | None = None  # looks on while it learns; see `show_progress`

    @classmethod
    def check_weights(cls, config, offline: bool) -> None:
        """See that the weights a source starts from are here or can be fetched. Default: it needs none.

        Raises:
            WeightsError: if not; it names them and where they go.
        """

    def fit_before(self, task: Task, images: ImageSet) -> None:
        """Learn from the task's real images before the classifier trains. Default: nothing."""

    def fit_after(self, task: Task, images: ImageSet, past: Samples, exemplars: ImageSet, encoder: nn.Module) -> None:
        """Learn after the classifier has trained. Default: nothing.

        Args:
            task: the task just learned.
            images: its real images.
            past: what stood for old classes in the classifier's training; empty unless ``wants_past``.
            exemplars: of the task, best first within a class: those that the replay asked the learner for.
            encoder: the trained classifier.
        """

    @abstractmethod
    def generate(self, requests: Requests) -> Samples:
        """Make one sample per request, in their order; see `Requests` for what makes it reproducible.

        Raises:
            NotFittedError: if a label was never learned.
        """

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write everything that the next task needs."""

    @abstractmethod
    def load(self, directory: Path) -> None:
        """Take over what ``save`` wrote."""

    def carried(self) -> list[Carried]:
        """Name what a run has to keep of it; its files lie in `source/` of a checkpoint."""
        return [Carried("generator", ("source/*",))]

    def describe(self) -> str:
        """Say in one line for `--plan` what will be trained, or which weights are needed."""
        return ""

    def fingerprint(self) -> str:
        """Hash the weights that generate; the hash changes whenever the samples would."""
        return ""

    def require_fitted(self, labels: Tensor) -> None:
        """Raise NotFittedError if a label was never learned."""
        if unknown := sorted(set(labels.tolist()) - self.fitted_classes):
            known = f"this source has learned {sorted(self.fitted_classes)}"
            raise NotFittedError(f"cannot generate classes {unknown}: {known}; fit it on their task first")

    def in_chunks(self, requests: Requests, draw: Callable[[Requests], Sequence[Tensor]]) -> list[Tensor]:
        """Draw chunk by chunk, in order; where the device runs out of memory, go on in chunks of half the size.

        Args:
            requests: N of them.
            draw: one chunk to its samples.

        Returns:
            N samples.

        Raises:
            torch.OutOfMemoryError: if a single request is too many.
        """
        samples: list[Tensor] = []
        if (ledger := self.run.ledger).foresees:
            few = requests.take(torch.arange(min(ledger.rows, len(requests))))
            samples = ledger.times(len(requests) / len(few), partial(draw, few)) if len(few) else []
            return list(islice(cycle(samples), len(requests)))
        while len(samples) < len(requests):
            chunk = requests.take(torch.arange(len(samples), len(requests))[: self.chunk_size])
            try:
                samples += draw(chunk)
            except torch.OutOfMemoryError:  # leaving this block, before the next draw, frees what the failed one held
                if len(chunk) == 1:
                    raise
                self.chunk_size = len(chunk) // 2
                log.warning("Too little memory to draw %d images at once: going on with %d at a time, which may move a "
                            "pixel by a grey level (synth.sample_batch)", len(chunk), self.chunk_size)  # fmt: skip
        return samples


def count_prediction(source: ReplaySource) -> int | None:
    """Count the FLOPs with which ``source.network`` predicts the noise of a training batch, (xt, t, labels) -> eps."""
    labels = torch.zeros(source.config.batch_size, dtype=torch.int64, device="meta")
    xt = torch.zeros(len(labels), *source.image_shape, device="meta")
    return forward_flops(source.network, xt, labels, labels)


def show_progress(source: ReplaySource, task: Task, epoch: int, before: int = 0) -> None:
    """Let a source's watcher see what would be drawn by now.

    A source that learns calls it before every epoch and after the last one; ``generate`` must then draw with what is
    learned so far.

    Args:
        source: that learns.
        task: that is being learned.
        epoch: epochs of this training that are done.
        before: epochs of earlier trainings of the task.
    """
    if source.watcher is not None:
        source.fitted_classes |= set(task.classes)
        source.watcher(before + epoch)


def weights_place(source: ReplaySource) -> str:
    """Say whether the weights that a source starts from are on this machine."""
    with suppress(WeightsError):
        source.check_weights(source.config, offline=True)
        return "on this machine"
    return "not yet on this machine"
