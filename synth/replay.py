"""How what a source makes enters the training of a task: one object between learner and source.

The source names its usual kind, a learner may bring its own. A newcomer finds here the three that serve any source:
images that are drawn once and stored, drawn anew before every task, or given by another run or program.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from synth.bank import Bank
from synth.base import ReplaySource
from synth.requests import Requests
from synth.stored import StoredSources
from utils.data.batches import Batches, ImageBatches, Loading, MixedBatches
from utils.data.images import FeatureSet, ImageSet, Samples
from utils.data.manager import DataManager, Task
from utils.run.carried import Carried, Items
from utils.run.config import RunConfig, SourceConfig
from utils.training.run import Run


class Replay:
    """What stands for old and new classes in training. By itself it is no replay: real images of the present alone.

    Args:
        config: of the whole run.
        source: plays the past back; None: nothing does.
        data: tasks and counts.
        run: device, random keys, clock.
        folder: where samples may be kept.
    """

    def __init__(self, config: RunConfig, source: ReplaySource | None, data: DataManager, run: Run, folder: Path):
        self.run_config, self.source, self.data, self.run, self.folder = config, source, data, run, Path(folder)
        self.config: SourceConfig | None = None if source is None else source.config
        trains = source is None or source.config.source_dir is None
        self.pupil = source if trains else StoredSources(source, data)  # what is told to learn
        self.learns = source is not None and source.config.need_syn_imgs
        self.replaces_exemplars = False  # whether the learner keeps none because of it

    @classmethod
    def check(cls, config: RunConfig, source: type[ReplaySource]) -> None:
        """See that a source can be replayed in this way, before anything is built. Default: any can.

        Raises:
            ConfigError: if not.
        """

    @classmethod
    def serves(cls, config: RunConfig) -> bool:
        """Whether a source whose usual kind this is enters so; else as its config says. Default: it always does."""
        return True

    def require(self) -> None:
        """See that what this run needs, beside weights, is there; raises what names it."""
        if isinstance(self.pupil, StoredSources):
            self.pupil.require()

    def divide(self, per_class: int | None) -> tuple[int, int]:
        """Divide the room for exemplars between the learner and the source.

        Args:
            per_class: images' worth per class; None: the learner keeps none.

        Returns:
            How many images of each class the learner keeps, and how many more it hands to the source's ``fit_after``.

        Raises:
            ConfigError: if the config wants more than there is.
        """
        return per_class or 0, 0

    # ------------------------------------------------------------------ the life of a task

    def fit_before(self, task: Task, real: ImageSet) -> None:
        """Let the source look at a task's real images before the classifier trains."""
        if self.learns:
            with self.run.timed("fit"):
                self.pupil.fit_before(task, real)
            self.learned(task)

    def fit_after(self, task: Task, real: ImageSet, past: Samples, exemplars: ImageSet, encoder: nn.Module) -> None:
        """Let the source learn once the classifier has trained; see `ReplaySource.fit_after`."""
        if self.learns and (task.num_seen < self.data.num_classes or self.config.fit_after_last_task):
            with self.run.timed("fit"):
                self.pupil.fit_after(task, real, past, exemplars, encoder)
            self.learned(task)

    def learned(self, task: Task) -> None:
        """Draw what is kept, for the source may have just learned this task. Default: nothing is kept."""

    def present(self, task: Task, real: ImageSet) -> Samples:
        """Return what stands for the new classes; default: their real images."""
        return real

    def past(self, task: Task) -> Samples:
        """Return what stands for the old classes; default: nothing."""
        return ImageSet()

    def drawn_of_new(self, task: Task) -> Samples:
        """Return generated samples of the task's own classes, from a source that has learned them already."""
        return ImageSet()

    def batches(self, present: Samples, past: Samples, loading: Loading) -> Batches:
        """Shuffle the present and the past together."""
        kind = MixedBatches if isinstance(past, FeatureSet) else ImageBatches
        return kind(present, past, loading)

    # ------------------------------------------------------------------ what is said and kept of it

    def expected(self) -> int:
        """Count the samples that a run draws to replay them, for `--plan`."""
        return 0

    def try_drawing(self, task: Task, requests: Requests) -> None:
        """Draw as the task's training would, for `--plan`."""
        self.source.generate(requests)

    def old_samples(self) -> list[int]:
        """Count the samples of old classes that each task replays."""
        counts = [self.config.syn_per_class or count for count in self.data.class_counts]
        return [sum(counts[: self.data.task(index).num_old]) for index in range(self.data.num_tasks)]

    def carried(self) -> list[Carried]:
        """Name what it keeps between tasks."""
        return []

    def first_task_settings(self) -> dict[str, Any]:
        """Return the keys that shape the training of the first task, for runs that share its weights."""
        return {}

    def newest(self, label: int) -> list[str]:
        """Return image files of a class to be looked at, the last that were drawn."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """Return JSON that the next task needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""

    def prune(self) -> None:
        """Delete what was given up, once a checkpoint knows it."""


