"""FeCAM: Mahalanobis distances to class means under a covariance of every class, on frozen features."""

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


class MahalanobisHead(Head):
    """logits = -(u - m)^T S^-1 (u - m); u and m of length 1, S of every class, shrunk and scaled to correlations.

    Attributes:
        weight: class means (C, D).
        covariance: float (C, D, D) as measured; (1, D, D), the mean over classes, if they share one.
        power: of Tukey's transform, f^power; 1 leaves features as they are.

    Args:
        num_features: D.
        shrinkage: what is added, as parts of the mean variance to the diagonal and of the mean covariance off it.
        correlations: divide by the standard deviations.
        per_class: False: all classes share one covariance.
    """

    def __init__(self, num_features: int, shrinkage: tuple[float, float], correlations: bool, per_class: bool):
        super().__init__(num_features)
        self.shrinkage, self.correlations, self.per_class = shrinkage, correlations, per_class
        self.register_buffer("covariance", torch.empty(0, num_features, num_features))
        self.register_buffer("power", torch.ones(()))
        self.inverses: dict[int, Tensor] = {}  # by row of ``covariance``, for as long as that stays

    def grow(self, num_classes: int, generator: torch.Generator | None = None) -> None:
        """Add means and covariances up to a total of ``num_classes``; see `Head.grow`."""
        super().grow(num_classes, generator)
        missing = (num_classes if self.per_class else 1) - len(self.covariance)
        self.covariance = F.pad(self.covariance, (0, 0, 0, 0, 0, missing))

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, D) to negative squared distances (B, num_classes)."""
        unit, distances = F.normalize(self.transformed(features)), []
        for label, mean in enumerate(F.normalize(self.weight)):
            apart = unit - mean
            distances.append(((apart @ self.inverse(label if self.per_class else 0)) * apart).sum(1))
        return -torch.stack(distances, dim=1)

    def transformed(self, features: Tensor) -> Tensor:
        """Return features (B, D) under Tukey's transform."""
        return features if self.power == 1 else features.clamp(min=0) ** self.power

    def inverse(self, row: int) -> Tensor:
        """Return the inverse (D, D) of a covariance as it is used, computed in float64 when it is first asked for."""
        if row not in self.inverses:
            used, kind = shrunk(self.covariance[row].double(), *self.shrinkage), torch.finfo(self.covariance.dtype)
            if self.correlations:
                spread = used.diagonal().clamp(min=kind.tiny).sqrt()
                used = used / torch.outer(spread, spread)
            # What is smaller was measured as nothing but rounding.
            inverse = torch.linalg.pinv(used, rtol=len(used) * kind.eps, hermitian=True)
            self.inverses[row] = inverse.to(self.covariance)
        return self.inverses[row]

    def set_covariance(self, row: int, covariance: Tensor) -> None:
        """Take a covariance (D, D)."""
        self.covariance[row] = covariance
        self.inverses.pop(row, None)


def shrunk(covariance: Tensor, diagonal: float, off_diagonal: float) -> Tensor:
    """Add parts of the mean variance to the diagonal and of the mean covariance off it; (D, D)."""
    eye = torch.eye(len(covariance)).to(covariance)
    variance, pairs = covariance.diagonal().mean(), len(covariance) * (len(covariance) - 1)
    mean_covariance = (covariance.sum() - covariance.diagonal().sum()) / max(pairs, 1)
    return covariance + diagonal * variance * eye + off_diagonal * mean_covariance * (1 - eye)


@LEARNERS.register("fecam")
class FeCAM(SimpleCIL):
    """A class is the mean and the covariance of its features; nothing but perhaps the first task is trained.

    Goswami et al., "FeCAM: Exploiting the Heterogeneity of Class Distributions in Exemplar-Free Continual Learning",
    NeurIPS 2023, arXiv:2309.14062, section 4: covariance shrinkage, normalisation to correlations, Tukey's transform.
    A class of one image has no covariance and takes the mean of all others.
    """

    class Config(SimpleCIL.Config):
        tukey: bool = Field(True, description="transform features by a power, where none of the first task is negative")
        beta: float = Field(0.5, gt=0, le=10, description="that power")
        shrink: bool = Field(True, description="add to covariances what makes them invertible")
        alpha1: Factor = Field(1.0, description="part of the mean variance that shrink adds to the diagonal")
        alpha2: Factor = Field(1.0, description="part of the mean covariance that shrink adds off it")
        norm_cov: bool = Field(True, description="use correlations instead of covariances")
        per_class: bool = Field(True, description="false: all classes share the mean covariance")

    def build_head(self, num_features: int) -> Head:
        config = self.config
        shrinkage = (config.alpha1, config.alpha2) if config.shrink else (0.0, 0.0)
        return MahalanobisHead(num_features, shrinkage, config.norm_cov, config.per_class)

    @torch.no_grad()
    def after_training(self, task: Task) -> None:
        """Measure means and covariances of the present."""
        head, features = self.network.head, self.extract_features(self.present).to(self.run.device)
        if task.index == 0 and self.config.tukey:
            if negative := bool((features < 0).any()):
                log.info("tukey does nothing: some features are negative, as those of a ViT are")
            head.power.fill_(1.0 if negative else self.config.beta)
        features, labels = head.transformed(features), self.present.labels.to(self.run.device)
        own = {label: features[labels == label] for label in self.present.classes}
        head.weight[list(own)] = torch.stack([rows.mean(0) for rows in own.values()])
        self.set_covariances({label: rows.T.cov() for label, rows in own.items() if len(rows) > 1}, task)

    def set_covariances(self, measured: dict[int, Tensor], task: Task) -> None:
        """Keep the covariances of new classes, or bring the one that all share up to date."""
        head, single = self.network.head, [label for label in self.present.classes if label not in measured]
        if single:
            log.warning("Classes of one image have no covariance and take the mean of all others: %s", single)
            old = head.covariance[: task.num_old] if self.config.per_class else head.covariance[: task.num_old > 0]
            mean = _mean([*old, *measured.values()], head.covariance)
            measured = {**dict.fromkeys(single, mean), **measured}
        if self.config.per_class:
            for label, covariance in measured.items():
                head.set_covariance(label, covariance)
        else:
            new, share = torch.stack(list(measured.values())).mean(0), len(measured) / task.num_seen
            head.set_covariance(0, head.covariance[0] + (new - head.covariance[0]) * share)


def _mean(covariances: list[Tensor], like: Tensor) -> Tensor:
    """Return the mean (D, D); the identity if there are none."""
    return torch.stack(covariances).mean(0) if covariances else torch.eye(like.shape[1]).to(like)
