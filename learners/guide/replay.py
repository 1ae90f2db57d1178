"""Replay that is drawn inside the training step and bent by the classifier that is being trained."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

from learners.guide.batches import RenewedBatches
from synth import SOURCES
from synth.base import ReplaySource
from synth.ddpm.source import DDPM, Sampling
from synth.diffusion import Bend, respace
from synth.drawing import number_of, preview, save_image
from synth.replay import Replay
from synth.requests import Requests, draw_labels
from utils.data.batches import Loading
from utils.data.images import ImageSet, encode_image
from utils.data.manager import Task
from utils.run.config import RunConfig
from utils.run.errors import BankError, ConfigError
from utils.run.files import atomic_write
from utils.run.folder import replay_manifest
from utils.run.manifest import Manifest
from utils.training import seeding

Bender = Callable[[Task, Requests], Bend]


class Guided(Replay):
    """GUIDE's replay (Cywinski et al., 2024, arXiv:2403.03938): nothing is stored, every draw is bent by its moment.

    The learner says in ``bender`` what bends it, and gives in ``drawing`` a context in which its network holds still.
    """

    source: DDPM
    bender: Bender | None = None
    drawing: Callable[[], AbstractContextManager[None]]

    @classmethod
    def check(cls, config: RunConfig, source: type[ReplaySource]) -> None:
        if not issubclass(source, DDPM):
            able = ", ".join(name for name in SOURCES.names() if issubclass(SOURCES[name], DDPM))
            raise ConfigError(
                f"the learner {config.model_name!r} guides the denoising of its source, which {config.synth.name!r} "
                f"does not allow: choose synth.name={able}"
            )

    def require(self) -> None:
        super().require()
        respace(self.source.process, self.run_config.timestep_respacing)
        if self.run_config.batch_size < self.data.num_tasks:
            raise ConfigError(
                f"batch_size={self.run_config.batch_size}: the last of {self.data.num_tasks} tasks gets no real image"
            )

    def past(self, task: Task) -> ImageSet:
        """Return nothing: what stands for old classes is drawn in ``batches``."""
        self.task = task
        return ImageSet()

    def batches(self, present: ImageSet, past: ImageSet, loading: Loading) -> RenewedBatches:
        """Take a share 1 / (task + 1) of real images, as ``loading`` says, and replay of the others."""
        draw = None if loading.key[1] == 0 else partial(self.draw_step, self.task)
        return RenewedBatches(present, draw, self.run_config.guid_generation_interval, loading)

    def draw_step(self, task: Task, step: int) -> ImageSet:
        """Draw all replay of one step and of those up to the next draw, bent by the network as it is now."""
        count = self.num_replayed(task.index)
        chance = seeding.generator(self.run.seed, task.index, "replay labels", step)
        balanced = self.run_config.label_draw == "balanced"
        labels = draw_labels(list(range(task.num_old)), count, chance, balanced)
        return self.draw(task, Requests.of_labels(labels, (self.run.seed, "guide", task.index, step)))

    def draw(self, task: Task, requests: Requests, guided: bool = True) -> ImageSet:
        """Draw old classes, bent as the config says or, unless ``guided``, not at all.

        The chunks are shared by all processes; each gets every sample, with the bits of one process.
        """
        config = self.run_config
        sampling = Sampling(config.timestep_respacing, "ddim" if config.use_ddim else "ddpm")
        bend = partial(self.bender, task) if guided and self.bender is not None else None
        chunks = list(requests.chunks(self.config.sample_batch))
        with self.run.timed("generate"), self.drawing():
            drawn = self.run.runtime.share(chunks, lambda chunk: self.source.draw(chunk, sampling, bend))
        return sum(drawn, ImageSet())

    def num_replayed(self, index: int) -> int:
        """Count the generated images per step of a task."""
        return self.run_config.batch_size // (index + 1) * index

    def expected(self) -> int:
        config = self.run_config
        draws = -(-config.disjoint_classifier_num_steps // config.guid_generation_interval)
        return draws * sum(map(self.num_replayed, range(self.data.num_tasks)))

    def show(self, task: Task, images: ImageSet) -> None:
        """Lay the last images of a task's training into `task_<t>/drawn`, to be looked at."""
        if not self.run.runtime.is_main:
            return
        if self.config.syn_image_path is None:
            replay_manifest(self.folder).claim()
        manifest = self._shown(task.index)
        folder = manifest.folder
        if folder.exists():
            manifest.delete()
        rows = {label: images.select([label]) for label in images.classes}
        for label, row in rows.items():
            for copy in range(len(row)):
                save_image(folder / str(label) / f"{label}-{copy}", row.image(copy), self.config)
        atomic_write(folder / "preview.png", encode_image(preview(list(rows.values())), ".png"))
        manifest.seal(task=task.index)

    def newest(self, label: int) -> list[str]:
        for index in reversed(range(self.data.num_tasks)):
            shown = self._shown(index)
            if found := [name for name in shown.files() if name.startswith(f"{label}/")]:
                return [str(shown.folder / name) for name in sorted(found, key=number_of)]
        return []

    def _shown(self, index: int) -> Manifest:
        remedy = "move the folder away, or give another --name or syn_image_path"
        return Manifest(self.folder / f"task_{index}" / "drawn", "shown", {}, remedy=remedy, error=BankError)
