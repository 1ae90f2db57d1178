"""The seeds of a run side by side (`--jobs`): each in a process of its own, so many of which work at a time."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait

import torch

from learners.run.experiment import Experiment, find_needs
from utils.run.config import RunConfig
from utils.run.errors import ConfigError, RepriseError, SeedError
from utils.run.files import explained_refusal
from utils.run.folder import claim_machine
from utils.run.log import log, log_to_console
from utils.training.runtime import Runtime, num_cores


class SeedProcess:
    """A seed and the process that learns it, which asks before every task.

    Args:
        experiment: of the seed.
        wave: seeds of an earlier one go first.

    Attributes:
        learned: tasks that are done, as far as it has said.
        error: why it failed; empty while it has not.
    """

    def __init__(self, experiment: Experiment, wave: int):
        self.experiment, self.wave, self.learned, self.name = experiment, wave, 0, experiment.folder.name
        self.process, self.device, self.error = None, None, ""

    def turn(self) -> tuple[int, int, bool]:
        """Return what orders those that wait: the least learned first, and a new process only where none is ready."""
        return self.wave, self.learned, self.process is None

    def start(self, device: list[int | str]) -> None:
        """Start its process on a device; not by a fork, which threads of OpenMP do not outlive."""
        context, experiment, self.device = get_context("spawn"), self.experiment, device
        self.pipe, theirs = context.Pipe()
        config = experiment.config.model_copy(update={"device": device})
        args = (config, experiment.name, experiment.seed, experiment.unused, theirs)
        self.process = context.Process(target=learn_seed, args=args)
        # A Ctrl-C reaches every process of a terminal; this one ends the others.
        usual = signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.process.start()
        signal.signal(signal.SIGINT, usual)
        theirs.close()

    def go_on(self) -> None:
        """Let it learn its next task."""
        with suppress(OSError):  # it may have been killed, which is heard next
            self.pipe.send(None)

    def hear(self) -> bool:
        """Take in what its process says; return whether it asks for its next task, and has not ended."""
        try:
            while isinstance(said := self.pipe.recv(), str):
                self.error = said
            self.learned = said
            return True
        except (EOFError, OSError):
            self.process.join()
            if (code := self.process.exitcode) and not self.error:
                ended = f"ended with exit code {code}" if code > 0 else f"was killed ({signal.Signals(-code).name})"
                self.error = f"its process {ended}; the same command goes on with it"
            return False


def learn_side_by_side(experiments: Sequence[Experiment], jobs: int) -> None:
    """Learn seeds, some at a time, each with the bits that it has alone.

    Args:
        experiments: one per seed, of which none is finished; the threads of their run are set.
        jobs: processes that work at a time.

    Raises:
        ConfigError: if the machine has too few cores or GPUs for them.
        SeedError: naming every seed that failed, once the others are done.
    """
    runtime, jobs = experiments[0].runtime, min(jobs, len(experiments))
    free = share_devices(experiments[0].config, runtime, jobs)
    # Whoever began on a GPU stays there to its end.
    waves = range(len(experiments)) if runtime.device.type == "cuda" else group(len(experiments), jobs)
    seeds = list(map(SeedProcess, experiments, waves))
    log.info("Learning %d seeds, %d at a time; each has its own log.txt", len(seeds), jobs)
    ready, working = list(seeds), {}
    try:
        while ready or working:
            while ready and len(working) < jobs:
                seed = min(ready, key=SeedProcess.turn)
                ready.remove(seed)
                if seed.process is None:
                    seed.start(free.pop(0))
                else:
                    seed.go_on()
                working[seed.pipe] = seed
            for pipe in wait(list(working)):
                seed = working.pop(pipe)
                if seed.hear():
                    ready.append(seed)
                else:
                    free.append(seed.device)
    finally:
        for process in [seed.process for seed in seeds if seed.process is not None]:
            process.terminate()
            process.join()
    if failed := [seed for seed in seeds if seed.error]:
        code = failed[0].process.exitcode
        message = "\nerror: ".join(f"{seed.name}: {seed.error}" for seed in failed)
        raise SeedError(message, 128 - code if code < 0 else code)  # as shells have it for a signal


def group(count: int, jobs: int) -> list[int]:
    """Return the wave of each of so many seeds: those of one take turns, task by task.

    A wave has as many seeds as there are jobs, the last one what is left too, so that no core runs out of work: three
    seeds with two jobs take one and a half times as long as one of them.
    """
    return [min(place // jobs, max(count // jobs - 1, 0)) for place in range(count)]


def share_devices(config: RunConfig, runtime: Runtime, jobs: int) -> list[list[int | str]]:
    """Return the devices that processes take: a GPU each, or the CPU, which all share.

    Raises:
        ConfigError: if there are too few GPUs, or too few cores for processes of several threads.
    """
    if runtime.device.type == "cuda":
        named = [name for name in config.device if str(name) not in ("auto", "cuda")]
        gpus = named or list(range(torch.cuda.device_count()))
        if jobs > len(gpus):
            raise ConfigError(f"--jobs {jobs}: each process takes a GPU, and there are {len(gpus)}: give fewer jobs")
        return [[gpu] for gpu in gpus[:jobs]]
    threads, cores = torch.get_num_threads(), num_cores()
    if threads > 1 and jobs * threads > cores:
        why = f"each process of this run takes {threads} threads (environment.json), and there are {cores} cores"
        remedy = "give fewer jobs, or begin the run under another --name with OMP_NUM_THREADS=1"
        raise ConfigError(f"--jobs {jobs}: {why}: {remedy}")
    return [config.device] * 2 * jobs


def learn_seed(config: RunConfig, name: str, seed: int, unused: Sequence[str], pipe: Connection) -> None:
    """Learn one seed, in a process of its own that ends when whoever started it does."""

    def wait_for_turn(index: int) -> None:
        pipe.send(index)
        pipe.recv()

    threading.Thread(target=_end_with_parent, daemon=True).start()
    log_to_console(seed=config.seed_tag(seed))
    try:
        with explained_refusal():
            runtime = Runtime(config.device, config.precision)
            experiment = Experiment(config, name, seed, find_needs(config), runtime, unused)
            claim_machine(experiment.folder.parent, runtime)
            experiment.before_task, experiment.run.progress = wait_for_turn, False
            experiment.learn_all()
    except RepriseError as error:
        pipe.send(str(error))
        sys.exit(error.exit_code)


def _end_with_parent() -> None:
    """End as if killed once the parent has ended in any way: it held the lock of the run for this process too."""
    parent_process().join()
    os._exit(1)
