"""One seed's run: its folder, metrics, clock and random keys, handed to learner, source and `fit`."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from utils.data.batches import Loading
from utils.results.panels import Panels
from utils.run.errors import ConfigError
from utils.run.files import atomic_write
from utils.training.checkpoint import Checkpoints
from utils.training.ledger import Ledger
from utils.training.runtime import Runtime


class Metrics:
    """`metrics.jsonl`: one JSON object per line, for every few training steps; and a tracker, if one is asked for.

    A resumed training rewinds the lines that it is going to write again.
    """

    def __init__(self, path: Path, enabled: bool = True):
        self.path, self.enabled = path, enabled
        self.tracker = None  # of Accelerate

    def write(self, **values) -> None:
        if not self.enabled:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as file:
            file.write(json.dumps(values) + "\n")
        if self.tracker is not None:
            place = f"task_{values.pop('task')}/{values.pop('purpose')}"
            # Every training counts its own steps. wandb's may only rise, so there they are values like the others.
            step = None if self.tracker.name == "wandb" else values.pop("step")
            self.tracker.log({f"{place}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        """End what a tracker shows as one run."""
        if self.tracker is not None:
            self.tracker.finish()

    def rewind(self, task: int, purpose: str, step: int) -> None:
        """Forget the lines of this training after this step, and lines that a crash cut off."""
        if not self.enabled or not self.path.exists():
            return
        text = self.path.read_bytes().decode(errors="replace")
        kept = "".join(f"{line}\n" for line in text.splitlines() if _stays(line, task, purpose, step))
        if text != kept:
            atomic_write(self.path, kept)


def _stays(line: str, task: int, purpose: str, step: int) -> bool:
    try:
        values = json.loads(line)
        return (values["task"], values["purpose"]) != (task, purpose) or values["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


class Run:
    """What surrounds the run of one seed.

    Args:
        folder: `outputs/<run>/seed_<s>`.
        seed: of weights, batches and replay.
        runtime: device, precision, processes.
        num_workers: decoding processes, -1 by the machine.
        checkpoint_every: steps between two checkpoints inside a training.
        progress: show bars.

    Attributes:
        metrics: of its trainings.
        panels: pictures for the report.
        ledger: what it costs.
    """

    def __init__(
        self, folder: Path, seed: int, runtime: Runtime, *, num_workers=-1, checkpoint_every=500, progress=True
    ):
        self.folder, self.seed, self.runtime, self.device = Path(folder), seed, runtime, runtime.device
        self.num_workers = runtime.workers(num_workers)
        self.checkpoint_every, self.progress = checkpoint_every, progress and runtime.is_main
        self.metrics = Metrics(self.folder / "metrics.jsonl", runtime.is_main)
        self.panels = Panels(self.folder / "panels", runtime.is_main)
        self.ledger = Ledger(runtime, self.folder / "checkpoints")

    def loading(self, transform: Any, batch_size: int, task: int, purpose: str, **options: Any) -> Loading:
        """Say how this run makes batches of a training, named by task and purpose; options are `Loading`'s."""
        options = {"num_workers": self.num_workers, "shard": self.runtime.shard, **options}
        return Loading(transform, batch_size, (self.seed, task, purpose), self.device, **options)

    def checkpoints(self, name: str) -> Checkpoints:
        """Return those of finished tasks, `task`, or those inside one training, `fit_<t>_<purpose>`."""
        return Checkpoints(self.folder / "checkpoints", name)

    def forget_fits(self) -> None:
        """Drop the checkpoints inside trainings: a task's own checkpoint has replaced them."""
        self.checkpoints("fit").clear()

    def bar(self, total: int, label: str, start: int = 0) -> tqdm:
        """Make a progress bar on a terminal, from the main process."""
        return tqdm(total=total, initial=start, desc=label, disable=None if self.progress else True)

    def timed(self, part: str) -> AbstractContextManager[None]:
        """Count seconds, memory and evaluations inside as this part's, but for those of a timed block inside it."""
        return self.ledger.part(part)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds spent on each part so far."""
        return {part: cost.seconds for part, cost in self.ledger.total().items()}

    def track(self, log_with: str | None, name: str, config: dict[str, Any]) -> None:
        """Send metrics to one of Accelerate's trackers too.

        Args:
            log_with: "tensorboard" or "wandb"; None: to none.
            name: of the run.
            config: shown beside it.

        Raises:
            ConfigError: if the tracker's package is not installed.
        """
        if log_with is None or not self.runtime.is_main:
            return
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

        if log_with not in [str(tracker) for tracker in get_available_trackers()]:
            raise ConfigError(f"log_with={log_with} needs the package {log_with}: install it, or leave the key out")
        kind = LOGGER_TYPE_TO_CLASS[log_with]
        key = "logging_dir" if kind.requires_logging_directory else "dir"
        self.metrics.tracker = kind(name, **{key: self.folder})
        getattr(self.metrics.tracker, "start", lambda: None)()
        flat = {key: value if isinstance(value, (int, float, str, bool)) else json.dumps(value)
                for key, value in config.items()}  # fmt: skip
        self.metrics.tracker.store_init_configuration(flat)
