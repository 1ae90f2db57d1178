"""What a run would do and need, without doing it (`--plan`), and what there is to choose from (`--list`)."""

from __future__ import annotations

from collections.abc import Iterator

from learners import LEARNERS
from learners.base import Learner
from learners.run.experiment import Experiment, missing_weights
from learners.run.forecast import describe_cost
from learners.run.ledger import describe_budget, unit_bytes
from models import BACKBONES
from models.options import backbone_options
from synth import SOURCES
from utils.data.datasets import DATASETS, find_dataset, load_dataset
from utils.run.config import RunConfig
from utils.run.errors import DataError
from utils.run.folder import replay_folder
from utils.run.registry import Registry
from utils.training.runtime import Runtime, choose_device


def describe_all() -> str:
    """List learners, sources, data sets and backbones, a line each."""
    return "\n".join([
        "Learners (model_name):", *_first_lines(LEARNERS), "",
        "Replay sources (synth.name):", *_first_lines(SOURCES), "",
        "Data sets (dataset):", f"  {', '.join(DATASETS.names())}",
        "  or any folder <data_dir>/<name>/<train|test>/<class>/<image>, by its name", "",
        "Backbones (convnet_type):", f"  {', '.join(BACKBONES.names())}",
        "  or any timm model with its weight tag, such as vit_small_patch16_224.augreg_in21k_ft_in1k",
    ])  # fmt: skip


def _first_lines(entries: Registry) -> list[str]:
    return [f"  {name:<20} {entries[name].__doc__.strip().splitlines()[0]}" for name in entries.names()]


def describe_run(config: RunConfig, name: str) -> Iterator[str]:
    """Yield the schedule, what will be trained and generated, data and weights, and what it takes on disk."""
    # A word that is no device and no backbone is said even where the data is not here.
    choose_device(config.device)
    missing = [f"Weights: {text}" for text in missing_weights(config, offline=True)]
    yield f"Run {name}: {config.model_name}, {len(config.seed)} seed(s) {config.seed}"
    found = find_dataset(config.data_name, config.data_dir)
    yield f"Data{'' if found.present else ', not on this machine yet'}: {found.text}"
    if found.present:
        try:
            dataset = load_dataset(config.data_name, config.data_dir, offline=True)
        except DataError as error:
            yield f"It cannot be read: {error}"
            return
        experiment = Experiment(config, name, config.seed[0], dataset, Runtime(["cpu"], "fp32"))
    if missing or not found.present:
        yield from (*missing, "The schedule follows once all is here.")
        return
    learner = experiment.check()
    yield from _schedule(learner)
    if config.memory_budget_mb is not None:
        yield describe_budget(learner)
    options = backbone_options(config, learner.data.dataset)
    weights = f", weights {options.weights}" if options.weights else ""
    yield f"Backbone: {config.convnet_type}, stem {options.stem}, input {options.image_size} px{weights}"
    if config.synth is not None:
        yield from (*describe_replay(learner, name), f"  {learner.replay.pupil.describe()}")
    yield from describe_cost(experiment)


def _schedule(learner: Learner) -> Iterator[str]:
    data = learner.data
    yield f"Tasks: {data.num_tasks}, real training data {data.all_real_bytes / 1e6:.1f} MB"
    for task in map(data.task, range(data.num_tasks)):
        images, training = sum(data.class_counts[label] for label in task.classes), learner.train_config(task)
        length = f"{training.epochs} epochs" if training.epochs is not None else f"{training.steps} steps"
        line = f"  task {task.index}: classes {task.num_old}-{task.num_seen - 1}, {images} images, {length}"
        if learner.uses_exemplars and task.index:
            line += f", up to {learner.memory.budget(task.num_old)} exemplars of each old class"
        if learner.memory.handed and task.index:
            line += f", {learner.memory.handed} more in the source's form"
        yield line


def describe_replay(learner: Learner, name: str) -> list[str]:
    """Say how many samples a run draws, what they take as pixels, and where they lie."""
    config, drawn = learner.config, learner.replay.expected()
    what = "to draw per seed" if config.synth.need_syn_imgs else "that must be there"
    samples = f"about {drawn} {learner.replay.source.samples} {what}, {unit_bytes(learner.data) * drawn / 1e6:.1f} MB"
    return [f"Replay: {config.synth.name}: {samples} as pixels", f"  in {replay_folder(config, name, config.seed[0])}"]
