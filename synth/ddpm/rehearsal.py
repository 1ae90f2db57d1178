"""What a DDPM draws of old classes for its own training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from synth.ddpm.config import DDPMConfig
from synth.drawing import ImageFolder
from synth.requests import Requests, draw_labels
from utils.data.images import ImageSet
from utils.data.manager import Task
from utils.run.log import log
from utils.training import seeding

if TYPE_CHECKING:
    from synth.ddpm.source import DDPM


def num_rehearsed(config: DDPMConfig, index: int, num_images: int) -> int:
    """Count the images that a DDPM draws for its training on a task with so many real ones, if it draws its own."""
    count = (config.gr_n_generated_examples_per_task or num_images) * index
    if count and config.counts == "reference":
        # GUIDE draws batch after batch, whole ones, and where it needs less than one, a smaller one.
        count += -count % min(config.batch_size, count)
    return count


def rehearse(source: DDPM, task: Task, num_images: int) -> ImageSet:
    """Draw old classes: for a teacher, or from the raw weights into the run's `rehearsal/task_<t>`, as GUIDE does.

    Args:
        source: that is about to learn.
        task: the new one.
        num_images: of the task, in place of the key that says how many are drawn.
    """
    config, old = source.config, sorted(source.fitted_classes)
    count = num_rehearsed(config, task.index, num_images)
    chance = seeding.generator(source.run.seed, task.index, "rehearsal")
    labels = draw_labels(old, count, chance, balanced=config.counts == "balanced")
    log.info("Task %d: the generator rehearses on %d images of its own", task.index, count)
    asked = Requests.of_labels(labels, (source.run.seed, "ddpm-rehearsal", task.index))
    if config.rehearsal == "distil" or source.run.ledger.foresees:  # nothing is written to plan a run
        with source.run.timed("rehearse"):
            return source.draw(asked, source.rehearsal_sampling)
    source.generator = source.network.eval()
    identity = {"run_seed": source.run.seed, "task": task.index, "count": count, "weights": source.fingerprint()}
    remedy = "Delete the folder, and the same command draws it again"
    folder = ImageFolder(source.run.folder / "rehearsal" / f"task_{task.index}", source.run, identity, remedy)
    folder.claim()
    with source.run.timed("rehearse"):
        folder.draw(source, [asked])
    return sum(map(folder.images, old), ImageSet()).merged()
