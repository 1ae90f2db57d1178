"""Draw images of chosen classes from a fitted replay source.

They go to <output_dir>/<class>/<class>-<i>.png (or .jpg above 64 pixels), beside preview.png to look at and
manifest.json, which says what made them. The same command again draws what is missing.

--ckpt is a folder of `python -m synth.train`; a run's outputs/<run>/seed_<s>/checkpoints/task_<t>/source; or a
published model for the source ldm (hub id, folder or model.ckpt), with --embeddings or else with the
class_embeddings.safetensors beside it; without any, the names of the classes are the prompts. A fitted source has its
own settings and takes from --config what it says of synth, such as another guidance.

examples:
  python -m synth.sample --ckpt outputs/diffusion_model/ --num_samples 10 --cond_class 0,rose
  python -m synth.sample --ckpt outputs/digits/seed_1993/checkpoints/task_4/source --output_dir outputs/look
  python -m synth.sample --config my.yaml --ckpt models/ldm/text2img-large/model.ckpt
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from synth import SOURCES, build_source_config
from synth.base import ReplaySource
from synth.command import (
    FitConfig,
    FittedSource,
    build_fit_config,
    command_parser,
    find_fitted,
    pick_classes,
    read_file,
)  # fmt: skip
from synth.drawing import ImageFolder, identify, name_classes
from synth.requests import Requests
from utils.data import subsets
from utils.data.datasets import Dataset, load_dataset
from utils.data.images import ImageSet
from utils.data.manager import Task, cut_tasks
from utils.run.command import exit_code
from utils.run.errors import ConfigError
from utils.run.log import log, log_to_console
from utils.run.words import apply_overrides, translate
from utils.training.run import Run
from utils.training.runtime import Runtime

EMBEDDINGS = "class_embeddings.safetensors"  # what class inversion saves


@dataclass(frozen=True)
class Opened:
    """A source that is ready to draw.

    Attributes:
        source: with its classes, their names, and the run's seed.
        config: tasks and settings.
        class_order: original ids in learning order.
    """

    source: ReplaySource
    config: FitConfig
    class_order: list[int]

    def requests(self, classes: list[int], per_class: int) -> list[Requests]:
        """Those of a run with these tasks and this seed, so that its images are drawn again.

        A source that makes copies takes its exemplars in turn instead, under other seeds than a run's.
        """
        sizes = subsets.task_sizes(len(self.class_order), self.config.init_cls, self.config.increment)
        tasks = np.repeat(range(len(sizes)), sizes).tolist()  # of every class
        # With `redraw`, a run draws all old classes in the name of the task that comes next.
        keep, coming = self.config.synth.replay == "keep", 1 + max(tasks[label] for label in self.source.fitted_classes)
        asked = []
        for index, own in groupby(classes, tasks.__getitem__):  # classes ascend, and so do their tasks
            key = (self.source.run.seed, self.config.synth.name, index if keep else coming)
            asked.append(Requests.of_classes(list(own), per_class, key))
        return asked


def open_source(args: argparse.Namespace) -> Opened:
    """The source that --ckpt stands for, with the embeddings of --embeddings or beside it."""
    fitted = find_fitted(Path(args.ckpt))
    if fitted is None:
        return _open_foreign(args)
    if args.embeddings is not None:
        raise ConfigError(f"--ckpt {args.ckpt} has embeddings of its own: --embeddings goes with a foreign checkpoint")
    return _open_fitted(fitted, args)


def _open_fitted(fitted: FittedSource, args: argparse.Namespace, **synth: Any) -> Opened:
    """As it was fitted, but for what --config and --set say of the drawing."""
    given = {} if args.config is None else translate(read_file(args.config))
    raw = {**fitted.raw, "synth": {**fitted.raw["synth"], **(given.get("synth") or {}), **synth}}
    raw = apply_overrides({**raw, "dataset": args.dataset or given.get("dataset") or raw["dataset"]}, args.overrides)
    name = raw["synth"].get("name") if isinstance(raw["synth"], dict) else raw["synth"]
    both = {"dataset": (fitted.raw["dataset"], raw["dataset"]), "synth.name": (fitted.raw["synth"]["name"], name)}
    for what, (there, here) in both.items():
        if str(there).lower() != str(here).lower():
            raise ConfigError(f"{fitted.folder} was fitted with {what}={there!r}, not with {here!r}: leave that out")
    config = build_fit_config(raw, args)
    source = _build(args, config, fitted.dataset, fitted.class_names)
    source.load(fitted.folder)
    return Opened(source, config.scheduled(len(fitted.class_names)), fitted.class_order)


def _open_foreign(args: argparse.Namespace) -> Opened:
    """A published model: with embeddings that were found for it, or drawing from the names of the classes."""
    if args.config is None and args.dataset is None:
        raise ConfigError(f"{_no_source(args.ckpt)}; for a published model say with --config or --dataset what to draw")
    raw = {"synth": {"name": "ldm"}} if args.config is None else translate(read_file(args.config))
    if "ldm_ckpt" not in type(build_source_config(raw.get("synth"))).model_fields:
        raise ConfigError(_no_source(args.ckpt))
    embeddings = _find_embeddings(args)
    fitted = None if embeddings is None else find_fitted(embeddings)
    if fitted is not None:
        return _open_fitted(fitted, args, ldm_ckpt=args.ckpt)
    found = {"ldm_ckpt": args.ckpt, "inversion": embeddings is not None}
    config = build_fit_config({**raw, "synth": {**raw["synth"], **found}}, args)
    dataset = load_dataset(config.data_name, config.data_dir, config.offline)
    config = config.scheduled(dataset.num_classes)
    data = cut_tasks(config, config.seed[0], dataset)
    source = _build(args, config, data.dataset, data.class_names)
    if embeddings is not None:
        source.load(embeddings)
    else:
        log.info("No %s: the names of the classes are the prompts (--embeddings FILE names some)", EMBEDDINGS)
        source.fit_before(Task(0, range(data.num_classes), tuple(data.class_names)), ImageSet())
    return Opened(source, config, data.class_order)


def _no_source(ckpt: str) -> str:
    return (
        f"--ckpt {ckpt} holds no fitted source: give a folder that `python -m synth.train` wrote, or a run's "
        "outputs/<run>/seed_<s>/checkpoints/task_<t>/source"
    )


def _find_embeddings(args: argparse.Namespace) -> Path | None:
    """The folder of the class embeddings, or None where none are named and none lie beside the checkpoint."""
    path = Path(args.embeddings or args.ckpt)
    folder = path if path.is_dir() else path.parent
    if all((folder / name).exists() for name in (EMBEDDINGS, "source.json")):
        return folder
    if args.embeddings is None:
        return None
    raise ConfigError(
        f"--embeddings {path}: {folder} lacks {EMBEDDINGS} or the source.json that `python -m synth.train` writes "
        "beside it"
    )


def _build(args: argparse.Namespace, config: FitConfig, dataset: Dataset, class_names: list[str]) -> ReplaySource:
    run = Run(Path(args.output_dir), config.train_seed(config.seed[0]), Runtime(config.device, config.precision))
    return SOURCES[config.synth.name](config.synth, run, len(class_names), class_names, dataset)


def draw(opened: Opened, classes: list[int], per_class: int, folder: Path) -> None:
    """Bring a folder to ``per_class`` images of every class; images that are there are left alone.

    Raises:
        BankError: if the folder holds images of other settings, or images without a manifest.
    """
    remedy = "Give another --output_dir, or delete the folder"
    source, order = opened.source, opened.class_order
    place = ImageFolder(folder, source.run, identify(source, order), remedy)
    known = place.claim(classes={}).get("classes", {})
    names = known | name_classes(source, order, classes)  # earlier commands' too
    place.draw(source, opened.requests(classes, per_class), classes=names)
    place.write_preview([place.images(label) for label in sorted(map(int, names))])


def start(args: argparse.Namespace) -> int:
    """Draw what the command line asks for; everything is checked before anything is written."""
    log_to_console(is_main=os.environ.get("RANK", "0") == "0")
    if args.num_samples < 1:
        raise ConfigError(f"--num_samples {args.num_samples}: use a whole number of at least 1")
    SOURCES.names()  # every room registers its words
    opened, folder = open_source(args), Path(args.output_dir)
    if not opened.source.fitted_classes:
        raise ConfigError(f"--ckpt {args.ckpt}: this source keeps no class yet, so there is nothing that it could draw")
    names = opened.source.class_names
    wanted = args.cond_class.split(",") if args.cond_class else []
    classes = pick_classes(wanted, names, opened.source.fitted_classes, "--cond_class")
    log.info("Drawing %d images of each class: %s", args.num_samples, ", ".join(f"{i} ({names[i]})" for i in classes))
    draw(opened, classes, args.num_samples, folder)
    log.info("The images lie in %s", folder)
    return 0


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser("sample", __doc__)
    parser.add_argument("--ckpt", required=True, help="fitted source, checkpoint of a run or published model")
    parser.add_argument("--config", help="experiment file or YAML")
    parser.add_argument("--output_dir", default="outputs/syn_images", help="of the images (default: %(default)s)")
    parser.add_argument("--num_samples", type=int, default=10, help="images per class (default: %(default)s)")
    parser.add_argument("--cond_class", help="ids in learning order or names, with commas (default: all fitted ones)")
    parser.add_argument("--embeddings", metavar="FILE", help=f"{EMBEDDINGS} for a published model")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Return exit code 0, or 2 after one message about a mistake that the user can repair."""
    return exit_code(start, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
