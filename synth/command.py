"""What `synth.train` and `synth.sample` share: config files, classes by name, fitted sources on disk."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, SerializeAsAny

from synth import SOURCES, build_source_config
from synth.base import ReplaySource
from utils.data.datasets import Dataset, load_dataset
from utils.data.manager import DataManager, cut_tasks
from utils.run.config import NOT_IDENTITY, RunConfig, SourceConfig
from utils.run.errors import CheckpointError, ConfigError
from utils.run.files import read_json
from utils.run.folder import CONFIG, DESCRIPTION, read_data, run_manifest
from utils.run.manifest import MANIFEST, Manifest
from utils.run.registry import nearest
from utils.run.words import ALIASES, apply_overrides, flat_keys, parse_yaml, read_experiment, translate
from utils.training.checkpoint import Checkpoints
from utils.training.run import Run

FITTED = "fitted.json"  # manifest of a folder that synth.train has finished
# What an experiment file says of the classifier, its memory and the run's name: nothing that a source could see.
OF_THE_CLASSIFIER = {"prefix", "model_name", "memory_size", "memory_per_class", "fixed_memory", "convnet_type", "stem",
                     "pretrained", "backbone_weights", "backbone_args", "replay_resize"}  # fmt: skip
# The commands fit and draw whatever the experiment does with stored images and sources, in folders of their own.
OWN_FOLDERS = {"need_syn_imgs": True, "syn_image_path": None, "adopt_syn_images": False, "source_dir": None}


class FitConfig(RunConfig):
    """An experiment of which only the data, its tasks and the source count: no classifier is trained."""

    model_name: str = Field("", description="the experiment's learner, which is not used")
    init_cls: int | None = Field(None, ge=1, description="classes in the first task; null: all, in their own order")
    increment: int | None = Field(None, ge=1, description="classes in every later task; null: as init_cls")
    synth: SerializeAsAny[SourceConfig] = Field(description="the replay source and its keys")
    classes: list[int | str] = Field([], description="fit these alone, ids in learning order or names; empty: all")
    task: int | None = Field(None, ge=0, description="fit this task's classes alone; null: all tasks")

    def scheduled(self, num_classes: int) -> FitConfig:
        """Say the tasks: without `init_cls` one of all classes, in the data set's own order."""
        if self.init_cls is None:
            return self.model_copy(update={"init_cls": num_classes, "increment": num_classes, "shuffle": False})
        return self.model_copy(update={"increment": self.increment or self.init_cls})

    def identity(self) -> dict[str, Any]:
        """Return what makes two fitted sources the same; the seed too, since a folder holds one."""
        return self.dump_without({*NOT_IDENTITY, *OF_THE_CLASSIFIER} - {"seed"})


