"""One seed of an experiment from its data to its report, resumable at any moment."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from learners import LEARNERS
from learners.backbones import weight_options
from learners.base import Learner
from learners.run.initial import require_initial
from learners.run.ledger import check_budget, count_bytes, count_units, describe, keep_to_budget, saves_source
from models.files.weights import what_is_missing
from models.timm_backbone import check_backbone_name
from synth import SOURCES
from synth.bank import Bank
from synth.escort.copies import CopyBank
from synth.stored import keep_source, save_source
from utils.data.datasets import Dataset, load_dataset
from utils.data.manager import DataManager, cut_tasks
from utils.results.gallery import GalleryRow
from utils.results.report import write_report
from utils.results.results import Results
from utils.run.config import RunConfig
from utils.run.errors import DataError, WeightsError
from utils.run.folder import ENVIRONMENT, bank_folder, describe_data
from utils.training.checkpoint import Checkpoints, write_json
from utils.training.run import Run, log_to_file
from utils.training.runtime import Runtime

log = logging.getLogger("reprise")
GALLERY_IMAGES = 8


def make_data(config: RunConfig, seed: int, dataset: Dataset) -> DataManager:
    """The tasks of one seed."""
    return cut_tasks(config, seed, dataset, LEARNERS[config.model_name].upper_bound)


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
    """The weights that a run needs and that are not to be had, each with where they go."""
    options = replace(weight_options(config), offline=offline)
    checks = [partial(check_backbone_name, config.convnet_type, options, fetch=True)]
    if config.synth is not None and config.synth.need_syn_imgs:
        checks.append(partial(SOURCES[config.synth.name].check_weights, config.synth, offline))
    return what_is_missing(checks)


def make_learner(config: RunConfig, name: str, seed: int, data: DataManager, run: Run) -> Learner:
    """The learner of this run with its source and its bank."""
    source = bank = None
    if config.synth is not None:
        source = SOURCES[config.synth.name](config.synth, run, data.num_classes, data.class_names, data.dataset)
        kind = partial(CopyBank, source=source) if source.makes_copies else Bank
        bank = kind(bank_folder(config, name, seed), config.synth, data, run)
    return LEARNERS[config.model_name](config, data, run, source, bank)


class Experiment:
    """The run of one seed: learn, evaluate, write, checkpoint, task after task.

    Args:
        config: of learner and source.
        name: of the run.
        seed: one of ``config.seed``.
        dataset: already read.
        runtime: the machine.
        unused: keys of the experiment file that the learner does not know.
    """

    def __init__(
        self, config: RunConfig, name: str, seed: int, dataset: Dataset, runtime: Runtime, unused: Sequence[str] = ()
    ):
        self.config, self.name, self.seed, self.runtime, self.unused = config, name, seed, runtime, unused
        self.data = make_data(config, seed, dataset)
        self.folder = Path(config.output_dir) / name / config.seed_tag(seed)

    def check(self) -> Learner:
        """Build network and source once, so that whatever does not fit is said before anything is written."""
        learner = make_learner(self.config, self.name, self.seed, self.data, self._make_run())
        if learner.source_fitter is not None:
            learner.source_fitter.require()
        if self.config.init_from is not None:
            require_initial(learner)
        if self._uses_given_images and self.config.synth.replay == "keep":
            for index in range(self.data.num_tasks - 1):  # nobody needs those of the last task
                learner.bank.require(index)
        check_budget(learner)
        return learner

    @property
    def _uses_given_images(self) -> bool:
        """Whether replay images are there already, so that the source is neither fitted nor saved."""
        return self.config.synth is not None and not self.config.synth.need_syn_imgs

    def _make_run(self) -> Run:
        return Run(
            self.folder,
            self.config.train_seed(self.seed),
            self.runtime,
            num_workers=self.config.num_workers,
            checkpoint_every=self.config.checkpoint_every,
        )

    def finished(self) -> dict[str, Any] | None:
        """The results of a run that has ended before, or None."""
        path = self.folder / "results.json"
        results = json.loads(path.read_text()) if path.exists() else {}
        return results if results.get("finished") else None

    def run(self) -> dict[str, Any]:
        """Learn all tasks that are not learned yet and return the content of `results.json`."""
        with log_to_file(self.folder / "log.txt") if self.runtime.is_main else nullcontext():
            self._log_header()
            self.work = self._make_run()
            self.learner = make_learner(self.config, self.name, self.seed, self.data, self.work)
            describe_data(self.folder, self.data)
            self.results = Results(
                self._header(), self.data, few_shot=self.config.kshot > 0, long_tailed=self.config.imb_factor < 1
            )
            for task in self.data.tasks(self._restore()):
                with self.work.timed("other"):
                    self._learn(task)
                    keep_to_budget(self.learner, task.index)
                self._save(task)
            self.results.log_end()
            return self._write()

    def _learn(self, task) -> None:
        log.info("Task %d: learning on %d-%d (%s)", task.index, task.num_old, task.num_seen - 1, _names(task))
        self.learner.learn_task(task)
        with self.work.timed("evaluate"):
            images = self.data.test_images(range(task.num_seen))
            self.results.add(task, self.learner.predict(images), images.labels)

    @property
    def _checkpoints(self) -> Checkpoints:
        return self.work.checkpoints("task")

    def _save(self, task) -> None:
        """Everything that the next task needs, then the results so far."""
        self.runtime.accelerator.wait_for_everyone()  # until all know what a budget takes from the bank
        if self.runtime.is_main:
            learner, keep = self.learner, saves_source(self.learner)
            tensors, state = learner.state()
            state |= {"results": self.results.state(), "seconds": self.work.seconds}
            state |= {} if learner.bank is None else {"bank_kept": learner.bank.kept}
            if keep and self.config.synth.keep_sources:  # first: what a checkpoint calls learned is not learned again
                keep_source(learner.source, self.data, task, self.folder)
            self._checkpoints.save(task.index, tensors, state, partial(save_source, learner.source) if keep else None)
            self.work.forget_fits()
            self._prune_bank()
            results = self._write()
            log.info(describe(results["memory_bytes"], results["memory_units"]))
        self.runtime.accelerator.wait_for_everyone()

    def _prune_bank(self) -> None:
        if self.learner.bank is not None and self.runtime.is_main:
            self.learner.bank.prune()

    def _restore(self) -> int:
        """Load the newest checkpoint that is whole; returns the number of the next task."""
        found = self._checkpoints.load_newest(log)
        if found is None:
            return 0
        index, tensors, state = found
        learner = self.learner
        learner.restore(tensors, state)
        if learner.source is not None and (self._checkpoints.path(index) / "source").exists():
            learner.source.load(self._checkpoints.path(index) / "source")
        if learner.bank is not None:
            learner.bank.kept = {int(label): count for label, count in state.get("bank_kept", {}).items()}
            with self.runtime.accelerator.main_process_first():
                self._prune_bank()
        self.results.load(state["results"])
        self.work.seconds.update(state["seconds"])
        log.info("Task %d was learned before: continuing after it", index)
        return index + 1

    def _write(self) -> dict[str, Any]:
        """Write `results.json` and `report.html`; returns the former's content."""
        spent = self.work.seconds
        seconds = {name: spent.get(name, 0.0) for name in ("train", "fit_source", "generate", "evaluate")}
        seconds["total"] = sum(spent.values())
        memory = count_bytes(self.learner, self._checkpoints.path(self._checkpoints.numbers()[0]))
        results = self.results.to_dict(memory, count_units(self.learner, memory), seconds)
        if self.runtime.is_main:
            write_json(self.folder / "results.json", results)
            config = self.config.model_dump(mode="json", exclude_none=True)
            environment = json.loads((self.folder.parent / ENVIRONMENT).read_text())
            panels = self.work.panels.read()
            write_report(self.folder / "report.html", results, config, self._gallery(), environment, panels)
        return results

    def _gallery(self) -> list[GalleryRow]:
        rows = []
        for label in range(len(self.results.per_class_accuracy)):
            real = self.data.test_images([label])
            synthetic = [] if self.learner.bank is None else self.learner.bank.newest(label)[:GALLERY_IMAGES]
            picks = [real.image(position) for position in range(min(GALLERY_IMAGES, len(real)))]
            task = next(task.index for task in map(self.data.task, range(self.data.num_tasks)) if label in task.classes)
            rows.append(GalleryRow(label, self.data.class_names[label], task, picks, synthetic))
        return rows

    def _header(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "model_name": self.config.model_name,
            "source": None if self.config.synth is None else self.config.synth.name,
            "dataset": self.config.data_name,
            "seed": self.seed,
            "upper_bound": self.learner.upper_bound,
            "eval_logits": self.learner.eval_logits,
            "command": " ".join(["python", *sys.argv]),
        }

    def _log_header(self) -> None:
        for key, value in self.config.model_dump(mode="json", exclude_none=True).items():
            log.info("%s: %s", key, value)
        if self.unused:
            log.info("Keys that %s does not use: %s", self.config.model_name, ", ".join(self.unused))
        log.info("Data: %s", self.data.dataset.source)
        log.info("Class order: %s", self.data.class_order)
        if LEARNERS[self.config.model_name].upper_bound:
            log.info("%s is an upper bound: it sees real images of all seen classes", self.config.model_name)


def _names(task) -> str:
    names = ", ".join(task.class_names[:5])
    return names if task.num_new <= 5 else f"{names}, ..."
