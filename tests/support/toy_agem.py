"""A-GEM bends gradients, in one file (Chaudhry et al., ICLR 2019, arXiv:1812.00420, eq. 11)."""

import torch
from torch.nn import functional as F

from learners.pycil import PyCILLearner
from utils.data.batches import Batches, PairedBatches
from utils.data.images import ImageSet
from utils.data.manager import Task
from utils.training.fit import Step


class AGEM(PyCILLearner):
    """Steps along the gradient nearest to the batch's own that does not raise the loss on the past."""

    accepts = frozenset({"images"})
    uses_exemplars = True

    def batches(self, task: Task) -> Batches:
        """Put a batch of exemplars and replay beside each batch of new images."""
        old = self.memory.images + self.past
        own, reference = (
            self.run.loading(self.transform, self.config.batch_size, task.index, purpose)
            for purpose in ("train", "reference")
        )
        present = self.replay.batches(self.present, ImageSet(), own)
        return PairedBatches(present, self.replay.batches(ImageSet(), old, reference)) if len(old) else present

    def after_backward(self, step: Step) -> None:
        """Project the gradient where it points against that of the past."""
        if step.batch.replay is None:
            return
        old = step.batch.replay
        reference = step.gradient(lambda: F.cross_entropy(self.network(old.images), old.labels))
        pairs = [(own.grad, other) for own, other in zip(step.parameters, reference) if own.grad is not None]
        along = sum((own * other).sum() for own, other in pairs)
        length = sum(other.square().sum() for other in reference)
        factor = torch.where((along < 0) & (length > 0), along / length, torch.zeros_like(along))
        for own, other in pairs:
            own.sub_(factor * other)
