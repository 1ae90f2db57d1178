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
    cut_data,
    find_fitted,
    make_source,
    pick_classes,
    read_file,
)  # fmt: skip
from synth.drawing import ImageFolder, identify, name_classes
from synth.prompts import EMBEDDINGS
from synth.requests import Requests
from utils.data import subsets
from utils.data.images import ImageSet
from utils.data.manager import DataManager, Task
from utils.run.command import exit_code
from utils.run.errors import ConfigError
from utils.run.folder import follow_machine
from utils.run.log import log, log_to_console
from utils.run.words import apply_overrides, translate
from utils.training.run import Run
from utils.training.runtime import Runtime


def find_source(args: argparse.Namespace) -> tuple[FitConfig, DataManager | FittedSource, Path | None]:
    """Find what --ckpt stands for: its config, its classes, and what it loads, with --embeddings or those beside it.

    A published model for which no embeddings are found loads none: it draws from the names of the classes.
    """
    given = {} if args.config is None else translate(read_file(args.config))
    if fitted := find_fitted(Path(args.ckpt)):
        if args.embeddings is not None:
            raise ConfigError(f"--ckpt {args.ckpt} has its own embeddings: --embeddings goes with a foreign checkpoint")
        return _config_of(fitted, given, args), fitted, fitted.folder
    raw = given if args.config else {"synth": {"name": "ldm"}}
    says_what = args.config is not None or args.dataset is not None
    if not says_what or "ldm_ckpt" not in type(build_source_config(raw.get("synth"))).model_fields:
        raise ConfigError(
            f"--ckpt {args.ckpt} holds no fitted source: give a folder that `python -m synth.train` wrote, or a run's "
            "outputs/<run>/seed_<s>/checkpoints/task_<t>/source; for a published model, which the source ldm reads, "
            "say with --config or --dataset what to draw"
        )
    embeddings = _find_embeddings(args)
    if embeddings is not None and (fitted := find_fitted(embeddings)):
        return _config_of(fitted, given, args, ldm_ckpt=args.ckpt), fitted, fitted.folder
    found = {"ldm_ckpt": args.ckpt, "inversion": embeddings is not None}
    return *cut_data(build_fit_config({**raw, "synth": {**raw["synth"], **found}}, args)), embeddings


def _config_of(fitted: FittedSource, given: dict[str, Any], args: argparse.Namespace, **synth: Any) -> FitConfig:
    """Take the config that a source was fitted with, but for what --config and --set say of the drawing."""
    raw = {**fitted.raw, "synth": {**fitted.raw["synth"], **(given.get("synth") or {}), **synth}}
    raw = apply_overrides({**raw, "dataset": args.dataset or given.get("dataset") or raw["dataset"]}, args.overrides)
    name = raw["synth"].get("name") if isinstance(raw["synth"], dict) else raw["synth"]
    both = {"dataset": (fitted.raw["dataset"], raw["dataset"]), "synth.name": (fitted.raw["synth"]["name"], name)}
    for what, (there, here) in both.items():
        if str(there).lower() != str(here).lower():
            raise ConfigError(f"{fitted.folder} was fitted with {what}={there!r}, not with {here!r}: leave that out")
    return build_fit_config(raw, args).scheduled(len(fitted.class_names))


def _find_embeddings(args: argparse.Namespace) -> Path | None:
    """Find the folder of the class embeddings; None where none are named and none lie beside the checkpoint."""
    path = Path(args.embeddings or args.ckpt)
    folder = path if path.is_dir() else path.parent
    found = all((folder / name).exists() for name in (EMBEDDINGS, "source.json"))
    if args.embeddings is not None and not found:
        lacks = f"lacks {EMBEDDINGS} or the source.json that `python -m synth.train` writes beside it"
        raise ConfigError(f"--embeddings {path}: {folder} {lacks}")
    return folder if found else None


