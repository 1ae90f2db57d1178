"""Fit a replay source outside a run: `python -m synth.train --config exps/ldm/ldm_dddr.yaml`."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import nullcontext
from functools import partial
from itertools import groupby
from pathlib import Path

from synth import SOURCES
from synth.bank import Bank
from synth.command import FITTED, FitConfig, add_shared_flags, build_config, pick_classes, read_file
from synth.requests import Requests
from synth.stored import keep_source, save_source
from utils.data.datasets import load_dataset
from utils.data.images import ImageSet, encode_image
from utils.data.manager import DataManager, Task, cut_tasks
from utils.run.command import exit_code
from utils.run.errors import ConfigError
from utils.run.folder import claim_folder, claim_machine, describe_data
from utils.training.checkpoint import atomic_write, file_hash, write_json
from utils.training.run import Run, log, log_to_console, log_to_file
from utils.training.runtime import Runtime


class Fitting:
    """One source on its way through the tasks, resumable at any moment.

    The order of things is that of a run, so the source ends as the run's would if no classifier had a say in it.

    Args:
        config: data, tasks and source.
        data: cut into tasks.
        tasks: those to learn.
        run: whose folder is filled.
        preview_every: epochs between two sets of previews; 0: only one after each task.
    """

    def __init__(self, config: FitConfig, data: DataManager, tasks: list[Task], run: Run, preview_every: int):
        self.config, self.data, self.tasks, self.run, self.preview_every = config, data, tasks, run, preview_every
        self.source = SOURCES[config.synth.name](config.synth, run, data.num_classes, data.class_names, data.dataset)
        # Of sources that learn afterwards and rehearse; the others would draw images that nobody looks at.
        self.rehearses = self.source.learns_after()
        self.bank = Bank(run.folder / "replay", config.synth, data, run)
        self.bank.task_of = {label: task.index for task in tasks for label in task.classes}

    def learn_all(self) -> None:
        """Learn every task that is not learned yet and save the source."""
        start = self._restore()
        for task in self.tasks[start:]:
            names = ", ".join(task.class_names[:5]) + ", ..." * (task.num_new > 5)
            log.info("Task %d: learning %d classes (%s)", task.index, task.num_new, names)
            self.data.advance(task)
            self._learn(task)
            if self.run.runtime.is_main:
                if self.config.synth.keep_sources:
                    keep_source(self.source, self.data, task, self.run.folder)
                self.run.checkpoints("task").save(task.index, {}, {}, partial(save_source, self.source))
                self.run.forget_fits()
            self.run.runtime.accelerator.wait_for_everyone()
        if self.run.runtime.is_main:
            self._publish()

    def _learn(self, task: Task) -> None:
        images, self.epoch = self.data.train_images(task), 0
        self.source.watcher = lambda epoch: self._watch(task, epoch)
        self.source.fit_before(task, images)
        if self.rehearses:
            self.source.fit_after(task, images, self._replay(task), ImageSet(), None)
            wanted = self.config.synth.replay == "keep" and self.source.wants_replay(self.config.synth)
            if wanted and task is not self.tasks[-1]:
                self.bank.draw(self.source, task, task.classes)
        self._preview(task)

    def _replay(self, task: Task) -> ImageSet:
        if not self.source.fitted_classes or not self.source.wants_replay(self.config.synth):
            return ImageSet()
        if self.config.synth.replay == "keep":
            return self.bank.stored(sorted(self.source.fitted_classes))
        return self.bank.redraw(self.source, task)

    def _watch(self, task: Task, epoch: int) -> None:
        self.epoch = epoch
        if self.preview_every and epoch and epoch % self.preview_every == 0:
            self._preview(task)

    def _preview(self, task: Task) -> None:
        """One image of each class that it knows of the task's, the one that would be drawn first."""
        key, known = (self.run.seed, self.config.synth.name, task.index), self.source.fitted_classes
        classes = [label for label in task.classes if label in known]
        images = self.source.generate(Requests.of_classes(classes, 1, key)) if classes else ImageSet()
        for position, label in enumerate(classes if self.run.runtime.is_main else ()):
            path = self.run.folder / "previews" / f"sample_epoch{self.epoch:02d}_class{label:02d}.png"
            atomic_write(path, encode_image(images.image(position), ".png"), sync=False)

    def _restore(self) -> int:
        """Load the newest checkpoint that is whole; returns the place of the next task."""
        checkpoints = self.run.checkpoints("task")
        found = checkpoints.load_newest(log)
        if found is None:
            return 0
        self.source.load(checkpoints.path(found[0]) / "source")
        log.info("Task %d was learned before: continuing after it", found[0])
        return 1 + [task.index for task in self.tasks].index(found[0])

    def _publish(self) -> None:
        """Write the source into the folder itself; the checkpoints are then no longer needed."""
        folder, newest = self.run.folder, self.run.checkpoints("task")
        self.source.save(folder)
        stored = newest.path(self.tasks[-1].index) / "source"
        files = [path.relative_to(stored) for path in sorted(stored.rglob("*")) if path.is_file()]
        names = {str(label): self.data.class_names[label] for label in sorted(self.source.fitted_classes)}
        hashes = {name.as_posix(): file_hash(folder / name) for name in files}
        write_json(folder / FITTED, {"classes": names, "files": hashes})
        newest.clear()