def command_parser(name: str, text: str) -> argparse.ArgumentParser:
    """Make the parser of `python -m synth.<name>` with the flags that both commands have.

    Those that are called as a key of `FitConfig` are the key; ``text`` says what the command does.
    """
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=f"python -m synth.{name}", description=text, formatter_class=form)
    parser.add_argument("--dataset", help="data set, where the file names none or for another one")
    parser.add_argument("--data_dir", help="where data sets lie (default: data, or what the file says)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="override a key; may be given many times; dots reach into synth")  # fmt: skip
    parser.add_argument("--seed", type=int, help="of all random choices (default: the file's first, or 1993)")
    parser.add_argument("--device", help='GPU id, "cpu" or "auto" (default: what the file says, or auto)')
    parser.add_argument("--offline", action="store_true", default=None, help="fetch nothing from a network")
    return parser


def read_file(path: str | Path) -> dict[str, Any]:
    """Read the keys of an experiment file, or of a CompVis YAML's section `reprise`: its data and its source.

    A YAML without that section describes a model and nothing else: the source "ldm" then reads it.

    Raises:
        ConfigError: if the file is absent, broken, or holds no object.
    """
    is_yaml = Path(path).suffix in (".yaml", ".yml")
    keys = read_experiment(path, parse_yaml) if is_yaml else read_experiment(path)
    if is_yaml:
        keys = keys.get("reprise", {"synth": {"name": "ldm", "yaml": str(path)}})
    if not isinstance(keys, dict) or not isinstance(keys.get("synth") or {}, dict):
        raise ConfigError(f"{path}: must hold keys such as dataset and synth, and synth an object with a name")
    return keys


def build_fit_config(raw: dict[str, Any], args: argparse.Namespace) -> FitConfig:
    """Build the checked config of keys from a file under the flags of a command.

    Args:
        raw: keys of an experiment file, whose learner's own keys are passed over, or of a section `reprise`.
        args: of a `command_parser`.

    Raises:
        ConfigError: for an unknown key, a wrong value, a source or data set that is not said, and for a learner's
            file that leaves the class order to the learner.
    """
    SOURCES.names()  # every room registers its words
    for override in args.overrides:
        key = override.partition("=")[0].strip().split(".")[0]
        if key not in {*FitConfig.model_fields, *flat_keys(), *ALIASES}:
            raise ConfigError(f"--set {override}: unknown key {key!r}{nearest(key, FitConfig.model_fields)}")
    raw = translate(apply_overrides(raw, args.overrides))
    raw |= {key: value for key, value in vars(args).items() if key in FitConfig.model_fields and value is not None}
    source = build_source_config(raw.get("synth")).model_copy(update=OWN_FOLDERS)
    if SOURCES[source.name].samples == "features":
        raise ConfigError(f"synth.name={source.name!r} learns what a classifier sees: use main.py, which trains one")
    if raw.get("dataset") is None:
        raise ConfigError("the file does not say which data: give --dataset")
    if raw.get("model_name"):
        # Learners have defaults of their own for these keys; a guess would give the classes other labels than the run.
        for key in ["shuffle", "few_shot_draw"] if raw.get("kshot") else ["shuffle"]:
            if raw.get(key) is None:
                why = f"the file leaves {key!r} to the learner {raw['model_name']!r}, whose default is not known here"
                raise ConfigError(f"{why}: give --set {key}=..., so that classes and images are those of the run")
        raw = {key: value for key, value in raw.items() if key in FitConfig.model_fields}
    return FitConfig.build({**raw, "synth": source})


def cut_data(config: FitConfig) -> tuple[FitConfig, DataManager]:
    """Read the data set and cut its tasks; return the config with them."""
    dataset = load_dataset(config.data_name, config.data_dir, config.offline)
    config = config.scheduled(dataset.num_classes)
    return config, cut_tasks(config, config.seed[0], dataset)


def make_source(config: FitConfig, run: Run, data: DataManager | FittedSource) -> ReplaySource:
    """Build the source of a config, which has learned nothing yet."""
    return SOURCES[config.synth.name](config.synth, run, len(data.class_names), data.class_names, data.dataset)


def pick_classes(wanted: Iterable[int | str], class_names: list[str], known: Iterable[int], what: str) -> list[int]:
    """Find the labels of classes that are given as ids in learning order or as names, ascending.

    Args:
        wanted: empty for all of ``known``. What reads as a number is an id.
        class_names: in learning order.
        known: labels that can be picked.
        what: names the flag in messages.

    Raises:
        ConfigError: if one is unknown; the nearest known name is named.
    """
    known, texts = sorted(known), [str(item).strip() for item in wanted]
    by_name = {class_names[label].lower(): label for label in known}
    labels = [int(text) if text.isdigit() else by_name.get(text.lower(), -1) for text in texts]
    for text, label in zip(texts, labels):
        if label not in known:
            shown = ", ".join(f"{label} ({class_names[label]})" for label in known[:10]) + ", ..." * (len(known) > 10)
            raise ConfigError(f"{what} {text!r}: no such class{nearest(text.lower(), by_name) or '.'} Known: {shown}")
    return sorted(set(labels)) or known


class FittedSource(NamedTuple):
    """A source on disk, fitted by `synth.train` or by a run.

    Attributes:
        folder: what its ``load`` reads.
        raw: keys of the config that it was fitted with.
        dataset: without its images.
        class_names, class_order: in learning order; the order holds original ids.
    """

    folder: Path
    raw: dict[str, Any]
    dataset: Dataset
    class_names: list[str]
    class_order: list[int]


def fitted_manifest(folder: Path) -> Manifest:
    """Return the manifest of a folder that `synth.train` has finished."""
    return Manifest(folder, "fitted", {}, remedy="fit the source again with --overwrite", name=FITTED)


def find_fitted(path: Path) -> FittedSource | None:
    """Find the fitted source in a folder; None where there is none.

    Args:
        path: of `synth.train`, finished or not; of a run's seed; `task_<t>` or `task_<t>/source` in its checkpoints.

    Raises:
        CheckpointError: if the source is damaged, or nothing says what it was fitted on.
    """
    if (folder := _source_folder(path.absolute())) is None:
        return None
    home = next((parent for parent in (folder, *folder.parents) if (parent / DESCRIPTION).exists()), None)
    if home is None:
        raise CheckpointError(f"{folder} lies in no folder of `python -m synth.train` or of a run")
    place = home if (home / CONFIG).exists() else home.parent  # a run's seeds share one
    raw = run_manifest(place, None).read()["config"]
    if place != home:
        raw["seed"] = [int(home.name.split("_")[1])]
    return FittedSource(folder, raw, *read_data(home))


def _source_folder(path: Path) -> Path | None:
    """Return the folder that a source loads from; it is whole."""
    if (path / FITTED).exists():
        fitted_manifest(path).verify()
        return path
    checkpoints = Checkpoints(path / "checkpoints", "task")  # of a training or a run that goes on
    homes = [path.parent if path.name == "source" else path, *map(checkpoints.path, checkpoints.numbers())]
    home = next((home for home in homes if (home / "source").is_dir()), None)
    if home is None:
        return None
    remedy = "name another checkpoint, or repeat the run that wrote it"
    kind = read_json(home / MANIFEST, remedy).get("kind")
    Manifest(home, "source" if kind == "source" else "checkpoint", remedy=remedy).verify()
    return home / "source"
