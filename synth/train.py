"""Fit a replay source (synth.name) on a data set, without a classifier.

Class inversion finds one vector per class for a frozen text-to-image model, ddpm trains its network task after task.
The same command again continues a training that was cut off. Then draw with `python -m synth.sample`.

--config is an experiment file (exps/*.json with `synth`), or a YAML in CompVis form with a section `reprise` that
holds dataset and synth; a YAML without it is of the source ldm and needs --dataset. Each class is drawn at the end of
its training into previews/sample_epoch<XX>_class<YY>.png, with --preview_every K every K epochs too.

examples:
  python -m synth.train --config exps/digits.json --ckpt_save_dir outputs/digits_source/
  python -m synth.train --config my.yaml --classes apple,rose --preview_every 20
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import nullcontext
from functools import partial
from itertools import groupby
from pathlib import Path

from synth.command import (
    FITTED,
    FitConfig,
    build_fit_config,
    command_parser,
    cut_data,
    fitted_manifest,
    make_source,
    pick_classes,
    read_file,
)
from synth.replay import Replay, replay_kind
from synth.requests import Requests
from synth.stored import keep_source, save_source
from utils.data.images import ImageSet, encode_image
from utils.data.manager import DataManager, Task
from utils.run.command import exit_code
from utils.run.errors import ConfigError
from utils.run.files import atomic_write
from utils.run.folder import claim_data, claim_folder, claim_machine
from utils.run.lock import locked
from utils.run.log import log, log_to_console, log_to_file
from utils.training.run import Run
from utils.training.runtime import Runtime


class Fitting:
    """An experiment without a classifier: one source on its way through the tasks, resumable at any moment.

    Source and replay go through a task as in a run, so the source ends as the run's would if no classifier had a say.

    Args:
        config: data, tasks and source.
        data: cut into tasks.
        tasks: those to learn.
        run: whose folder is filled.
        preview_every: epochs between two sets of previews; 0: only one after each task.
    """

    def __init__(self, config: FitConfig, data: DataManager, tasks: list[Task], run: Run, preview_every: int):
        self.config, self.data, self.tasks, self.run, self.preview_every = config, data, tasks, run, preview_every
        self.checkpoints, self.source = run.checkpoints("task"), make_source(config, run, data)
        # Only what rehearses looks at the past; of any other source nobody would see the images.
        way = replay_kind(config, type(self.source), None) if self.source.wants_past else Replay
        self.replay = way(config, self.source, data, run, run.folder / "replay")
        if self.source.wants_past:
            self.replay.bank.task_of = {label: task.index for task in tasks for label in task.classes}

    def learn_all(self) -> None:
        """Learn every task that is not learned yet and save the source."""
        for task in self.tasks[self._restore() :]:
            names = ", ".join(task.class_names[:5]) + ", ..." * (task.num_new > 5)
            log.info("Task %d: learning %d classes (%s)", task.index, task.num_new, names)
            self.data.advance(task)
            self._learn(task)
            if self.run.runtime.is_main:
                if self.config.synth.keep_sources:
                    keep_source(self.source, self.data, task, self.run.folder)
                self.checkpoints.save(task.index, {}, {}, partial(save_source, self.source))
                self.run.forget_fits()
            self.run.runtime.accelerator.wait_for_everyone()
        if self.run.runtime.is_main:
            self._publish()

    def _learn(self, task: Task) -> None:
        real, self.epoch = self.data.train_images(task), 0
        self.source.watcher = partial(self._watch, task)
        self.source.fit_before(task, real)
        past = self.replay.past(task) if self.source.fitted_classes else ImageSet()
        self.source.fit_after(task, real, past, ImageSet(), None)
        if task is not self.tasks[-1]:
            self.replay.learned(task)
        self._preview(task)

    def _watch(self, task: Task, epoch: int) -> None:
        self.epoch = epoch
        if self.preview_every and epoch and epoch % self.preview_every == 0:
            self._preview(task)

    def _preview(self, task: Task) -> None:
        """Draw one image of each class that it knows of the task's, the one that would be drawn first."""
        key = (self.run.seed, self.config.synth.name, task.index)
        classes = sorted(self.source.fitted_classes.intersection(task.classes))
        images = self.source.generate(Requests.of_classes(classes, 1, key)) if classes else ImageSet()
        for position, label in enumerate(classes if self.run.runtime.is_main else ()):
            path = self.run.folder / "previews" / f"sample_epoch{self.epoch:02d}_class{label:02d}.png"
            atomic_write(path, encode_image(images.image(position), ".png"), sync=False)

    def _restore(self) -> int:
        """Load the newest checkpoint that is whole; return the place of the next task."""
        if (found := self.checkpoints.load_newest(log)) is None:
            return 0
        self.source.load(self.checkpoints.path(found[0]) / "source")
        log.info("Task %d was learned before: continuing after it", found[0])
        return 1 + [task.index for task in self.tasks].index(found[0])

    def _publish(self) -> None:
        """Write the source into the folder itself; the checkpoints are then no longer needed."""
        self.source.save(self.run.folder)
        stored = self.checkpoints.manifest(self.tasks[-1].index).files()
        files = [name.removeprefix("source/") for name in stored if name.startswith("source/")]
        names = {str(label): self.data.class_names[label] for label in sorted(self.source.fitted_classes)}
        fitted_manifest(self.run.folder).seal(files, classes=names)
        self.checkpoints.clear()


