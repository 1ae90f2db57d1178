"""How edge maps enter a training: exemplars as maps, samples shown as copies of themselves, drawn when first wanted."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from synth.drawing import ImageFolder, stems_of
from synth.escort.batches import CopiedBatches
from synth.replay import Banked
from synth.requests import Requests
from utils.data.batches import Loading
from utils.data.images import ImageSet
from utils.data.manager import DataManager, Task
from utils.results.panels import Cell, Panel, PanelRow
from utils.run.config import RunConfig
from utils.run.errors import ConfigError
from utils.training.run import Run

if TYPE_CHECKING:
    from synth.escort.source import ExemplarCompression

PICTURED = 6  # exemplars of a task that the report shows
NOTE = (
    "Exemplars as they were, the edge maps that are kept of them, and copies that were drawn from these maps. Nothing "
    "but the maps is carried to later tasks."
)


class Copied(Banked):
    """`task_<t>/<class>/<class>-<item>_seed<copy>.png`: copies of the images of a task's classes.

    What a copy is called and shows depends on its class, its edge map, its number and the run's seed alone, so one that
    was drawn for a new image serves again when this image has become an exemplar; in another chunk a pixel may move by
    a grey level. The maps bring copies back, so none is carried on.
    """

    source: ExemplarCompression

    def __init__(self, config: RunConfig, source: ExemplarCompression, data: DataManager, run: Run, folder: Path):
        super().__init__(config, source, data, run, folder)
        self.folders: dict[int, ImageFolder] = {}  # of the tasks whose copies were looked at

    def divide(self, per_class: int | None) -> tuple[int, int]:
        """Keep R images of ``per_class`` images' worth and hand S on: R + S / maps per image must not be more."""
        real, compressed = self.config.real_per_class, self.config.syn_per_class
        if per_class is None and real:
            raise ConfigError(f"synth.real_per_class={real}, but this learner keeps no real exemplars: set it to 0")
        if per_class is None:
            return 0, compressed
        if real is not None and real > per_class:
            raise ConfigError(f"synth.real_per_class={real} is more than all of memory_per_class={per_class}: lower it")
        if not compressed:
            return per_class if real is None else real, 0
        ratio = self.source.maps_per_image(self.data)
        if real is None:
            real = max(0, int(per_class - compressed / ratio + 1e-9))
        units = real + compressed / ratio
        if units > per_class + 1e-9:
            fits = int((per_class - real) * ratio + 1e-9)
            raise ConfigError(
                f"real_per_class + syn_per_class / {ratio:g} = {real} + {compressed} / {ratio:g} = {units:.3f} images' "
                f"worth per class is more than memory_per_class={per_class}: with {real} real ones at most "
                f"syn_per_class={fits} fit (on {self.data.dataset.name} {ratio:g} edge maps cost what an image costs)"
            )
        return real, compressed

    # ------------------------------------------------------------------ the life of a task

    def learned(self, task: Task) -> None:
        """Draw copies of the task's compressed exemplars: the first, or with ``prepare: all`` every one."""
        if not self.source.fitted_classes.issuperset(task.classes):
            return
        every = self.config.augmentations_per_image if self.config.prepare == "all" else 1
        with self.run.timed("generate"):
            images = self.copies(self.source.requests(list(task.classes), every))
            if len(images):
                self._show(task)
                self.folders[task.index].write_preview([images.select([label]) for label in task.classes])

    def past(self, task: Task) -> ImageSet:
        """Return the first copy of every compressed exemplar of the old classes."""
        with self.run.timed("generate"):
            return self._first_copies(range(task.num_old))

    def drawn_of_new(self, task: Task) -> ImageSet:
        if not self.source.fitted_classes.issuperset(task.classes):
            return ImageSet()
        with self.run.timed("generate"):
            return self._first_copies(task.classes)

    def batches(self, present: ImageSet, past: ImageSet, loading: Loading) -> CopiedBatches:
        return CopiedBatches(present, past, TrainingCopies(self, present + past), loading)

    def _first_copies(self, classes: Iterable[int]) -> ImageSet:
        return self.copies(self.source.requests(list(classes)))

    def copies(self, requests: Requests) -> ImageSet:
        """Return the images asked for, as files, in the order of ``requests``; those that are not there are drawn.

        Raises:
            BankError: if a folder holds images of another run.
        """
        tasks = torch.tensor([self.bank.task_of[label] for label in requests.labels.tolist()], dtype=torch.int64)
        paths: list[str] = [""] * len(requests)
        for index in tasks.unique().tolist():
            places = (tasks == index).nonzero().flatten()
            for place, path in zip(places.tolist(), self._bring(index, requests.take(places))):
                paths[place] = path
        return ImageSet.of(paths, requests.labels, items=requests.item)

    def _bring(self, index: int, requests: Requests) -> list[str]:
        """Return the files of these requests; those that no earlier call drew are drawn.

        The manifest is written when all are there, so that after a kill the same ones are missing, and fall into the
        same chunks.
        """
        folder = self._open(index)
        there = {name.rpartition(".")[0] for name in folder.files}
        first = {stem: place for place, stem in reversed(list(enumerate(stems_of(requests)))) if stem not in there}
        if first:
            wanted = requests.take(torch.tensor(sorted(first.values())))
            folder.draw(self.source, [self.source.in_drawing_order(wanted)])
        return folder.paths(requests)

    def _open(self, index: int) -> ImageFolder:
        if index not in self.folders:
            self.bank.claim_root()
            folder = self.bank.place(self.folder / f"task_{index}", index, (self.run.seed, self.config.name))
            folder.claim()
            self.folders[index] = folder
        return self.folders[index]

    # ------------------------------------------------------------------ what is said of it

    def expected(self) -> int:
        """Count the copies that a run may come to show, if it is long enough."""
        exemplars, images = self.config.syn_per_class * self.data.num_classes, sum(self.data.class_counts)
        return self.config.augmentations_per_image * (images if self.config.augmentation_prob else exemplars)

    def first_task_settings(self) -> dict[str, Any]:
        """Say what copies of new images bring into the first task's training; nothing where none are shown."""
        if not self.config.augmentation_prob:
            return {}
        later = {"syn_image_path", "syn_per_class", "real_per_class", "fit_after_last_task", "keep_sources", "prepare"}
        settings = self.config.dump_without(later | self.config.places)
        return {**settings, "weights": self.source.published_weights()}

    def newest(self, label: int) -> list[str]:
        """Return one copy of each image of a class, the first that was drawn."""
        folder = self.folders.get(self.bank.task_of[label])
        paths = [] if folder is None else sorted(map(str, folder.of_class(label)))
        return list({path.partition("_seed")[0]: path for path in reversed(paths)}.values())[::-1]

    def _show(self, task: Task) -> None:
        """Lay out originals, maps and copies of some of the task's exemplars, for the report."""
        maps, originals = self.source.maps, self.source.originals
        best = [(label, maps[label][0]) for label in task.classes if maps.get(label)][:PICTURED]
        labels, items = torch.tensor([[label, one.item] for label, one in best]).unbind(1)
        number = min(3, self.config.augmentations_per_image)
        asked = [self.source.ask(labels, items, torch.full_like(items, copy)) for copy in range(number)]
        columns = list(map(self.copies, asked))
        rows = []
        for position, (label, one) in enumerate(best):
            cells = [Cell(originals[one.item]) if one.item in originals else None]
            cells.append(Cell(one.edges().to(torch.uint8)[None] * 255, f"{len(one.bits)} bytes"))
            cells += [Cell(column.image(position)) for column in columns]
            rows.append(PanelRow(self.data.class_names[label], cells))
        names = ["original", "edge map", *(f"copy {copy}" for copy in range(number))]
        panel = Panel("Compressed exemplars", NOTE, names, rows, f"Task {task.index}")
        self.run.panels.write(f"compressed_{task.index}", panel)


