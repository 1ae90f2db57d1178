"""What a run would do and need, without doing it (`--plan`), and what there is to choose from (`--list`)."""

from __future__ import annotations

from learners import LEARNERS
from learners.backbones import backbone_options
from learners.base import Learner
from learners.run.experiment import Experiment, missing_weights
from learners.run.ledger import describe_budget, unit_bytes
from synth import SOURCES
from utils.data.datasets import DATASETS, find_dataset, load_dataset
from utils.run.config import RunConfig
from utils.run.errors import DataError
from utils.run.folder import replay_folder
from utils.training.runtime import Runtime


def _summary(entry: type) -> str:
    return (entry.__doc__ or "").strip().splitlines()[0]


def describe_all() -> str:
    """List learners, sources, data sets and backbones, a line each."""
    from models import BACKBONES

    lines = ["Learners (model_name):"]
    lines += [f"  {name:<20} {_summary(LEARNERS[name])}" for name in LEARNERS.names()]
    lines += ["", "Replay sources (synth.name):"]
    lines += [f"  {name:<20} {_summary(SOURCES[name])}" for name in SOURCES.names()]
    lines += ["", "Data sets (dataset):", f"  {', '.join(DATASETS.names())}"]
    lines += ["  or any folder <data_dir>/<name>/<train|test>/<class>/<image>, by its name"]
    lines += ["", "Backbones (convnet_type):", f"  {', '.join(BACKBONES.names())}"]
    lines += ["  or any timm model with its weight tag, such as vit_small_patch16_224.augreg_in21k_ft_in1k"]
    return "\n".join(lines)


def describe_run(config: RunConfig, name: str) -> str:
    """Describe the schedule, what will be trained and generated, data and weights, and what it takes on disk."""
    lines = [f"Run {name}: {config.model_name}, {len(config.seed)} seed(s) {config.seed}"]
    found = find_dataset(config.data_name, config.data_dir)
    lines.append(f"Data: {found.text}" if found.present else f"Data, not on this machine yet: {found.text}")
    if not found.present:
        return "\n".join([*lines, "The schedule follows once the data is here."])
    try:
        dataset = load_dataset(config.data_name, config.data_dir, offline=True)
    except DataError as error:
        return "\n".join([*lines, f"It cannot be read: {error}"])
    experiment = Experiment(config, name, config.seed[0], dataset, Runtime(["cpu"], "fp32"))
    missing = missing_weights(config, offline=True)
    if missing:
        lines += [f"Weights: {text}" for text in missing]
        return "\n".join([*lines, "The schedule follows once the weights are here."])
    learner = experiment.check()
    lines += _schedule(learner)
    if config.memory_budget_mb is not None:
        lines.append(describe_budget(learner))
    options = backbone_options(config, dataset)
    weights = f", weights {options.weights}" if options.weights else ""
    lines.append(f"Backbone: {config.convnet_type}, stem {options.stem}, input {options.image_size} px{weights}")
    if config.synth is not None:
        lines += [*describe_replay(learner, name), f"  {learner.replay.pupil.describe()}"]
    return "\n".join(lines)


def _schedule(learner: Learner) -> list[str]:
    data = learner.data
    counts = data.class_counts
    lines = [f"Tasks: {data.num_tasks}, real training data {data.all_real_bytes / 1e6:.1f} MB"]
    for index in range(data.num_tasks):
        task = data.task(index)
        images = sum(counts[label] for label in task.classes)
        training = learner.train_config(task)
        length = f"{training.epochs} epochs" if training.epochs is not None else f"{training.steps} steps"
        line = f"  task {index}: classes {task.num_old}-{task.num_seen - 1}, {images} images, {length}"
        if learner.uses_exemplars and index:
            line += f", up to {learner.memory.budget(task.num_old)} exemplars of each old class"
        if learner.memory.handed and index:
            line += f", {learner.memory.handed} more in the source's form"
        lines.append(line)
    return lines


def describe_replay(learner: Learner, name: str) -> list[str]:
    """Say how many samples a run draws, what they take as pixels, and where they lie."""
    config, replay = learner.config, learner.replay
    drawn = replay.expected()
    what = "to draw per seed" if config.synth.need_syn_imgs else "that must be there"
    size = unit_bytes(learner.data) * drawn / 1e6
    return [
        f"Replay: {config.synth.name}: about {drawn} {replay.source.samples} {what}, {size:.1f} MB as pixels",
        f"  in {replay_folder(config, name, config.seed[0])}",
    ]
