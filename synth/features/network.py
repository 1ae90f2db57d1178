"""Noise predictor for features: a residual MLP that is told time and class."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.training.ledger import counted

TIME_FEATURES = 128  # sines and cosines of the time step


class _Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm, self.told = nn.LayerNorm(width), nn.Linear(width, width)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, h: Tensor, told: Tensor) -> Tensor:
        return h + self.second(F.silu(self.first(self.norm(h)) + self.told(told)))


class FeatureDenoiser(nn.Module):
    """Predicts the noise in standardised features, and holds the statistics that standardise them.

    Args:
        num_features: D.
        num_classes: K.
        width: of the hidden layers.
        blocks: residual blocks.

    Attributes:
        mean, std: float (D,), of the features that it learns.
    """

    def __init__(self, num_features: int, num_classes: int, width: int, blocks: int):
        super().__init__()
        self.num_classes = num_classes
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("std", torch.ones(num_features))
        self.time = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(num_classes + 1, width)  # the last one is no class
        self.first, self.last = nn.Linear(num_features, width), nn.Linear(width, num_features)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(blocks))
        for value in self.last.parameters():
            nn.init.zeros_(value)  # as the last layer of a diffusion UNet starts

    @counted
    def forward(self, xt: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Predict the noise of xt, float (B, D), at times t, int64 (B,), of classes in [0, K) or -1 for none."""
        told = F.silu(self.time(_waves(t)) + self.label(labels % (self.num_classes + 1)))  # -1 becomes K
        h = self.first(xt)
        for block in self.blocks:
            h = block(h, told)
        return self.last(F.silu(h))

    def measure(self, features: Tensor) -> None:
        """Take mean and deviation of features, float (N, D)."""
        self.mean.copy_(features.mean(0))
        self.std.copy_(features.std(0, correction=0))

    def standardise(self, features: Tensor) -> Tensor:
        """Return z = (f - mean) / std; a feature that is constant, as of a dead unit, is 0."""
        return (features - self.mean) / self.std.clamp(min=1e-6)

    def restore(self, z: Tensor) -> Tensor:
        """Return the features of z; a constant one keeps its value, whatever z says."""
        return self.mean + self.std * z


def _waves(t: Tensor) -> Tensor:
    """Sines and cosines of time steps (DDPM, arXiv:2006.11239, appendix B), (B, TIME_FEATURES)."""
    rates = torch.exp(-math.log(1e4) / (TIME_FEATURES // 2) * torch.arange(TIME_FEATURES // 2, device=t.device))
    angles = t[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)