class TrainingCopies:
    """Generated copies of all N samples of a training.

    Args:
        replay: draws them.
        samples: real images, each shown as a copy with ``augmentation_prob``, and first copies of compressed
            exemplars, of which there is no other image: their items name the maps.

    Attributes:
        chances: float (N,), of each sample, that a copy stands for it; 1 where there is no other image of it.
        num_copies: K, copies of each sample, all equally likely.
        first: int64 (M,), samples that are themselves their copy 0.
    """

    def __init__(self, replay: Copied, samples: ImageSet):
        config, source = replay.config, replay.source
        self.replay, self.num_copies, self.labels = replay, config.augmentations_per_image, samples.labels
        self.items = samples.items()
        real = self.items < 0
        self.first = (~real).nonzero().flatten()
        self.chances = torch.where(real, config.augmentation_prob, 1.0)
        if config.augmentation_prob and real.any():
            self.items[real] = source.read(samples.take(real.nonzero().flatten()))
        if config.prepare == "all":
            shown = (self.chances > 0).nonzero().flatten()
            every = torch.arange(self.num_copies).repeat_interleave(len(shown))
            self.draw(shown.repeat(self.num_copies), every)

    def draw(self, samples: Tensor, numbers: Tensor) -> ImageSet:
        """Return the copies of these numbers, int64 (M,), of these samples, int64 (M,), in their order."""
        with self.replay.run.timed("generate"):
            return self.replay.copies(self.replay.source.ask(self.labels[samples], self.items[samples], numbers))