def load_source(config: FitConfig, run: Run, data: DataManager | FittedSource, folder: Path | None) -> ReplaySource:
    """Build a source and load it; without a folder, the names of the classes are all that it learns."""
    source = make_source(config, run, data)
    if folder is not None:
        source.load(folder)
    else:
        log.info("No %s: the names of the classes are the prompts (--embeddings FILE names some)", EMBEDDINGS)
        source.fit_before(Task(0, range(source.num_classes), tuple(data.class_names)), ImageSet())
    return source


def ask(source: ReplaySource, config: FitConfig, classes: list[int], per_class: int) -> list[Requests]:
    """Ask as a run with these tasks and this seed does, so that its images are drawn again.

    A source that makes copies takes its exemplars in turn instead, under other seeds than a run's.
    """
    sizes = subsets.task_sizes(source.num_classes, config.init_cls, config.increment)
    tasks = np.repeat(range(len(sizes)), sizes).tolist()  # of every class
    # With `redraw`, a run draws all old classes in the name of the task that comes next.
    keep, coming = config.synth.replay == "keep", 1 + max(tasks[label] for label in source.fitted_classes)
    by_task, key = groupby(classes, tasks.__getitem__), (source.run.seed, config.synth.name)  # classes ascend
    return [Requests.of_classes(list(own), per_class, (*key, i if keep else coming)) for i, own in by_task]


def draw(source: ReplaySource, class_order: list[int], requests: list[Requests], folder: Path) -> None:
    """Bring a folder to the images that are asked for; those that are there are left alone.

    Raises:
        BankError: if the folder holds images of other settings, or images without a manifest.
    """
    remedy = "Give another --output_dir, or delete the folder"
    place = ImageFolder(folder, source.run, identify(source, class_order), remedy)
    known = place.claim(classes={}).get("classes", {})  # earlier commands' too
    classes = [label for asked in requests for label in asked.labels.unique().tolist()]
    names = known | name_classes(source, class_order, classes)
    place.draw(source, requests, classes=names)
    place.write_preview([place.images(label) for label in sorted(map(int, names))])


def start(args: argparse.Namespace) -> None:
    """Draw what the command line asks for; everything is checked before anything is written."""
    log_to_console(is_main=os.environ.get("RANK", "0") == "0")
    if args.num_samples < 1:
        raise ConfigError(f"--num_samples {args.num_samples}: use a whole number of at least 1")
    SOURCES.names()  # every room registers its words
    config, data, found = find_source(args)
    if found is not None:
        follow_machine(found)
    folder, seed = Path(args.output_dir), config.train_seed(config.seed[0])
    source = load_source(config, Run(folder, seed, Runtime(config.device, config.precision)), data, found)
    names, fitted = source.class_names, source.fitted_classes
    if not fitted:
        raise ConfigError(f"--ckpt {args.ckpt}: this source keeps no class yet, so there is nothing that it could draw")
    classes = pick_classes(args.cond_class.split(",") if args.cond_class else [], names, fitted, "--cond_class")
    log.info("Drawing %d images of each class: %s", args.num_samples, ", ".join(f"{i} ({names[i]})" for i in classes))
    draw(source, data.class_order, ask(source, config, classes, args.num_samples), folder)
    log.info("The images lie in %s", folder)


def add_flags(parser: argparse.ArgumentParser, is_required: bool = True) -> None:
    """Add the flags that say what is drawn from which source; ``is_required``: whether there must be one."""
    parser.add_argument("--ckpt", required=is_required, help="fitted source, checkpoint of a run or published model")
    parser.add_argument("--config", "--flagfile", help="experiment file, YAML, or flagfile of absl")
    parser.add_argument("--output_dir", default="outputs/syn_images", help="of the images (default: %(default)s)")
    parser.add_argument("--num_samples", type=int, default=10, help="images per class (default: %(default)s)")
    parser.add_argument("--cond_class", help="ids in learning order or names, with commas (default: all fitted ones)")
    parser.add_argument("--embeddings", metavar="FILE", help=f"{EMBEDDINGS} for a published model")


def main(argv: list[str] | None = None) -> int:
    """Return exit code 0, or 2 after one message about a mistake that the user can repair."""
    parser = command_parser("sample", __doc__)
    add_flags(parser)
    return exit_code(start, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