class Banked(Replay):
    """A replay whose images lie in a `Bank`."""

    def __init__(self, config: RunConfig, source: ReplaySource, data: DataManager, run: Run, folder: Path):
        super().__init__(config, source, data, run, folder)
        self.bank = Bank(folder, source, data)

    def drawn_of_new(self, task: Task) -> ImageSet:
        if not self.source.fitted_classes.issuperset(task.classes):
            return ImageSet()
        with self.run.timed("draw"):
            self.bank.fill(task.index)
        return self.bank.stored(task.classes)

    def expected(self) -> int:
        return sum(self.old_samples())

    def newest(self, label: int) -> list[str]:
        return self.bank.newest(label)

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.bank.kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.bank.kept = {int(label): count for label, count in state.get("kept", {}).items()}

    def prune(self) -> None:
        self.bank.prune()


class Stored(Banked):
    """Each class is drawn once, right after its source has learned it; the images are memory."""

    def learned(self, task: Task) -> None:
        self.drawn_of_new(task)

    def expected(self) -> int:
        # Where the last task is learned, it is drawn too, though nobody replays it.
        learns_last = not self.source.learns_after or self.config.fit_after_last_task
        drawn = self.data.num_classes if learns_last else self.data.task(self.data.num_tasks - 1).num_old
        return sum(map(self.bank.per_class, range(drawn))) if self.learns else 0

    def past(self, task: Task) -> ImageSet:
        with self.run.timed("draw"):
            return self.bank.stored(label for label in self.bank.task_of if label < task.num_old)

    def carried(self) -> list[Carried]:
        items = Items("replay images", True, None, self.bank.counts, self.bank.drop_last)
        return [Carried("bank", nbytes=self.bank.nbytes(), items=items)]


class Redrawn(Banked):
    """All old classes are drawn anew from the newest source before every task; no image is carried on."""

    def past(self, task: Task) -> ImageSet:
        with self.run.timed("draw"):
            return self.bank.redraw(task.index)


class Given(Stored):
    """Images of another run or program (`need_syn_imgs: false`): nothing is learned and nothing drawn."""

    def require(self) -> None:
        """See that the images of every task but the last are there; those of the last one are never replayed."""
        for index in range(self.data.num_tasks - 1):
            self.bank.fill(index)

    def expected(self) -> int:
        return sum(map(self.bank.per_class, range(self.data.task(self.data.num_tasks - 1).num_old)))

    def drawn_of_new(self, task: Task) -> ImageSet:
        if task.num_seen == self.data.num_classes and not self.bank.holds(task.index):
            return ImageSet()  # of a source that learned only what was to be replayed
        return self.bank.stored(task.classes)


class Features(Replay):
    """Features of old classes, which a source of features makes and the head alone sees.

    They are made anew before every task from what the source has learned, so nothing but the source is carried on.
    """

    def past(self, task: Task) -> FeatureSet:
        key, made = (self.run.seed, self.config.name, task.index), FeatureSet()
        with self.run.timed("draw"):
            for label, count in enumerate(self.data.class_counts[: task.num_old]):
                asked = Requests.of_classes([label], self.config.syn_per_class or count, key)
                made = made + self.source.generate(asked)
        return made

    def expected(self) -> int:
        return sum(self.old_samples())


def replay_kind(config: RunConfig, source: type[ReplaySource] | None, own: type[Replay] | None) -> type[Replay]:
    """Pick how a source enters a training: in the learner's own way, the source's usual one, or as its config says."""
    if source is None:
        return Replay
    if own is not None:
        return own
    if source.usual_replay is not None and source.usual_replay.serves(config):
        return source.usual_replay
    if source.samples == "features":
        return Features
    if not config.synth.need_syn_imgs:
        return Given
    return {"keep": Stored, "redraw": Redrawn}[config.synth.replay]
