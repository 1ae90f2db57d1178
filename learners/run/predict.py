"""Classify images with a finished run: `python -m learners.run.predict --run outputs/digits --images folder`."""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from learners import LEARNERS
from learners.base import Learner
from learners.run.configure import build_config
from learners.run.state import restore_learner
from synth.replay import Replay
from utils.data.datasets import DATASETS
from utils.data.images import ImageSet, Part, decode_image
from utils.data.listing import IMAGE_SUFFIXES, list_images
from utils.data.transforms import match_channels
from utils.run.command import exit_code
from utils.run.errors import CheckpointError, DataError
from utils.run.folder import read_data, run_manifest
from utils.run.log import log
from utils.training.checkpoint import Checkpoints
from utils.training.run import Run
from utils.training.runtime import Runtime


def load_learner(folder: Path, device: list[str] | None = None) -> tuple[Learner, list[str]]:
    """Load a finished run's classifier and the names of the classes that it has seen, in learning order.

    Args:
        folder: `outputs/<run>/seed_<s>`.
        device: null for the device that the run's config names.

    Raises:
        CheckpointError: if the folder holds no checkpoint that is whole.
    """
    stored = run_manifest(folder.parent, None).read()
    config, _ = build_config({**stored["config"], "device": device or stored["config"]["device"]})
    dataset, class_names, _ = read_data(folder)
    if (found := Checkpoints(folder / "checkpoints", "task").load_newest(log, discard=False)) is None:
        raise CheckpointError(f"{folder / 'checkpoints'} holds no checkpoint: let the run finish its first task")
    _, tensors, state = found
    if state["holds_backbone"]:  # so its weights need not be where the run had them
        config = config.model_copy(update={"pretrained": False, "backbone_weights": None})
    data: Any = SimpleNamespace(dataset=dataset, num_classes=len(class_names))
    run = Run(folder, 0, Runtime(config.device, config.precision), progress=False)
    learner = LEARNERS[config.model_name](config, data, run, Replay(config, None, data, run, folder))
    restore_learner(learner, tensors, state)
    return learner, class_names


def classify(learner: Learner, names: list[str], paths: list[Path]) -> list[dict[str, Any]]:
    """Return one row per image: path, the best class's name and label, and its softmax probability in [0, 1]."""
    best = learner.predict(_images(learner.config.data_name, paths))["cnn"].softmax(1).max(1)
    rows = zip(paths, best.indices.tolist(), best.values.tolist())
    return [{"image": str(path), "class": names[label], "label": label, "probability": round(value, 4)}
            for path, label, value in rows]  # fmt: skip


def _images(data_name: str, paths: list[Path]) -> ImageSet:
    """A part for each file, since they need not have one size, seen as the data set's own images were."""
    label = torch.zeros(1, dtype=torch.int64)
    view = DATASETS[data_name.lower()].view if data_name.lower() in DATASETS else None
    if view is None:
        return ImageSet(Part((str(path),), label) for path in paths)
    return ImageSet(Part(view(match_channels(decode_image(path), 3)).unsqueeze(0), label) for path in paths)


def main(argv: list[str] | None = None) -> int:
    """Print CSV; exit code 2 after one message about a mistake that the user can repair."""
    parser = argparse.ArgumentParser(prog="python -m learners.run.predict", description=__doc__)
    parser.add_argument("--run", required=True, type=Path, help="a run's folder, or one of its seed folders")
    parser.add_argument("--images", required=True, type=Path, help="folder of images, searched with its subfolders")
    parser.add_argument("--device", help="other than the one that the run was trained on")
    return exit_code(print_classes, parser.parse_args(argv))


def print_classes(args: argparse.Namespace) -> None:
    """Print a row of CSV for every image file below a folder, sorted."""
    seeds = sorted(args.run.glob("seed_*"))
    learner, names = load_learner(seeds[0] if seeds else args.run, [args.device] if args.device else None)
    paths = sorted(map(Path, list_images(args.images)))
    if not paths:
        raise DataError(f"no images below {args.images}: looked for {', '.join(IMAGE_SUFFIXES)}")
    rows = classify(learner, names, paths)
    writer = csv.DictWriter(sys.stdout, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
