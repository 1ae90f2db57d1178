"""Task arithmetic: every task moves the same first weights on its own, and the moves are added up."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.optim.swa_utils import update_bn

from learners import LEARNERS
from learners.pycil import PyCILLearner
from utils.data.batches import Batch, test_batches
from utils.data.manager import Task
from utils.run.carried import Carried
from utils.run.config import Factor
from utils.run.errors import ConfigError
from utils.run.files import flatten, nest
from utils.run.log import log

Weights = dict[str, Tensor]  # by name


def subtract(weights: Weights, theta_0: Weights) -> Weights:
    """Return a task vector, theta_t - theta_0, over the entries of ``weights``."""
    return {name: value - theta_0[name] for name, value in weights.items()}


def add(vectors: list[Weights]) -> Weights:
    """Return the sum of task vectors."""
    return {name: sum(vector[name] for vector in vectors) for name in vectors[0]}


def ties(vectors: list[Weights], keep: float) -> Weights:
    """Merge task vectors by trimming, electing signs and averaging what agrees (TIES, arXiv:2306.01708, Algorithm 1).

    Args:
        vectors: of T tasks.
        keep: share of each vector's entries that is kept, those of the largest magnitude.
    """
    # By name: one that was read from a file has its entries in another order than one of the network.
    flat = torch.stack([torch.cat([vector[name].flatten() for name in vectors[0]]) for vector in vectors])  # (T, P)
    count = max(1, round(keep * flat.shape[1]))
    smallest = flat.abs().kthvalue(flat.shape[1] - count + 1, dim=1, keepdim=True).values
    flat = flat.where(flat.abs() >= smallest, torch.zeros_like(flat))
    agree = (flat != 0) & (flat.sign() == flat.sum(0).sign())  # (T, P)
    merged = (flat * agree).sum(0) / agree.sum(0).clamp(min=1)  # (P,)
    pieces = merged.split([value.numel() for value in vectors[0].values()])
    return {name: piece.view_as(value) for (name, value), piece in zip(vectors[0].items(), pieces)}


def move(theta_0: Weights, vector: Weights, scaling: float) -> Weights:
    """Return theta_0 + scaling * vector, over the entries of the vector."""
    return {name: theta_0[name] + scaling * value for name, value in vector.items()}


@LEARNERS.register("task_arithmetic")
class TaskArithmetic(PyCILLearner):
    """Backbones fine-tuned on a task each from the same weights, merged as theta_0 + lambda sum_t (theta_t - theta_0).

    Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023, arXiv:2212.04089; ``merge: ties`` trims and elects
    signs first (Yadav et al., "TIES-Merging", NeurIPS 2023, arXiv:2306.01708), ``merge: average`` has lambda = 1 / T.
    Heads are not merged: each class keeps the row that its own task trained. Between tasks a run carries theta_0, the
    rows and every task's vector.
    """

    class Config(PyCILLearner.Config):
        anchor: Literal["start", "first_task"] = Field(
            "start", description="theta_0: start: the network as it was built; first_task: as the first task left it"
        )
        merge: Literal["sum", "average", "ties"] = Field("sum", description="how task vectors become one")
        scaling: Factor | Literal["val"] = Field(0.25, description="lambda; val: the best of 0 to 1 on val_share")
        ties_keep: float = Field(0.2, gt=0, le=1, description="share of a vector that ties keeps, its largest entries")
        own_classes: bool = Field(True, description="train without replay among a task's own classes; false: all seen")
        reestimate_bn: bool = Field(True, description="BatchNorm's statistics anew for the merged network")

    accepts = frozenset({"images"})  # a merged backbone is shown them again, and its features are others

    def __init__(self, config, data, run, replay):
        super().__init__(config, data, run, replay)
        if config.scaling == "val" and config.merge != "average" and not len(data.val_images(data.task(0).classes)):
            why = f"val_share={config.val_share:g} holds no image of the first task out: raise it, or give a number"
            raise ConfigError(f"scaling='val' chooses lambda on held-out images, and {why}")
        self.theta_0: Weights = {}
        self.vectors: list[Weights] = []

    # ------------------------------------------------------------------ hooks

    def before_training(self, task: Task) -> None:
        """Go back to theta_0; the rows of the head stay."""
        if not self.theta_0:
            self.theta_0 = self._backbone()
        self.network.backbone.load_state_dict(self.theta_0)

    def compute_loss(self, batch: Batch, task: Task) -> dict[str, Tensor]:
        logits, targets = self.network(batch.images), batch.labels
        if batch.soft_targets is not None:
            targets = F.pad(batch.soft_targets, (0, task.num_seen - batch.soft_targets.shape[1]))
        if self.config.own_classes and not len(self.past):
            logits = logits[:, task.num_old :]
            targets = targets - task.num_old if batch.soft_targets is None else targets[:, task.num_old :]
        return {"cross_entropy": F.cross_entropy(logits, targets)}

    def train(self, task: Task) -> None:
        """Train; rows of old classes are theirs again afterwards."""
        head = [value.detach().clone() for value in self.network.head.parameters()]
        super().train(task)
        with torch.no_grad():
            for value, before in zip(self.network.head.parameters(), head):
                value[: task.num_old] = before[: task.num_old]

    def after_training(self, task: Task) -> None:
        """Note this task's vector and merge all of them."""
        if task.index == 0 and self.config.anchor == "first_task":
            self.theta_0 = self._backbone()
            return
        # Without buffers: integers cannot be scaled, and a sum of moves of a variance may make it negative.
        moved = {name: value.detach().clone() for name, value in self.network.backbone.named_parameters()}
        self.vectors.append(subtract(moved, self.theta_0))
        scaling = 1 / len(self.vectors) if self.config.merge == "average" else self.config.scaling
        if scaling == "val":
            with self.run.timed("evaluate"):
                scaling = self._choose(task)
        self._merge(scaling)

    # ------------------------------------------------------------------ merging

    def _merge(self, scaling: float) -> None:
        """Put the merged backbone into the network."""
        total = ties(self.vectors, self.config.ties_keep) if self.config.merge == "ties" else add(self.vectors)
        self.network.backbone.load_state_dict(self.theta_0 | move(self.theta_0, total, scaling))
        if self.config.reestimate_bn:
            shown = test_batches(self.present + self.past, self.transform, 256, self.run.device, self.run.num_workers)
            update_bn((images for images in shown if len(images) > 1), self.network)  # one has no variance
            self.network.eval()

    def _choose(self, task: Task) -> float:
        """Return the scaling with most held-out images of all seen classes right; the smaller one of equals."""
        images, rights = self.data.val_images(range(task.num_seen)), {}
        for step in range(21):
            self._merge(step / 20)
            rights[step / 20] = int((self.predict(images)["cnn"].argmax(1) == images.labels).sum())
        best = max(rights, key=rights.get)
        log.info("Task %d: scaling %.2f, with %d of %d held-out images right", task.index, best, rights[best],
                 len(images))  # fmt: skip
        return best

    def _backbone(self) -> Weights:
        return {name: value.detach().clone() for name, value in self.network.backbone.state_dict().items()}

    # ------------------------------------------------------------------ keeping

    def extra_state(self) -> dict[str, Tensor]:
        return flatten({"theta_0": self.theta_0, **dict(enumerate(self.vectors))})

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        parts = nest({name: value.to(self.run.device) for name, value in state.items()})
        self.theta_0 = parts.pop("theta_0", {})
        self.vectors = [parts[str(index)] for index in range(len(parts))]

    def carried(self) -> list[Carried]:
        """Name first weights and vectors apart."""
        return [Carried("task_vectors", ("extra.safetensors",)), *super().carried()]
