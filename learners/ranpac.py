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
        width: M, columns of R; None: no projection.
        generator: CPU generator of R, standard normal (D, M).
    """

    def __init__(self, num_features: int, width: int | None, generator: torch.Generator):
        super().__init__(width or num_features)
        drawn = torch.randn(num_features, width, generator=generator) if width else None
        self.register_buffer("projection", drawn)

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
    trains the whole backbone there. Without ``use_RP`` it is ridge regression on the features themselves.
    """

    class Config(SimpleCIL.Config):
        use_RP: bool = Field(True, description="project features at random; false: ridge regression on them alone")
        M: int = Field(10_000, ge=1, le=100_000, description="width of the projection; M^2 numbers are carried on")
        ridge: Factor | None = Field(None, description="null: for each task the best of 1e-8 to 1e8 on a fifth of it")

    def build_head(self, num_features: int) -> Head:
        width = self.config.M if self.config.use_RP else None
        head = ProjectedHead(num_features, width, seeding.generator(self.run.seed, "projection"))
        self.gram = torch.zeros(head.weight.shape[1], head.weight.shape[1], device=self.run.device)  # G, (M, M)
        self.sums = torch.zeros(head.weight.shape[1], 0, device=self.run.device)  # Q, (M, num_seen)
        return head

    @torch.no_grad()
    def after_training(self, task: Task) -> None:
        """Add the task's images to both sums and solve for all class vectors."""
        features = self.network.head.expand(self.extract_features(self.present).to(self.run.device))  # (N, M)
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

    With ``ridge`` 0 and a G of low rank they are those of least length.
    """
    if ridge == 0:
        rounding = len(gram) * torch.finfo(gram.dtype).eps  # of sums in float32
        return (torch.linalg.pinv(gram.double(), rtol=rounding, hermitian=True) @ sums.double()).T.to(gram)
    return torch.linalg.solve(gram.double() + ridge * torch.eye(len(gram)).to(gram), sums.double()).T.to(gram)


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
    # All ridges at once: with H = U S V^T, H (H^T H + r I)^-1 H^T Y is made of S / (S^2 + r).
    u, s, vh = torch.linalg.svd(features[fitted].double(), full_matrices=False)
    inner, outer, wanted = u.T @ targets[fitted].double(), features[held].double() @ vh.T, targets[held].double()
    errors = [(outer @ (s / (s.square() + ridge))[:, None].mul(inner) - wanted).square().mean() for ridge in RIDGES]
    return float(RIDGES[torch.stack(errors).argmin().cpu()])
