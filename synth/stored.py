"""Sources as they were after every task: kept by one run, taken by others instead of training their own."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from torch import nn

from synth.base import ReplaySource
from synth.drawing import MANIFEST, damaged_files, first_difference
from utils.data.images import ImageSet
from utils.data.manager import DataManager, Task
from utils.run.errors import CheckpointError, ConfigError
from utils.training.checkpoint import folder_hashes, whole_folder, write_json

log = logging.getLogger("reprise")

SOURCES_FOLDER = "sources"
# What must agree for a run to take a source; the rest of its manifest tells a reader where it comes from.
MUST_FIT = ("dataset", "class_order", "source", "settings", "fitted_classes", "class_counts", "images")


def save_source(source: ReplaySource, folder: Path) -> None:
    """Write a source into `<folder>/source`, where `synth.sample` looks for it too."""
    (folder / "source").mkdir()
    source.save(folder / "source")


def keep_source(source: ReplaySource, data: DataManager, task: Task, folder: Path) -> None:
    """Write a source as it is after a task into `<folder>/sources/task_<t>`, whole or not at all.

    One that is there and whole is left alone. A source that has not learned the task, such as a DDPM after the last
    one, is not written.
    """
    target = folder / SOURCES_FOLDER / f"task_{task.index}"
    if not source.fitted_classes.issuperset(task.classes):
        return
    manifest = _describe(source, data, sorted(source.fitted_classes))
    manifest |= {"task": task.index, "run_seed": source.run.seed, "weights": source.fingerprint()}
    if _is_whole(target, manifest):
        return
    with whole_folder(target) as temporary:
        save_source(source, temporary)
        write_json(temporary / MANIFEST, {**manifest, "files": folder_hashes(temporary)})


def _describe(source: ReplaySource, data: DataManager, classes: list[int]) -> dict[str, Any]:
    """The fields of ``MUST_FIT``."""
    return {
        "dataset": data.dataset.name,
        "class_order": data.class_order,
        "source": source.config.name,
        "settings": source.training_settings(source.config),
        "fitted_classes": classes,
        # Of another share of the same data, a source may have seen what this run holds out.
        "class_counts": [data.class_counts[label] for label in classes],
        "images": data.images_hash(classes),
    }


def _numbered(manifest: dict[str, Any]) -> dict[str, Any]:
    """With the class order by its places, so that the first difference is one place and not two long lists."""
    return {**manifest, "class_order": dict(enumerate(manifest["class_order"]))}


def _is_whole(folder: Path, manifest: dict[str, Any]) -> bool:
    try:
        stored = json.loads((folder / MANIFEST).read_text())
        files = stored.pop("files")
    except (OSError, ValueError, KeyError):
        return False  # it is written anew
    return stored == manifest and not damaged_files(folder, files)


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
        if not self.source.learns_after():
            self._load(task)

    def fit_after(
        self, task: Task, images: ImageSet, replay: ImageSet, exemplars: ImageSet, encoder: nn.Module
    ) -> None:
        """Load a source that learns after the classifier."""
        if self.source.learns_after():
            self._load(task)

    def require(self) -> None:
        """See that the sources of all tasks that this run needs are there and fit.

        Raises:
            CheckpointError: at the first one that is absent, lacks a file, or has learned something else.
        """
        # What learns after the classifier is not asked for its last task.
        unused = self.source.learns_after() and not self.source.config.fit_after_last_task
        for index in range(self.data.num_tasks - unused):
            folder, manifest = self._find(self.data.task(index))
            for name in manifest["files"]:
                if not (folder / name).exists():
                    raise _damaged(folder / name)

    def describe(self) -> str:
        """One line for `--plan`."""
        return f"no source is trained: each task's comes from {self.folder}"

    def _load(self, task: Task) -> None:
        folder, manifest = self._find(task)
        if damaged := damaged_files(folder, manifest["files"]):
            raise _damaged(folder / damaged[0])
        self.source.load(folder / "source")
        log.info("Task %d: the source is that of %s", task.index, folder)

    def _find(self, task: Task) -> tuple[Path, dict[str, Any]]:
        """The folder of a task's source and its manifest, which fits."""
        folder = self.folder / f"task_{task.index}"
        stored = self._read(folder / MANIFEST, task)
        wanted = _describe(self.source, self.data, list(range(task.num_seen)))
        if difference := first_difference(_numbered(stored), _numbered(wanted), MUST_FIT):
            raise CheckpointError(
                f"the source in {folder} does not fit this run: {difference}. Name another synth.source_dir, set the "
                "key as it was there, or leave source_dir out to train"
            )
        return folder, stored

    def _read(self, path: Path, task: Task) -> dict[str, Any]:
        try:
            stored = json.loads(path.read_text())
            if not {*MUST_FIT, "files"}.issubset(stored):
                raise ValueError("incomplete")
            return stored
        except FileNotFoundError as error:
            raise CheckpointError(
                f"no source of task {task.index} in synth.source_dir={self.source.config.source_dir!r}: {path} is not "
                "there. Sources are kept by a run or `python -m synth.train` with synth.keep_sources=true; one that "
                "has ended without it needs --overwrite too"
            ) from error
        except ValueError as error:
            raise _damaged(path) from error


def find_sources(source_dir: str, seed_folder: str) -> Path:
    """The folder that holds `task_<t>` of stored sources, or should.

    Args:
        source_dir: of a run, of its seed, of `synth.train`, or their `sources`.
        seed_folder: `seed_<s>`, taken where ``source_dir`` is a run with several.

    Raises:
        ConfigError: if ``source_dir`` does not exist.
    """
    given = Path(source_dir)
    if not given.is_dir():
        raise ConfigError(
            f"synth.source_dir={source_dir!r}: no such folder; name that of a run, of its seed or of "
            "`python -m synth.train`, made with synth.keep_sources=true"
        )
    if given.name == SOURCES_FOLDER or any(given.glob("task_*")):
        return given
    return (given / seed_folder if any(given.glob("seed_*")) else given) / SOURCES_FOLDER


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is missing or damaged: delete {path.parent} and repeat the run that kept it with --overwrite, or name "
        "another synth.source_dir"
    )
