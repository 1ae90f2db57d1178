"""How edge maps enter a training: exemplars as maps, samples shown as copies of themselves, drawn when first wanted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from synth.drawing import ImageFolder, stems_of
from synth.escort.batches import CopiedBatches
from synth.replay import Banked
from synth.requests import Requests
from utils.data.batches import Loading
from utils.data.images import ImageSet
from utils.data.manager import Task
from utils.results.panels import Cell, Panel, PanelRow
from utils.run.errors import ConfigError

if TYPE_CHECKING:
    from synth.escort.source import ExemplarCompression

PICTURED = 6  # exemplars of a task that the report shows
NOTE = "Exemplars, the edge maps that are kept of them, and copies drawn from these: only the maps go to later tasks."


class Copied(Banked):
    """`task_<t>/<class>/<class>-<item>_seed<copy>.png`: copies of the images of a task's classes.

    What a copy is called and shows depends on its class, its edge map, its number and the run's seed alone, so one that
    was drawn for a new image serves again when this image has become an exemplar; in another chunk a pixel may move by
    a grey level. The maps bring copies back, so none is carried on.
    """

    source: ExemplarCompression

    def divide(self, per_class: int | None) -> tuple[int, int]:
        """Keep R images of ``per_class`` images' worth and hand S on: R + S / maps per image must not be more."""
        real, compressed = self.config.real_per_class, self.config.syn_per_class
        if per_class is None and real:
            raise ConfigError(f"synth.real_per_class={real}, but this learner keeps no real exemplars: set it to 0")
        if per_class is None:
            return 0, compressed
        if real is not None and real > per_class:
            raise ConfigError(f"synth.real_per_class={real} is more than all of memory_per_class={per_class}: lower it")
        ratio = self.source.maps_per_image(self.data) if compressed else 1
        if real is None:
            real = max(0, int(per_class - compressed / ratio + 1e-9))
        units, fits = real + compressed / ratio, int((per_class - real) * ratio + 1e-9)
        if units > per_class + 1e-9:
            raise ConfigError(
                f"real_per_class + syn_per_class / {ratio:g} = {real} + {compressed} / {ratio:g} = {units:.3f} is more "
                f"than memory_per_class={per_class}: with {real} real ones at most syn_per_class={fits} fit (on "
                f"{self.data.dataset.name} {ratio:g} edge maps cost what an image costs)"
            )
        return real, compressed

    # ------------------------------------------------------------------ the life of a task

    def learned(self, task: Task) -> None:
        """Draw copies of the task's compressed exemplars: the first, or with ``prepare: all`` every one."""
        every = self.config.augmentations_per_image if self.config.prepare == "all" else 1
        images = self.copies(self.source.requests(task.classes, every))
        if len(images):  # none of a class that is not learned yet
            self._show(task)
            self._open(task.index).write_preview([images.select([label]) for label in task.classes])

    def past(self, task: Task) -> ImageSet:
        """Return the first copy of every compressed exemplar of the old classes."""
        return self.copies(self.source.requests(range(task.num_old)))

    def drawn_of_new(self, task: Task) -> ImageSet:
        return self.copies(self.source.requests(task.classes))

    def batches(self, present: ImageSet, past: ImageSet, loading: Loading) -> CopiedBatches:
        return CopiedBatches(present, past, self, loading)

    def copies(self, requests: Requests) -> ImageSet:
        """Return the images asked for, as files, in the order of ``requests``; those that are not there are drawn.

        Raises:
            BankError: if a folder holds images of another run.
        """
        tasks = torch.tensor([self.bank.task_of[label] for label in requests.labels.tolist()], dtype=torch.int64)
        paths: dict[int, str] = {}
        with self.run.timed("draw"):
            for index in tasks.unique().tolist():
                places = (tasks == index).nonzero().flatten()
                paths |= zip(places.tolist(), self._bring(index, requests.take(places)))
        return ImageSet.of([paths[place] for place in range(len(requests))], requests.labels, items=requests.item)

    def _bring(self, index: int, requests: Requests) -> list[str]:
        """Return the files of these requests; those that no earlier call drew are drawn.

        The manifest is written when all are there, so that after a kill the same ones are missing, and fall into the
        same chunks.
        """
        folder = self._open(index)
        there = folder.by_stem
        first = {stem: place for place, stem in reversed(list(enumerate(stems_of(requests)))) if stem not in there}
        if first:
            wanted = requests.take(torch.tensor(sorted(first.values())))
            folder.draw(self.source, [self.source.in_drawing_order(wanted)])
        return folder.paths(requests)

    def _open(self, index: int) -> ImageFolder:
        folders, path = self.bank.folders, self.folder / f"task_{index}"
        if path not in folders:
            self.bank.claim_root()
            folders[path] = self.bank.place(path, index, (self.run.seed, self.config.name))
            folders[path].claim()
        return folders[path]

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
        folder = self.bank.folders.get(self.folder / f"task_{self.bank.task_of[label]}")
        paths = [] if folder is None else sorted(map(str, folder.of_class(label)))
        return list({path.partition("_seed")[0]: path for path in reversed(paths)}.values())[::-1]

    def _show(self, task: Task) -> None:
        """Lay out originals, maps and copies of some of the task's exemplars, for the report."""
        source, numbers = self.source, range(min(3, self.config.augmentations_per_image))
        best = [(label, source.maps[label][0]) for label in task.classes][:PICTURED]
        labels, items = torch.tensor([[label, one.item] for label, one in best]).unbind(1)
        columns = [self.copies(source.ask(labels, items, torch.full_like(items, number))) for number in numbers]
        rows = []
        for position, (label, one) in enumerate(best):
            edges = Cell(one.edges().to(torch.uint8)[None] * 255, f"{len(one.bits)} bytes")
            cells = [Cell(source.originals[label]), edges, *(Cell(images.image(position)) for images in columns)]
            rows.append(PanelRow(self.data.class_names[label], cells))
        names = ["original", "edge map", *(f"copy {number}" for number in numbers)]
        panel = Panel("Compressed exemplars", NOTE, names, rows, f"Task {task.index}")
        self.run.panels.write(f"compressed_{task.index}", panel)
