"""One seed of an experiment from its data to its report, resumable at any moment."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from learners import LEARNERS
from learners.base import Learner
from learners.pycil import PyCILLearner
from learners.run.initial import require_initial, train_or_take
from learners.run.ledger import check_budget, count_bytes, count_units, describe, fill_of, keep_to_budget
from learners.run.quality import replay_quality
from learners.run.state import learner_state, restore_learner
from models.files.weights import what_is_missing
from models.options import weight_options
from models.timm_backbone import check_backbone_name
from synth import SOURCES
from synth.replay import replay_kind
from synth.stored import keep_source
from utils.data.datasets import Dataset, load_dataset
from utils.data.manager import Task, cut_tasks
from utils.results.gallery import GalleryRow
from utils.results.report import write_report
from utils.results.results import Results
from utils.run.config import RunConfig
from utils.run.errors import DataError, WeightsError
from utils.run.files import write_json
from utils.run.folder import RESULTS, claim_data, read_environment, replay_folder
from utils.run.log import TOLD, log, log_to_file
from utils.training.flops import forward_flops
from utils.training.run import Run
from utils.training.runtime import Runtime

GALLERY_IMAGES = 8


def find_needs(config: RunConfig) -> Dataset:
    """Read the data set and find all weights, fetching what may be fetched.

    Raises:
        DataError, WeightsError: naming everything that is absent, not the first thing alone.
    """
    missing = missing_weights(config, config.offline)
    try:
        dataset = load_dataset(config.data_name, config.data_dir, config.offline)
    except DataError as error:
        raise DataError("\nerror: ".join([str(error), *missing])) from error
    if missing:
        raise WeightsError("\nerror: ".join(missing))
    return dataset


def missing_weights(config: RunConfig, offline: bool) -> list[str]:
    """List the weights that a run needs and that are not to be had, each with where they go."""
    options = replace(weight_options(config), offline=offline)
    checks = [partial(check_backbone_name, config.convnet_type, options, fetch=True)]
    if config.synth is not None and config.synth.need_syn_imgs:
        checks.append(partial(SOURCES[config.synth.name].check_weights, config.synth, offline))
    return what_is_missing(checks)


class Experiment:
    """The run of one seed: learn, evaluate, write, checkpoint, task after task.

    Args:
        config: of learner and source.
        name: of the run.
        seed: one of ``config.seed``.
        dataset: already read.
        runtime: the machine.
        unused: keys of the experiment file that the learner does not know.

    Attributes:
        before_task: called with the number of every task before it is learned.
    """

    def __init__(
        self, config: RunConfig, name: str, seed: int, dataset: Dataset, runtime: Runtime, unused: Sequence[str] = ()
    ):
        self.config, self.name, self.seed, self.runtime, self.unused = config, name, seed, runtime, unused
        self.data = cut_tasks(config, seed, dataset, LEARNERS[config.model_name].upper_bound)
        # For the evaluator, once all is learned.
        self.dataset = replace(dataset, image_size=self.data.dataset.image_size)
        self.folder = Path(config.output_dir) / name / config.seed_tag(seed)
        workers, every = config.num_workers, config.checkpoint_every
        self.run = Run(self.folder, config.train_seed(seed), runtime, num_workers=workers, checkpoint_every=every)
        self.checkpoints = self.run.checkpoints("task")
        self.before_task: Callable[[int], None] = lambda index: None

    def elsewhere(self, folder: Path) -> Experiment:
        """Return the same experiment with whatever it writes in another folder."""
        config, synth = self.config, self.config.synth
        places = {"output_dir": str(folder), **dict.fromkeys(config.shelves)}
        if synth is not None and synth.need_syn_imgs:
            places["synth"] = synth.model_copy(update=dict.fromkeys(synth.shelves))
        return Experiment(config.model_copy(update=places), self.name, self.seed, self.dataset, self.runtime)

    def check(self, anew: bool = False) -> Learner:
        """Build network and source once, so that whatever does not fit is said before anything is written.

        Args:
            anew: what the folder holds is about to be deleted, so it need not fit.
        """
        if not anew:
            claim_data(self.folder, self.data, write=False)
        learner = self._make_learner()
        learner.replay.require()
        if self.config.init_from is not None:
            require_initial(learner)
        check_budget(learner)
        return learner

    def count_work(self) -> int | None:
        """Count the FLOPs of a forward pass of one training batch: classifier's or source's, whichever are more.

        Returns:
            None where a published model draws, whose FLOPs are many.
        """
        config, learner = self.config, self._make_learner()
        shape = (getattr(config, "batch_size", learner.eval_batch), 3, *[learner.transform.size] * 2)
        flops = [forward_flops(learner.network.backbone, torch.zeros(shape, device="meta"))]
        if config.synth is not None and config.synth.need_syn_imgs:
            flops.append(learner.replay.source.step_flops)
        return None if None in flops else max(flops)

    def _make_learner(self) -> Learner:
        """Build the learner with its source and its replay."""
        config, data, run, source = self.config, self.data, self.run, None
        if config.synth is not None:
            source = SOURCES[config.synth.name](config.synth, run, data.num_classes, data.class_names, data.dataset)
        kind = LEARNERS[config.model_name]
        way = replay_kind(config, None if source is None else type(source), kind.replay_kind)
        learner = kind(config, data, run, way(config, source, data, run, replay_folder(config, self.name, self.seed)))
        if isinstance(learner, PyCILLearner):
            learner.first_training = partial(train_or_take, learner)
        return learner

    def learn_all(self) -> dict[str, Any]:
        """Learn all tasks that are not learned yet and return the content of `results.json`."""
        with log_to_file(self.folder / "log.txt") if self.runtime.is_main else nullcontext():
            self._log_header()
            self.run.track(self.config.log_with, f"{self.name}/{self.folder.name}", self.config.model_dump(mode="json"))
            self.learner = self._make_learner()
            claim_data(self.folder, self.data, self.runtime.is_main)
            self.results = Results(self._header(), self.data)
            for task in self.data.tasks(self._restore()):
                self.before_task(task.index)
                with self.run.timed("other"):
                    self._learn(task)
                    keep_to_budget(self.learner, task.index)
                    self._measure_replay(task)
                self.run.ledger.close_task()
                self._save(task)
            if self.runtime.is_main:  # once more: after the last checkpoint, a kill may have come before this
                self.run.forget_fits()
                self.checkpoints.forget_old()
            self.results.log_end()
            self.run.metrics.close()
            return self._write()

    def _learn(self, task: Task) -> None:
        names = ", ".join([*task.class_names[:5], "..."][: task.num_new])  # five at most
        log.log(TOLD, "Task %d: learning on %d-%d (%s)", task.index, task.num_old, task.num_seen - 1, names)
        before = self.run.seconds.get("train", 0.0)
        self.learner.learn_task(task)
        spent = self.run.seconds.get("train", 0.0) - before
        with self.run.timed("evaluate"):
            seen = range(task.num_seen)
            images, held_out = self.data.test_images(seen), self.data.val_images(seen)
            val = (self.learner.predict(held_out), held_out.labels) if len(held_out) else None
            self.results.add(task, self.learner.predict(images), images.labels, val, spent)

    def _measure_replay(self, task: Task) -> None:
        """Judge what was replayed, where the config asks for it and no task comes after this one."""
        if self.config.evaluate_replay and task.num_seen == self.data.num_classes:
            with self.run.timed("evaluate"):
                self.results.replay_quality = replay_quality(self.learner, self.dataset, self.results.class_accuracies)

    def _save(self, task: Task) -> None:
        """Write everything that the next task needs, then the results so far."""
        self.runtime.accelerator.wait_for_everyone()  # until all know what a budget takes
        if self.runtime.is_main:
            learner, so_far = self.learner, {"results": self.results.state(), "cost": self.run.ledger.state()}
            tensors, state = learner_state(learner)
            if learner.replay.learns and self.config.synth.keep_sources:
                # First: what a checkpoint calls learned is not learned again.
                keep_source(learner.replay.source, self.data, task, self.folder)
            self.checkpoints.save(task.index, tensors, {**state, **so_far}, fill_of(learner))
            self.run.forget_fits()
            learner.replay.prune()
            results = self._write()
            log.info(describe(results["memory_bytes"], results["memory_units"]))
        self.runtime.accelerator.wait_for_everyone()

    def _restore(self) -> int:
        """Load the newest checkpoint that is whole; return the number of the next task."""
        if (found := self.checkpoints.load_newest(log)) is None:
            self.run.ledger.load([])
            return 0
        index, tensors, state = found
        restore_learner(self.learner, tensors, state)
        source = self.checkpoints.path(index) / "source"
        if self.learner.replay.learns and source.exists():
            self.learner.replay.source.load(source)
        with self.runtime.accelerator.main_process_first():
            if self.runtime.is_main:
                self.learner.replay.prune()
        self.results.load(state["results"])
        self.run.ledger.load(state.get("cost", [{}] * (index + 1)))
        log.info("Task %d was learned before: continuing after it", index)
        return index + 1

    def _write(self) -> dict[str, Any]:
        """Write `results.json` and `report.html`; return the former's content."""
        memory = count_bytes(self.learner, self.checkpoints.path(len(self.results.accuracy_matrix) - 1))
        results = self.results.to_dict(memory, count_units(self.learner, memory), self.run.ledger.report())
        if self.runtime.is_main:
            write_json(self.folder / RESULTS, results)
            config = self.config.model_dump(mode="json", exclude_none=True)
            environment, panels = read_environment(self.folder.parent), self.run.panels.read()
            write_report(self.folder / "report.html", results, config, list(self._gallery()), environment, panels)
        return results

    def _gallery(self) -> Iterator[GalleryRow]:
        for task in map(self.data.task, range(len(self.results.accuracy_matrix))):
            for label, name in zip(task.classes, task.class_names):
                images, synthetic = self.data.test_images([label]), self.learner.replay.newest(label)[:GALLERY_IMAGES]
                real = [images.image(position) for position in range(min(GALLERY_IMAGES, len(images)))]
                yield GalleryRow(label, name, task.index, real, synthetic)

    def _header(self) -> dict[str, Any]:
        config = self.config
        return {
            "name": self.name, "model_name": config.model_name,
            "source": None if config.synth is None else config.synth.name, "dataset": config.data_name,
            "seed": self.seed, "upper_bound": self.data.upper_bound,
            "eval_logits": getattr(config, "eval_logits", "seen"),  # of learners that score all classes
            "command": " ".join(["python", *sys.argv]),
        }  # fmt: skip

    def _log_header(self) -> None:
        for key, value in self.config.model_dump(mode="json", exclude_none=True).items():
            log.info("%s: %s", key, value)
        if self.unused:
            log.info("Keys that %s does not use: %s", self.config.model_name, ", ".join(self.unused))
        log.info("Data: %s", self.data.dataset.source)
        log.info("Class order: %s", self.data.class_order)
        if self.data.upper_bound:
            log.info("%s is an upper bound: it sees real images of all seen classes", self.config.model_name)
