"""A-GEM: no step may raise the loss on what is remembered."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from learners import LEARNERS
from learners.er import ER, targets
from utils.data.batches import Batch
from utils.data.manager import Task
from utils.run.config import BatchSize, PerClass, Rate
from utils.training.fit import Step


@LEARNERS.register("agem")
class AGEM(ER):
    """Steps along the gradient nearest to the new images' own that does not raise the loss on remembered ones.

    Chaudhry et al., "Efficient Lifelong Learning with A-GEM", ICLR 2019, arXiv:1812.00420, Eq. 11, with its 13 images
    per class. ``buffer: reservoir`` with ``memory_size`` is Mammoth's A-GEM-R. The constraint is one on the gradient:
    with momentum the step itself may still raise that loss.
    """

    class Config(ER.Config):
        init_lr: Rate = Field(0.03, description="learning rate of the first task")
        lrate: Rate = Field(0.03, description="learning rate of later tasks")
        memory_batch_size: BatchSize = Field(256, description="remembered images that a gradient is compared with")
        memory_per_class: PerClass = Field(13, description="images remembered per class, where fixed_memory is true")
        fixed_memory: bool = Field(True, description="true: a fixed number per class; false: a fixed total")
        buffer: Literal["reservoir", "balanced"] = Field("balanced", description="see `er`")

        @classmethod
        def translate(cls, raw: dict[str, Any]) -> dict[str, Any]:
            """Read a total alone, such as Mammoth's buffer_size, as what is meant."""
            own = super().translate(raw)
            return {"fixed_memory": own.get("memory_size") is None or own.get("memory_per_class") is not None, **own}

    def compute_loss(self, batch: Batch, task: Task) -> dict[str, Tensor]:
        return {"cross_entropy": F.cross_entropy(self.network(batch.images), targets(batch))}

    def after_backward(self, step: Step) -> None:
        """Bend the gradient where it points against that of the past."""
        if (old := step.batch.replay) is None:
            return
        reference = step.gradient(lambda: F.cross_entropy(self.network(old.images), targets(old)))
        pairs = [(own.grad, other) for own, other in zip(step.parameters, reference) if own.grad is not None]
        project([own for own, _ in pairs], [other for _, other in pairs])


def project(gradient: list[Tensor], reference: list[Tensor]) -> None:
    """Subtract g.r / r.r times r from g where g.r < 0 (A-GEM, Eq. 11), in place; a reference of 0 changes nothing.

    Args:
        gradient: g, one tensor per parameter.
        reference: r, of the same shapes.
    """
    along = sum((g * r).sum() for g, r in zip(gradient, reference))
    length = sum(r.square().sum() for r in reference)
    factor = torch.where((along < 0) & (length > 0), along / length, torch.zeros_like(along))
    for g, r in zip(gradient, reference):
        g.sub_(factor * r)
