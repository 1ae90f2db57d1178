"""Replay that is drawn inside the training step and bent by the classifier that is being trained."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from models.frozen import fixed
from models.incremental import IncrementalNet
from synth import SOURCES
from synth.base import ReplaySource
from synth.ddpm.sampling import Sampling
from synth.ddpm.source import DDPM
from synth.diffusion import respace
from synth.drawing import found_images, preview, save_image
from synth.replay import Replay
from synth.requests import Requests, draw_labels
from synth.samplers import Bend
from utils.data.images import ImageSet, encode_image
from utils.data.manager import Task
from utils.run.config import RunConfig
from utils.run.errors import BankError, ConfigError
from utils.run.files import atomic_write, in_numeric_order
from utils.run.folder import replay_manifest
from utils.run.manifest import Manifest
from utils.training import seeding


class Guided(Replay):
    """GUIDE's replay (Cywinski et al., 2024, arXiv:2403.03938): nothing is stored, every draw is bent by its moment.

    The learner says in ``bender`` what bends it, and in ``network`` what must hold still meanwhile.
    """

    source: DDPM
    network: IncrementalNet
    bender: Callable[[Task, Requests], Bend] | None = None

    @classmethod
    def check(cls, config: RunConfig, source: type[ReplaySource]) -> None:
        if not issubclass(source, DDPM):
            able = ", ".join(name for name in SOURCES.names() if issubclass(SOURCES[name], DDPM))
            refused = f"{config.model_name!r} guides the denoising, which {config.synth.name!r} does not allow"
            raise ConfigError(f"{refused}: choose synth.name={able}")

    def require(self) -> None:
        super().require()
        respace(self.source.process, self.run_config.timestep_respacing)
        if (batch_size := self.run_config.batch_size) < (num_tasks := self.data.num_tasks):
            raise ConfigError(f"{batch_size=}: the last of {num_tasks} tasks gets no real image")

    def draw_step(self, task: Task, step: int) -> ImageSet:
        """Draw all replay of one step and of those up to the next draw, bent by the network as it is now."""
        count, balanced = self.num_replayed(task.index), self.run_config.label_draw == "balanced"
        chance = seeding.generator(self.run.seed, task.index, "replay labels", step)
        labels = draw_labels(list(range(task.num_old)), count, chance, balanced)
        return self.draw(task, Requests.of_labels(labels, (self.run.seed, "guide", task.index, step)))

    def draw(self, task: Task, requests: Requests, guided: bool = True) -> ImageSet:
        """Draw old classes, bent as the config says or, unless ``guided``, not at all.

        The chunks are shared by all processes; each gets every sample, with the bits of one process.
        """
        runtime, sampler = self.run.runtime, "ddim" if self.run_config.use_ddim else "ddpm"
        sampling = Sampling(self.run_config.timestep_respacing, sampler)
        bend = partial(self.bender, task) if guided and self.bender is not None else None
        chunks = list(requests.chunks(self.config.sample_batch))
        runtime.share_buffers(self.network)  # BatchNorm's, which every process has its own of
        with self.run.timed("draw"), fixed(self.network):
            drawn = runtime.share(chunks, lambda chunk: self.source.draw(chunk, sampling, bend))
        return sum(drawn, ImageSet())

    def num_replayed(self, index: int) -> int:
        """Count the generated images per step of a task."""
        return self.run_config.batch_size // (index + 1) * index

    def expected(self) -> int:
        draws = -(-self.run_config.disjoint_classifier_num_steps // self.run_config.guid_generation_interval)
        return draws * sum(map(self.num_replayed, range(self.data.num_tasks)))

    def try_drawing(self, task: Task, requests: Requests) -> None:
        self.draw(task, requests)

    def show(self, task: Task, images: ImageSet) -> None:
        """Lay the last images of a task's training into `task_<t>/drawn`, to be looked at."""
        if not self.run.runtime.is_main:
            return
        if self.config.syn_image_path is None:
            replay_manifest(self.folder).claim()
        manifest = self._shown(task.index)
        if manifest.exists or found_images(manifest.folder):
            manifest.delete()
        manifest.claim()  # first: a kill must leave nothing that is nobody's
        rows = [images.select([label]) for label in images.classes]
        for label, row in zip(images.classes, rows):
            for copy in range(len(row)):
                save_image(manifest.folder / f"{label}" / f"{label}-{copy}", row.image(copy), self.config)
        atomic_write(manifest.folder / "preview.png", encode_image(preview(rows), ".png"))
        manifest.seal(task=task.index)

    def newest(self, label: int) -> list[str]:
        for index in reversed(range(self.data.num_tasks)):
            shown = self._shown(index)
            if found := [name for name in shown.files() if name.startswith(f"{label}/")]:
                return list(map(str, in_numeric_order(shown.folder / name for name in found)))
        return []

    def _shown(self, index: int) -> Manifest:
        remedy = "move the folder away, or give another --name or syn_image_path"
        return Manifest(self.folder / f"task_{index}" / "drawn", "shown", {}, remedy=remedy, error=BankError)
