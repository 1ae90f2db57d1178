"""Experience replay of a stream: in every step a batch of new images and a batch of remembered ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from learners import LEARNERS
from learners.memory import reservoir_slots
from learners.pycil import PyCILLearner
from utils.data.batches import Batch, Batches, ImageBatches, PairedBatches, ShuffledBatches
from utils.data.images import ImageSet
from utils.data.manager import Task
from utils.run.config import BatchSize, Decay
from utils.run.words import put_once
from utils.training import seeding

# Mammoth's and Avalanche's names; some stand for a number that is here twice: for the first task and for later ones,
# or for new images and remembered ones.
WORDS = {"lr": ("init_lr", "lrate"), "n_epochs": ("init_epoch", "epochs"), "train_epochs": ("init_epoch", "epochs"),
         "optim_wd": ("init_weight_decay", "weight_decay"), "optim_mom": ("momentum",), "buffer_size": ("memory_size",),
         "mem_size": ("memory_size",), "minibatch_size": ("memory_batch_size",),
         "train_mb_size": ("batch_size", "memory_batch_size")}  # fmt: skip


class ReservoirBatches(Batches):
    """Batches of a stream, each with a batch of what a reservoir holds beside it (`Batch.replay`).

    A sample of the stream is offered to the reservoir whenever it was shown, as in Mammoth, so that one that is shown
    in several epochs may fill several places. The first step of the first task has nothing beside it.

    Args:
        stream: batches of the N new samples.
        pool: the same samples, then those remembered of earlier tasks, then those that are always there.
        held: rows of ``pool`` in the reservoir.
        always: rows of ``pool`` that are drawn like those in the reservoir and never leave.
        size: places in the reservoir.
        offered: samples that it was offered before.
    """

    def __init__(
        self, stream: ShuffledBatches, pool: ImageBatches, held: range, always: range, size: int, offered: int
    ):
        self.stream, self.pool, self.size = stream, pool, size
        self.held, self.always = (torch.tensor(rows, dtype=torch.int64) for rows in (held, always))
        self.offered = offered

    def __len__(self) -> int:
        return len(self.stream)

    def state_dict(self) -> dict[str, Any]:
        return {"held": self.held, "offered": self.offered}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.held, self.offered = state["held"], state["offered"]

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        key, rank = self.pool.loading.key, self.pool.loading.shard[0]
        # What is drawn does not depend on the training, so that workers may load it ahead.
        drawn, states = zip(*self._foresee(epoch, start))
        shown = {step: self.pool.share(rows) for step, rows in enumerate(drawn, start) if len(rows)}
        generators = (seeding.generator(*key, "augment", epoch, step, rank) for step in shown)
        beside = self.pool.batches(epoch, list(shown.values()), generators)
        for step, (batch, state) in enumerate(zip(self.stream.epoch(epoch, start), states), start):
            self.load_state_dict(state)
            yield replace(batch, replay=next(beside)) if step in shown else batch

    def _foresee(self, epoch: int, start: int) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Yield the rows that each step of an epoch draws, and the state after it."""
        held, offered = self.held.tolist(), self.offered
        for step, pick in list(enumerate(self.stream.picks(epoch)))[start:]:
            generator = seeding.generator(*self.pool.loading.key, "reservoir", epoch, step)
            rows = torch.cat([torch.tensor(held, dtype=torch.int64), self.always])
            drawn = rows[torch.randperm(len(rows), generator=generator)[: self.pool.loading.batch_size]]
            for item, slot in reservoir_slots(offered, len(pick), self.size, generator):
                held[slot : slot + 1] = [int(pick[item])]  # a slot at the end appends
            offered += len(pick)
            yield drawn, {"held": torch.tensor(held, dtype=torch.int64), "offered": offered}


