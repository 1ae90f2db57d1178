"""One seed's run: its folder, log, metrics, clock and random keys, handed to learner, source and `fit`."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from utils.results.panels import Panels
from utils.training.checkpoint import Checkpoints, atomic_write
from utils.training.runtime import Runtime

log = logging.getLogger("reprise")
LOG_FORMAT = "%(asctime)s [%(filename)s] => %(message)s"  # PyCIL's


def log_to_console(is_main: bool = True) -> None:
    """Messages go to standard output; of several processes only the main one tells what is not a warning."""
    log.setLevel(logging.INFO if is_main else logging.WARNING)
    log.propagate = False
    if not log.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter(LOG_FORMAT))
        log.addHandler(handler)


@contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """Messages also go to this file (appended), which belongs to one seed alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter(LOG_FORMAT))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


class Metrics:
    """`metrics.jsonl`: one JSON object per line, for every few training steps.

    A resumed training rewinds the lines that it is going to write again.
    """

    def __init__(self, path: Path, enabled: bool = True):
        self.path, self.enabled = path, enabled

    def write(self, **values) -> None:
        if self.enabled:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as file:
                file.write(json.dumps(values) + "\n")

    def rewind(self, task: int, purpose: str, step: int) -> None:
        """Forget the lines of this training after this step, and a last line that a crash cut off."""
        if not self.enabled or not self.path.exists():
            return
        kept, text = [], self.path.read_text()
        for line in text.splitlines():
            try:
                values = json.loads(line)
            except json.JSONDecodeError:
                continue
            if (values.get("task"), values.get("purpose")) != (task, purpose) or values["step"] <= step:
                kept.append(line)
        if text != (kept_text := "".join(line + "\n" for line in kept)):
            atomic_write(self.path, kept_text)


class Run:
    """What surrounds the run of one seed.

    Args:
        folder: `outputs/<run>/seed_<s>`.
        seed: of weights, batches and replay.
        runtime: device, precision, processes.
        num_workers: decoding processes, -1 by the machine.
        checkpoint_every: steps between two checkpoints inside a training.
        progress: show bars.
    """

    def __init__(
        self, folder: Path, seed: int, runtime: Runtime, *, num_workers=-1, checkpoint_every=500, progress=True
    ):
        self.folder, self.seed, self.runtime = Path(folder), seed, runtime
        self.num_workers = runtime.workers(num_workers)
        self.checkpoint_every, self.progress = checkpoint_every, progress and runtime.is_main
        self.metrics = Metrics(self.folder / "metrics.jsonl", runtime.is_main)
        self.seconds: dict[str, float] = {}
        self._inside = 0.0  # seconds of the timed blocks inside the present one

    @property
    def device(self):
        return self.runtime.device

    @property
    def panels(self) -> Panels:
        """Pictures for the report."""
        return Panels(self.folder / "panels", self.runtime.is_main)

    def checkpoints(self, name: str) -> Checkpoints:
        return Checkpoints(self.folder / "checkpoints", name)

    def fit_checkpoints(self, task: int, purpose: str) -> Checkpoints:
        """The checkpoints inside one training."""
        return self.checkpoints(f"fit_{task}_{purpose}")

    def forget_fits(self) -> None:
        """Drop the checkpoints inside trainings: a task's own checkpoint has replaced them."""
        self.checkpoints("fit").clear()

    def bar(self, total: int, label: str, start: int = 0) -> tqdm:
        """A progress bar on a terminal, from the main process."""
        return tqdm(total=total, initial=start, desc=label, disable=None if self.progress else True)

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the seconds spent inside to `seconds[what]`, but for those of a timed block inside it."""
        start, outside = time.perf_counter(), self._inside
        self._inside = 0.0
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[what] = self.seconds.get(what, 0.0) + spent - self._inside
            self._inside = outside + spent
