"""Sources as they were after every task: kept by one run, taken by others instead of training their own."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from torch import nn

from synth.base import ReplaySource
from utils.data.images import ImageSet, Samples
from utils.data.manager import DataManager, Task
from utils.run.errors import CheckpointError, ConfigError
from utils.run.files import whole_folder
from utils.run.log import log
from utils.run.manifest import Manifest

SOURCES_FOLDER = "sources"
REMEDY = (
    "Name another synth.source_dir, set the key as it was there, or leave source_dir out to train; a damaged source "
    "needs its run repeated with --overwrite"
)


def save_source(source: ReplaySource, folder: Path) -> None:
    """Write a source into `<folder>/source`, where `synth.sample` looks for it too."""
    (folder / "source").mkdir()
    source.save(folder / "source")


def keep_source(source: ReplaySource, data: DataManager, task: Task, folder: Path) -> None:
    """Write a source as it is after a task into `<folder>/sources/task_<t>`, whole or not at all.

    One that is there and whole is left alone. A source that has not learned the task, such as a DDPM after the last
    one, is not written.
    """
    if not source.fitted_classes.issuperset(task.classes):
        return
    target, classes = folder / SOURCES_FOLDER / f"task_{task.index}", sorted(source.fitted_classes)
    notes = {"weights": source.fingerprint(), "task": task.index, "run_seed": source.run.seed}
    with suppress(CheckpointError):  # what is damaged or another's is written anew
        manifest = _manifest(target, source, data, classes)
        manifest.claim(write=False)
        if manifest.verify().get("weights") == notes["weights"]:
            return
    with whole_folder(target) as temporary:
        save_source(source, temporary)
        _manifest(temporary, source, data, classes).seal(**notes)


def _manifest(folder: Path, source: ReplaySource, data: DataManager, classes: list[int]) -> Manifest:
    """Say what must agree for a run to take a source."""
    identity = {
        "dataset": data.dataset.name,
        "class_order": {str(place): original for place, original in enumerate(data.class_order)},  # differs by place
        "source": source.config.name, "settings": source.config.training_settings(), "fitted_classes": classes,
        # Of another share of the same data, a source may have seen what this run holds out.
        "class_counts": [data.class_counts[label] for label in classes],
        "images": data.images_hash(classes),
    }  # fmt: skip
    return Manifest(folder, "source", identity, remedy=REMEDY)


class StoredSources:
    """Stands where a source would learn, and gives it the state that another run kept after the same task.

    Args:
        source: new; its config's ``source_dir`` names the folder.
        data: of this run, whose classes the stored sources must have learned.

    Raises:
        ConfigError: if ``source_dir`` does not exist.
    """

    def __init__(self, source: ReplaySource, data: DataManager):
        self.source, self.data = source, data
        self.folder = find_sources(source.config.source_dir, source.run.folder.name)

    def fit_before(self, task: Task, images: ImageSet) -> None:
        """Load a source that learns before the classifier."""
        if not self.source.learns_after:
            self._load(task)

    def fit_after(self, task: Task, images: ImageSet, past: Samples, exemplars: ImageSet, encoder: nn.Module) -> None:
        """Load a source that learns after the classifier."""
        if self.source.learns_after:
            self._load(task)

    def require(self) -> None:
        """See that the sources of all tasks that this run needs are there and fit.

        Raises:
            CheckpointError: at the first one that is absent, lacks a file, or has learned something else.
        """
        unused = self.source.learns_after and not self.source.config.fit_after_last_task
        for index in range(self.data.num_tasks - unused):
            manifest = self._find(self.data.task(index))
            for name in manifest.files():
                if not (manifest.folder / name).exists():
                    raise CheckpointError(f"{manifest.folder / name} is missing or damaged: {REMEDY}")

    def describe(self) -> str:
        """Say in one line for `--plan` where the sources come from."""
        return f"no source is trained: each task's comes from {self.folder}"

    def _load(self, task: Task) -> None:
        manifest = self._find(task)
        manifest.verify()
        self.source.load(manifest.folder / "source")
        log.info("Task %d: the source is that of %s", task.index, manifest.folder)

    def _find(self, task: Task) -> Manifest:
        """Return the manifest of a task's source, which fits."""
        folder = self.folder / f"task_{task.index}"
        manifest = _manifest(folder, self.source, self.data, list(range(task.num_seen)))
        if not manifest.exists:
            raise CheckpointError(
                f"no source of task {task.index} in synth.source_dir={self.source.config.source_dir!r}: "
                f"{manifest.path} is not there. Sources are kept by a run or `python -m synth.train` with "
                "synth.keep_sources=true; one that has ended without it needs --overwrite too"
            )
        manifest.claim(write=False)
        return manifest


def find_sources(source_dir: str, seed_folder: str) -> Path:
    """Return the folder that holds `task_<t>` of stored sources, or should.

    Args:
        source_dir: of a run, of its seed, of `synth.train`, or their `sources`.
        seed_folder: `seed_<s>`, taken where ``source_dir`` is a run with several.

    Raises:
        ConfigError: if ``source_dir`` does not exist.
    """
    given = Path(source_dir)
    if not given.is_dir():
        known = "a run, of its seed or of `python -m synth.train`, made with synth.keep_sources=true"
        raise ConfigError(f"synth.source_dir={source_dir!r}: no such folder; name that of {known}")
    if given.name == SOURCES_FOLDER or any(given.glob("task_*")):
        return given
    return (given / seed_folder if any(given.glob("seed_*")) else given) / SOURCES_FOLDER