@LEARNERS.register("er")
class ER(PyCILLearner):
    """Cross-entropy over all seen classes on a batch of new images and a batch of remembered ones, in one forward.

    Riemer et al., "Learning to Learn without Forgetting", ICLR 2019, arXiv:1810.11910; Chaudhry et al., "On Tiny
    Episodic Memories in Continual Learning", 2019, arXiv:1902.10486. With ``buffer: reservoir`` as in Mammoth (Buzzega
    et al., NeurIPS 2020, arXiv:2004.07211), whose CIFAR-10 settings are the defaults; with ``buffer: balanced`` as in
    Avalanche (Lomonaco et al., 2021). Generated samples of the past are remembered ones that never leave.
    """

    class Config(PyCILLearner.Config):
        init_epoch: int = Field(50, ge=1, description="epochs of the first task")
        epochs: int = Field(50, ge=1, description="epochs of every later task")
        batch_size: BatchSize = Field(32, description="new images per step")
        memory_batch_size: BatchSize = Field(32, description="remembered images beside them")
        scheduler: Literal["steplr", "cosine", "constant"] = Field("constant", description="of the learning rate")
        momentum: float = Field(0.0, ge=0, lt=1, description="of SGD")
        init_weight_decay: Decay = Field(0.0, description="weight decay of the first task")
        weight_decay: Decay = Field(0.0, description="weight decay of later tasks")
        memory_size: int = Field(200, ge=0, description="images remembered in all")
        buffer: Literal["reservoir", "balanced"] = Field(
            "reservoir", description="reservoir: of all images shown, in every step; balanced: equal random shares of "
            "the tasks, after each; with fixed_memory, memory_per_class random ones of each class"
        )  # fmt: skip

        @classmethod
        def translate(cls, raw: dict[str, Any]) -> dict[str, Any]:
            """Read Mammoth's and Avalanche's names.

            Raises:
                ConfigError: if one of ours beside them says otherwise.
            """
            own = {key: value for key, value in raw.items() if key not in WORDS}
            for word in (word for word in WORDS if raw.get(word) is not None):
                for key in WORDS[word]:
                    put_once(own, key, raw[word], f"{word}={raw[word]!r}", key)
            return own

    shares_first_task = False  # it may remember in the first task already
    accepts = frozenset({"images"})
    uses_exemplars = True
    num_offered = 0  # images that the reservoir was offered so far
    counters = ("num_offered",)

    def batches(self, task: Task) -> Batches:
        """Put a batch of what is remembered, and of replay, beside each batch of the stream."""
        config, kept = self.config, self.memory.images
        own = self.run.loading(self.transform, config.batch_size, task.index, "train", network=self.network)
        alone = None if config.buffer == "reservoir" else self.network  # sees a batch of memory without others
        beside = self.run.loading(self.transform, config.memory_batch_size, task.index, "memory", network=alone)
        stream = self.replay.batches(self.present, ImageSet(), own)
        if config.buffer == "reservoir":
            first, end = len(self.present), len(self.present) + len(kept)
            pool = ImageBatches(self.present + kept, self.past, beside)
            size = self.memory.per_class * task.num_seen if self.memory.fixed else self.memory.size
            always = range(end, end + len(self.past))
            self.stream = ReservoirBatches(stream, pool, range(first, end), always, size, self.num_offered)
            return self.stream
        if not len(kept) + len(self.past):
            return stream
        return PairedBatches(stream, self.replay.batches(kept, self.past, beside))

    def compute_loss(self, batch: Batch, task: Task) -> dict[str, Tensor]:
        parts = [batch] if batch.replay is None else [batch, batch.replay]
        logits = self.network(torch.cat([part.images for part in parts])).split(list(map(len, parts)))
        losses = (F.cross_entropy(own, targets(part), reduction="sum") for own, part in zip(logits, parts))
        return {"cross_entropy": sum(losses) / sum(map(len, parts))}  # every image counts the same

    def after_training(self, task: Task) -> None:
        if self.config.buffer == "reservoir":
            self.memory.images = (self.present + self.memory.images).take(self.stream.held)
            self.num_offered = self.stream.offered
            return
        fixed, memory, num_tasks = self.memory.fixed, self.memory, task.index + 1
        shares = [memory.per_class] * task.num_seen if fixed else self.shares(memory.size, num_tasks)
        tasks = [self.data.task(index).classes for index in range(num_tasks)]
        held, kept = memory.images + self.present, ImageSet()
        for index, classes in enumerate([[label] for label in range(task.num_seen)] if fixed else tasks):
            group, key = held.select(classes), (self.run.seed, task.index, "memory", index)
            kept = kept + group.take(torch.randperm(len(group), generator=seeding.generator(*key))[: shares[index]])
        memory.images = kept

    @staticmethod
    def shares(size: int, num_tasks: int) -> list[int]:
        """Divide places among tasks: 200 among three are 67, 67 and 66."""
        return [size // num_tasks + (index < size % num_tasks) for index in range(num_tasks)]


def targets(batch: Batch) -> Tensor:
    """Return what cross-entropy compares with: distributions over the classes where there are some, else labels."""
    return batch.labels if batch.soft_targets is None else batch.soft_targets