def choose_tasks(config: FitConfig, data: DataManager) -> list[Task]:
    """The schedule's tasks, one of them, or tasks made of chosen classes.

    Chosen classes that follow each other in learning order are one task, numbered from 0 like any first task.
    """
    if config.task is None and not config.classes:
        return [data.task(index) for index in range(data.num_tasks)]
    if config.task is not None and config.classes:
        raise ConfigError("--task and --classes both choose what to fit: give one of them")
    if config.task is not None:
        if config.task >= data.num_tasks:
            raise ConfigError(f"--task {config.task}: the schedule has tasks 0 to {data.num_tasks - 1}")
        return [data.task(config.task)]
    labels = pick_classes(config.classes, data.class_names, range(data.num_classes), "--classes")
    runs = [[label for _, label in run] for _, run in groupby(enumerate(labels), lambda item: item[1] - item[0])]
    names = data.class_names
    return [Task(i, range(run[0], run[-1] + 1), tuple(names[run[0] : run[-1] + 1])) for i, run in enumerate(runs)]


def run(args: argparse.Namespace) -> int:
    """Everything is checked, and the data read, before anything is written."""
    config = build_config(read_file(args.config), args, classes=args.classes, task=args.task)
    log_to_console(is_main=os.environ.get("RANK", "0") == "0")
    runtime = Runtime(config.device, config.precision)
    with runtime.accelerator.main_process_first():  # one process downloads
        dataset = load_dataset(config.data_name, config.data_dir, config.offline)
    config, folder = config.scheduled(dataset.num_classes), Path(args.ckpt_save_dir)
    data = cut_tasks(config, config.seed[0], dataset)
    work = Run(folder, config.train_seed(config.seed[0]), runtime, num_workers=config.num_workers,
               checkpoint_every=config.checkpoint_every)  # fmt: skip
    fitting = Fitting(config, data, choose_tasks(config, data), work, args.preview_every)
    with runtime.accelerator.main_process_first():
        claim(folder, config, args.overwrite and runtime.is_main)
        claim_machine(folder, runtime)
    if (folder / FITTED).exists():
        log.info("%s is fitted already (--overwrite repeats it)", folder)
        return 0
    with log_to_file(folder / "log.txt") if runtime.is_main else nullcontext():
        describe_data(folder, data)
        log.info("Data: %s", dataset.source)
        log.info("Seed %d, class order: %s", config.seed[0], data.class_order)
        log.info("Source %s: %s", config.synth.name, fitting.source.describe())
        fitting.learn_all()
        log.info("The source has learned %d classes and lies in %s", len(fitting.source.fitted_classes), folder)
    return 0


def claim(folder: Path, config: FitConfig, overwrite: bool) -> None:
    """Make the folder this training's own; one of another training or of a run is refused."""
    if any(folder.glob("seed_*")):  # --overwrite must not delete a run either
        raise ConfigError(f"{folder} holds a run of main.py: give another --ckpt_save_dir")
    claim_folder(
        config.model_copy(update={"output_dir": str(folder.parent)}), folder.name, overwrite, "--ckpt_save_dir"
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m synth.train",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Fit a replay source (synth.name) on a data set, without a classifier: class inversion finds one\n"
        "vector per class for a frozen text-to-image model, ddpm trains its network task after task. The same\n"
        "command again continues a training that was cut off. Then draw with `python -m synth.sample`.",
        epilog="examples:\n"
        "  python -m synth.train --config exps/digits.json --ckpt_save_dir outputs/digits_source/\n"
        "  python -m synth.train --config exps/ldm/ldm_dddr.yaml --classes apple,rose --preview_every 20",
    )
    parser.add_argument("--config", required=True, help="an experiment file (exps/*.json with `synth`), or a YAML in "
                        "CompVis form with a section `reprise` that holds dataset and synth; a YAML without it is of "
                        "the source ldm and needs --dataset")  # fmt: skip
    parser.add_argument("--ckpt_save_dir", default="outputs/diffusion_model", help="folder of the fitted source, its "
                        "log and its previews (default: %(default)s)")  # fmt: skip
    parser.add_argument("--classes", help="fit these classes alone: ids in learning order or names, comma between them "
                        "(default: all)")  # fmt: skip
    parser.add_argument("--task", type=int, help="fit the classes of this task of the file's schedule alone")
    parser.add_argument("--preview_every", type=int, default=0, metavar="K", help="also draw one image of each class "
                        "every K epochs of the training, into previews/sample_epoch<XX>_class<YY>.png; 0: only at its "
                        "end")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="delete what was fitted in the folder and start anew")
    add_shared_flags(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 after one message about a mistake that the user can repair."""
    return exit_code(run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
