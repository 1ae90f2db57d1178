"""RanPAC: ridge regression on random projections of frozen features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from learners import LEARNERS
from learners.simplecil import SimpleCIL
from models.heads import Head
from utils.data.manager import Task
from utils.run.config import Factor
from utils.run.log import log
from utils.training import seeding

RIDGES = torch.logspace(-8, 8, 17, dtype=torch.float64)
SHARE_FITTED = 0.8  # of a task's images, while the ridge is chosen by the others


class ProjectedHead(Head):
    """logits = W relu(f R) with a random R that stays; W f without one.

    Args:
        num_features: D.
        width: M, columns of R; 0: no projection.
        generator: CPU generator of R, standard normal (D, M).
    """

    def __init__(self, num_features: int, width: int, generator: torch.Generator):
        super().__init__(width or num_features)
        self.register_buffer("projection", torch.randn(num_features, width, generator=generator) if width else None)

    @property
    def num_features(self) -> int:
        return self.weight.shape[1] if self.projection is None else self.projection.shape[0]

    def expand(self, features: Tensor) -> Tensor:
        """Map features (B, D) to those that the class vectors see, (B, M)."""
        return features if self.projection is None else torch.relu(features @ self.projection)

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(self.expand(features), self.weight)


@LEARNERS.register("ranpac")
class RanPAC(SimpleCIL):
    """Class vectors in closed form, W = (G + ridge I)^-1 Q, of sums that no later task has to see again.

    McDonnell et al., "RanPAC: Random Projections and Pre-trained Models for Continual Learning", NeurIPS 2023,
    arXiv:2307.02251, section 4 and Algorithm 1: G sums h h^T and Q sums h y^T over all images of all tasks, where
    h = relu(f R). Its first phase, parameter-efficient tuning on the first task, is left out; ``pretrain_epochs``
    trains the whole backbone there. With ``M`` 0 it is ridge regression on the features themselves.
    """

    class Config(SimpleCIL.Config):
        M: int = Field(10_000, ge=0, le=100_000, description="width of the projection; M^2 numbers stay; 0: none")
        ridge: Factor | None = Field(None, description="null: for each task the best of 1e-8 to 1e8 on a fifth of it")

    def build_head(self, num_features: int) -> Head:
        head = ProjectedHead(num_features, self.config.M, seeding.generator(self.run.seed, "projection"))
        self.gram = torch.zeros(head.weight.shape[1], head.weight.shape[1], device=self.run.device)  # G, (M, M)
        self.sums = torch.zeros(head.weight.shape[1], 0, device=self.run.device)  # Q, (M, num_seen)
        return head

    @torch.no_grad()
    def after_training(self, task: Task) -> None:
        """Add the task's images to both sums and solve for all class vectors."""
        features = self.network.head.expand(self.extract_features(self.present).to(self.run.device))  # (N, M)
        if self.run.ledger.foresees:
            return
        targets = F.one_hot(self.present.labels, task.num_seen).to(features)
        self.gram += features.T @ features
        self.sums = F.pad(self.sums, (0, task.num_seen - self.sums.shape[1])) + features.T @ targets
        ridge = self.config.ridge
        if ridge is None:
            ridge = best_ridge(features, targets, seeding.generator(self.run.seed, task.index, "ridge"))
            log.info("Ridge: %.0e, the best on a fifth of the task's images", ridge)
        self.network.head.weight.copy_(solve_ridge(self.gram, self.sums, ridge))

    def extra_state(self) -> dict[str, Tensor]:
        """Return both sums."""
        return {"gram": self.gram, "sums": self.sums}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        self.gram, self.sums = (state[name].to(self.run.device) for name in ("gram", "sums"))


def solve_ridge(gram: Tensor, sums: Tensor, ridge: float) -> Tensor:
    """Return class vectors (C, M), solved in float64, from G (M, M) and Q (M, C).

    A ridge below what rounding leaves of G, a sum in float32, is raised to that.
    """
    ridge = max(ridge, rounding_of(gram.trace(), gram.dtype))
    return torch.linalg.solve(gram.double() + ridge * torch.eye(len(gram)).to(gram), sums.double()).T.to(gram)


def rounding_of(trace: Tensor, dtype: torch.dtype) -> float:
    """Return how large the eigenvalues may be that are nothing but rounding, in a sum of products with this trace."""
    return float(trace) * torch.finfo(dtype).eps


def best_ridge(features: Tensor, targets: Tensor, generator: torch.Generator) -> float:
    """Return that of `RIDGES` which has the least squared error on a fifth of the images, fitted on the others.

    Args:
        features: (N, M), N > 0; of one image, it is fitted and judged on the same.
        targets: (N, C), one-hot.
        generator: CPU generator of the split.
    """
    order = torch.randperm(len(features), generator=generator).to(features.device)
    cut = max(1, int(SHARE_FITTED * len(order)))
    fitted, held = order[:cut], order[cut:] if cut < len(order) else order
    h, y, outer = features[fitted].double(), targets[fitted].double(), features[held].double()
    least = rounding_of(h.square().sum(), features.dtype)
    # All ridges by one decomposition of the smaller of H^T H and H H^T: (H^T H + r I)^-1 H^T = H^T (H H^T + r I)^-1.
    if len(h) < h.shape[1]:
        values, vectors = torch.linalg.eigh(h @ h.T)
        outer, inner = outer @ h.T @ vectors, vectors.T @ y
    else:
        values, vectors = torch.linalg.eigh(h.T @ h)
        outer, inner = outer @ vectors, vectors.T @ (h.T @ y)
    wanted, errors = targets[held].double(), []
    for ridge in RIDGES.tolist():
        predicted = (outer / (values.clamp(min=0) + max(ridge, least))) @ inner
        errors.append((predicted - wanted).square().mean())
    return float(RIDGES[torch.stack(errors).argmin().cpu()])