def choose_tasks(config: FitConfig, data: DataManager) -> list[Task]:
    """Choose the schedule's tasks, one of them, or tasks made of chosen classes.

    Chosen classes that follow each other in learning order are one task, numbered from 0 like any first task.
    """
    if config.task is not None and config.classes:
        raise ConfigError("--task and --classes both choose what to fit: give one of them")
    if config.task is not None and config.task >= data.num_tasks:
        raise ConfigError(f"--task {config.task}: the schedule has tasks 0 to {data.num_tasks - 1}")
    if not config.classes:
        return [data.task(index) for index in range(data.num_tasks) if config.task in (None, index)]
    names = data.class_names
    labels = pick_classes(config.classes, names, range(data.num_classes), "--classes")
    runs = [[label for _, label in run] for _, run in groupby(enumerate(labels), lambda item: item[1] - item[0])]
    return [Task(i, range(run[0], run[-1] + 1), tuple(names[run[0] : run[-1] + 1])) for i, run in enumerate(runs)]


def start(args: argparse.Namespace) -> None:
    """Fit what the command line asks for; everything is checked, and the data read, before anything is written."""
    config = build_fit_config(read_file(args.config), args)
    is_main, folder = os.environ.get("RANK", "0") == "0", Path(args.ckpt_save_dir)
    log_to_console(is_main)
    runtime = Runtime(config.device, config.precision)
    with runtime.accelerator.main_process_first():  # one process downloads
        config, data = cut_data(config)
    run = Run(folder, config.train_seed(config.seed[0]), runtime, num_workers=config.num_workers,
              checkpoint_every=config.checkpoint_every)  # fmt: skip
    fitting = Fitting(config, data, choose_tasks(config, data), run, args.preview_every)
    with locked(folder, is_main):
        with runtime.accelerator.main_process_first():
            if any(folder.glob("seed_*")):  # --overwrite must not delete a run either
                raise ConfigError(f"{folder} holds a run of main.py: give another --ckpt_save_dir")
            here = config.model_copy(update={"output_dir": str(folder.parent)})
            claim_folder(here, folder.name, args.overwrite and runtime.is_main, "--ckpt_save_dir")
            claim_machine(folder, runtime, lambda: fitting.source.step_flops)
        if (folder / FITTED).exists():
            log.info("%s is fitted already (--overwrite repeats it)", folder)
            return
        with log_to_file(folder / "log.txt") if runtime.is_main else nullcontext():
            claim_data(folder, data, runtime.is_main)
            log.info("Data: %s", data.dataset.source)
            log.info("Seed %d, class order: %s", config.seed[0], data.class_order)
            log.info("Source %s: %s", config.synth.name, fitting.source.describe())
            fitting.learn_all()
            log.info("The source has learned %d classes and lies in %s", len(fitting.source.fitted_classes), folder)


def main(argv: list[str] | None = None) -> int:
    """Return exit code 0, or 2 after one message about a mistake that the user can repair."""
    parser = command_parser("train", __doc__)
    parser.add_argument("--config", "--flagfile", required=True, help="experiment file, YAML, or flagfile of absl")
    parser.add_argument("--ckpt_save_dir", default="outputs/diffusion_model", help="to fill (default: %(default)s)")
    parser.add_argument("--classes", help="these alone: ids in learning order or names, with commas (default: all)")
    parser.add_argument("--task", type=int, help="fit the classes of this task of the file's schedule alone")
    parser.add_argument("--preview_every", type=int, default=0, metavar="K", help="epochs; 0: at the end alone")
    parser.add_argument("--overwrite", action="store_true", help="delete what was fitted in the folder and start anew")
    return exit_code(start, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
