"""Measure generated images against real ones of their data set.

IMAGES is a run's replay images (outputs/syn_image_<run>_seed<s>), a folder of `python -m synth.sample`, or any folder
of images, in class folders or flat, which needs --dataset. With --ckpt a source draws them first, equally many of each
class, as `python -m synth.sample` does.

A table goes to the terminal, all numbers to measures.json beside the images. Real images are the whole training set of
the classes that were drawn, whatever part of it the source has seen. Each number stands for n images of either side and
beside the same of real against other real images. FID, KID and IS are numbers of Inception-v3 alone:
--extractor inception=FILE with torch-fidelity's weights-inception-2015-12-05-6726825d.pth. Any other network gives a
distance of its own, which bears its name. Without --extractor the classifier of the images' own run looks at them.

examples:
  python -m synth.evaluate outputs/syn_image_digits_seed1993
  python -m synth.evaluate my_images/ --dataset digits --extractor outputs/digits --cas_epochs 20
  python -m synth.evaluate --ckpt outputs/digits_source --output_dir outputs/look --num_samples 100 \\
                           --extractor resnet18.a1_in1k
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from tabulate import tabulate

from synth import sample
from synth.accuracy_score import score_images
from synth.command import command_parser, pick_classes
from synth.drawing import NAME
from synth.extractors import INCEPTION, Extractor, load_extractor
from synth.quality import CLUSTERS_PER_CLASS, UNKNOWN, Features, Judgement, Measure, Settings, judge, known, unknown
from utils.data.datasets import Dataset, load_dataset
from utils.data.images import ImageSet
from utils.data.listing import IMAGE_SUFFIXES, list_folder, list_images
from utils.results.quality import HEAD, measure_rows, part_rows
from utils.run.command import exit_code
from utils.run.errors import BankError, CheckpointError, ConfigError
from utils.run.files import in_numeric_order, load_tensors, read_json, save_tensors, write_json
from utils.run.folder import CONFIG, DESCRIPTION, run_manifest
from utils.run.log import log, log_to_console
from utils.run.manifest import MANIFEST, Manifest
from utils.training.runtime import Runtime

MEASURES, CACHE = "measures.json", ".measures"  # hidden, so that it is no class folder
REMEDY = "draw the images again, or give another folder"
LEAST_REPEATS = 5


class Place(NamedTuple):
    """Where images lie.

    Attributes:
        folder: of the images.
        manifests: that list them; none where another program made them.
        home: folder of the run's seed, or of `synth.train`, that they come from; None if nobody says.
    """

    folder: Path
    manifests: list[Manifest]
    home: Path | None


def find_images(folder: Path, ckpt: Path | None = None) -> Place:
    """Find the lists of images below a folder: its own, or the newest one of every task of a run.

    Raises:
        ConfigError: if there is no such folder.
        BankError: if a list is damaged or of something else.
    """
    if not folder.is_dir():
        raise ConfigError(f"IMAGES {folder}: there is no such folder; give one with images, or --ckpt to draw some")
    own, tasks = _images_manifest(folder), []
    for task in in_numeric_order(folder.glob("task_*/")):
        # What was drawn again lies in a folder of its own inside the task's.
        inside = map(_images_manifest, [task, *in_numeric_order(task.glob("*/"))])
        tasks += [manifest for manifest in inside if manifest.files()][-1:]
    name = re.fullmatch(r"syn_image_(.+)_seed(\d+(?:_\d+)?)", folder.resolve().name)
    homes = [ckpt.absolute(), *ckpt.absolute().parents] if ckpt else []
    homes += [folder.resolve().parent / name[1] / f"seed_{name[2]}"] if name else []
    home = next((home for home in homes if (home / DESCRIPTION).exists()), None)
    return Place(folder, tasks or [own] * own.exists, home)


def _images_manifest(folder: Path) -> Manifest:
    return Manifest(folder, "images", remedy=REMEDY, error=BankError, names=NAME)


def read_images(place: Place, dataset: Dataset) -> ImageSet:
    """Return all images as files, labelled by original class id, or `UNKNOWN` where they lie in no class folder.

    Raises:
        RepriseError: if there are none, one is missing or damaged, or their classes are not those of the data set.
    """
    pairs = list(_listed(place.manifests) if place.manifests else _found(place.folder, dataset.class_names))
    if not pairs:
        raise ConfigError(f"IMAGES {place.folder} holds no image: looked for {', '.join(IMAGE_SUFFIXES)}")
    paths, labels = zip(*pairs)
    if max(labels) >= dataset.num_classes:
        has, remedy = f"{dataset.name} has {dataset.num_classes} classes", "give the --dataset that they were made for"
        raise ConfigError(f"IMAGES {place.folder} are of a class {max(labels)}, and {has}: {remedy}")
    return ImageSet.of(paths, torch.tensor(labels))


def _listed(manifests: list[Manifest]) -> Iterator[tuple[str, int]]:
    """Yield path and original class of every image in these lists."""
    for manifest in manifests:
        content = manifest.verify()
        order = content.get("class_order")
        for name in content["files"]:
            label = int(name.partition("/")[0])
            if not isinstance(order, list) or label >= len(order) or type(order[label]) is not int:
                raise BankError(f"{manifest.path} is damaged (class_order names no class {label}): {REMEDY}")
            yield str(manifest.folder / name), order[label]


def _found(folder: Path, names: list[str]) -> Iterator[tuple[str, int]]:
    """Yield path and class of every image that another program has left."""
    classes = [path for path in list_folder(folder) if path.is_dir()]
    if not classes:
        yield from ((path, UNKNOWN) for path in list_images(folder))
    for own in classes:
        label = pick_classes([own.name], names, range(len(names)), f"IMAGES {folder}, class folder")[0]
        yield from ((path, label) for path in list_images(own, folder))


def look_once(extractor: Extractor, images: ImageSet, root: str | None, folder: Path) -> Features:
    """Look at real images, or take what the same network has seen in the same images before, if the file is whole.

    Args:
        extractor: looks.
        images: of a data set.
        root: see `Dataset`.
        folder: of what was seen.
    """
    identity = {"images": images.contents_hash(root), "extractor": extractor.weights}
    name = hashlib.sha256("".join(identity.values()).encode()).hexdigest()[:16]
    manifest = Manifest(folder, "features", identity, remedy="they are computed again", name=f"{name}.json")
    with suppress(CheckpointError):
        if manifest.exists:
            manifest.claim()
            manifest.verify()
            tensors = load_tensors(folder / f"{name}.safetensors")
            return Features(tensors["values"], tensors.get("logits"), images.labels)
    features = extractor(images)
    seen = {"values": features.values, "logits": features.logits}
    save_tensors(folder / f"{name}.safetensors", {key: value for key, value in seen.items() if value is not None})
    manifest.path.unlink(missing_ok=True)
    manifest.seal([f"{name}.safetensors"])
    return features


def score(images: ImageSet, dataset: Dataset, settings: Settings, epochs: int, runtime: Runtime) -> Measure:
    """Measure the accuracy of a classifier trained on generated images, beside one trained on as many real ones."""
    if not epochs or UNKNOWN in images.classes:
        reason = "the classes of the images are not known" if epochs else "--cas_epochs 0"
        return unknown("CAS", (len(images), 0), settings, reason)
    per_class = -(-len(images) // len(images.classes))
    real = dataset.train.select(images.classes).first_of_each(per_class)
    right = [score_images(side, dataset, epochs, settings.seed, runtime) for side in (images, real)]
    return known("CAS", right[0], (len(images), len(real)), settings, float(right[1].mean()), draws=1)


# ---------------------------------------------------------------------- the command


def as_json(judged: Judgement) -> Judgement:
    """Turn measures at any depth into plain objects."""
    return {key: asdict(value) if isinstance(value, Measure) else as_json(value) for key, value in judged.items()}


def as_table(judged: Judgement, names: list[str]) -> str:
    """Write overall measures as one table, and those of groups and classes as another."""
    overall = tabulate(measure_rows(judged["overall"]), HEAD, disable_numparse=True)
    parts = judged["groups"] | {names[label]: own for label, own in judged["per_class"].items()}
    head, rows = part_rows(parts)
    return f"{overall}\n\n{tabulate(rows, head, disable_numparse=True)}" if rows else overall


def start(args: argparse.Namespace) -> None:
    """Draw the images if need be, look at both sides, write what comes out."""
    log_to_console(is_main=os.environ.get("RANK", "0") == "0")
    if (args.images is None) == (args.ckpt is None):
        raise ConfigError("give either IMAGES or --ckpt: a folder of images, or a source that draws some")
    for key, least in {"repeats": LEAST_REPEATS, "k": 1, "cas_epochs": 0}.items():
        if getattr(args, key) < least:
            raise ConfigError(f"--{key} {getattr(args, key)}: use a whole number of at least {least}")
    if args.ckpt is not None:
        sample.start(args)
    place = find_images(Path(args.images or args.output_dir), args.ckpt and Path(args.ckpt))
    dataset, runtime = _find_dataset(place, args), Runtime([args.device or "auto"], "fp32")
    images, extractor = read_images(place, dataset), _find_extractor(place, dataset, runtime, args)
    output = Path(args.json or place.folder / MEASURES)
    sides = {"train": dataset.train, "test": dataset.test}
    if UNKNOWN not in images.classes:
        sides = {split: side.select(images.classes) for split, side in sides.items()}
    real = {split: look_once(extractor, side, dataset.root, output.parent / CACHE) for split, side in sides.items()}
    is_inception, seed = extractor.network_name == INCEPTION, 1993 if args.seed is None else args.seed
    clusters = CLUSTERS_PER_CLASS * len(real["train"].classes)
    settings = Settings(extractor.name, is_inception, args.k, args.repeats, seed, args.reference, clusters)
    judged = judge(extractor(images), real, settings, _training_counts(place))
    judged["overall"]["CAS"] = score(images, dataset, settings, args.cas_epochs, runtime)
    judged, count = as_json(judged), len(real[args.reference].labels)
    against = f"all {count} {args.reference} images of the classes that were drawn, of {dataset.source}"
    log.info("%d images in %s, against %s", len(images), place.folder, against)
    print(as_table(judged, dataset.class_names))
    head = {"images": str(place.folder), "num_images": len(images), "against": against}
    write_json(output, {**head, **asdict(settings), **judged})


def _find_dataset(place: Place, args: argparse.Namespace) -> Dataset:
    name = args.dataset or (place.manifests[0].read().get("dataset") if place.manifests else None)
    if name is None:
        raise ConfigError(f"IMAGES {place.folder}: no {MANIFEST} says of which data set they are: give --dataset")
    home = place.home
    run = home if home is None or (home / CONFIG).exists() else home.parent  # a run's seeds share one
    config = {} if run is None else run_manifest(run, None).read()["config"]
    return load_dataset(str(name), args.data_dir or config.get("data_dir", "data"), bool(args.offline))


def _find_extractor(place: Place, dataset: Dataset, runtime: Runtime, args: argparse.Namespace) -> Extractor:
    if args.extractor is None and place.home is None:
        choice = "the folder of a run, a timm name with its weight tag, inception=FILE or vgg16=FILE"
        raise ConfigError(f"IMAGES {place.folder} belong to no run whose classifier could look at them: give "
                          f"--extractor, {choice}")  # fmt: skip
    return load_extractor(args.extractor or str(place.home), dataset, runtime, bool(args.offline))


def _training_counts(place: Place) -> dict[int, int]:
    """Return how many images of each original class the source was trained on; nothing if nobody says."""
    if place.home is None:
        return {}
    stored = read_json(place.home / DESCRIPTION, REMEDY)
    return dict(zip(stored["class_order"], stored["counts"]))


def main(argv: list[str] | None = None) -> int:
    """Return exit code 0, or 2 after one message about a mistake that the user can repair."""
    parser = command_parser("evaluate", __doc__)
    parser.add_argument("images", nargs="?", metavar="IMAGES", help="folder of images")
    sample.add_flags(parser, is_required=False)
    parser.add_argument("--extractor", help="network whose features are compared (default: the run's classifier)")
    parser.add_argument("--reference", choices=["train", "test"], default="train", help="real images (default: train)")
    parser.add_argument("--k", type=int, default=5, help="neighbours, of precision and recall (default: 5)")
    parser.add_argument("--repeats", type=int, default=LEAST_REPEATS, help="draws of both sides (default: 5)")
    parser.add_argument("--cas_epochs", type=int, default=0, help="train a classifier on the images (default: 0, none)")
    parser.add_argument("--json", metavar="FILE", help=f"write there (default: {MEASURES} beside the images)")
    return exit_code(start, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
