"""Geometric augmentation whose parameters the network is told, so that it does not leak into what is drawn.

Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS 2022, arXiv:2206.00364,
appendix F.2, after adaptive discriminator augmentation, arXiv:2006.06676.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 9  # numbers that say how an image was augmented
SCALE, SHIFT = 2**0.2, 1 / 8  # a factor per standard deviation, and a share of the side


class Geometry(NamedTuple):
    """What is done to B images, each float (B,): 0 leaves the image alone."""

    mirror: Tensor  # 0 or 1
    upside_down: Tensor  # 0 or 1
    scale: Tensor  # factor SCALE**scale
    angle: Tensor  # radians
    stretch: Tensor  # factors SCALE**stretch along an axis and SCALE**-stretch across it
    axis: Tensor  # radians
    right: Tensor  # in SHIFT of the width
    down: Tensor  # in SHIFT of the height

    def vector(self) -> Tensor:
        """Return what the network is told, float (B, 9)."""
        columns = (self.mirror, self.upside_down, self.scale, self.angle.cos() - 1, self.angle.sin(),
                   self.stretch * self.axis.cos(), self.stretch * self.axis.sin(), self.right, self.down)  # fmt: skip
        return torch.stack(columns, 1)

    def matrix(self, side: int) -> Tensor:
        """Return what maps a pixel's place to its new one, but for mirrors: (B, 2, 3), outer pixels at -1 and 1."""
        factor, stretch = SCALE**self.scale, SCALE**self.stretch
        along = _diagonal(stretch, 1 / stretch)
        turned = _rotation(self.axis) @ along @ _rotation(-self.axis)
        linear = _diagonal(factor, factor) @ _rotation(-self.angle) @ turned
        shift = 2 * SHIFT * side / (side - 1) * torch.stack([self.right, self.down], 1).unsqueeze(2)
        return torch.cat([linear, linear @ shift], 2)


def draw_geometry(count: int, probability: float) -> Geometry:
    """Draw how ``count`` images are augmented, from the global generator of the CPU.

    Args:
        count: B.
        probability: of each change by itself; a mirror image is shown in half of all cases whatever it is.
    """

    def gated(values: Tensor) -> Tensor:
        return values * (torch.rand(count) < probability)

    def angles() -> Tensor:
        return (torch.rand(count) * 2 - 1) * math.pi

    mirror, upside_down = torch.randint(2, (count,)).float(), gated(torch.randint(2, (count,)).float())
    scale, angle = gated(torch.randn(count)), gated(angles())
    stretch, axis = torch.randn(count), angles()
    stretched, moved = gated(torch.ones(count)), gated(torch.ones(count))
    right, down = torch.randn(count) * moved, torch.randn(count) * moved
    return Geometry(mirror, upside_down, scale, angle, stretch * stretched, axis * stretched, right, down)


def augment(images: Tensor, drawn: Geometry) -> Tensor:
    """Change images as drawn: bicubic, reflected at the border, not clamped.

    Args:
        images: float (B, C, S, S).
        drawn: for each of them, on the CPU.

    Returns:
        (B, C, S, S); an image that is only mirrored keeps its bits.
    """
    matrix = drawn.matrix(images.shape[-1])
    still = torch.eye(2, 3).expand_as(matrix)
    rows = (matrix != still).flatten(1).any(1).nonzero().flatten()
    if len(rows):
        there = rows.to(images.device)
        images = images.index_copy(0, there, _warp(images[there], matrix[rows]))
    for flags, axis in ((drawn.upside_down, -2), (drawn.mirror, -1)):  # last, as in the product of all matrices
        flipped = flags.bool().to(images.device).view(-1, 1, 1, 1)
        images = torch.where(flipped, images.flip(axis), images)
    return images


def _warp(images: Tensor, matrix: Tensor) -> Tensor:
    """Look up each new place where it came from."""
    linear, shift = matrix.split([2, 1], 2)
    inverse = torch.linalg.inv(linear)
    back = torch.cat([inverse, -inverse @ shift], 2).to(images.device)
    grid = F.affine_grid(back, list(images.shape), align_corners=True)
    return F.grid_sample(images, grid, "bicubic", "reflection", align_corners=True)


def _rotation(angle: Tensor) -> Tensor:
    sine, cosine = angle.sin(), angle.cos()
    return torch.stack([cosine, -sine, sine, cosine], 1).view(-1, 2, 2)


def _diagonal(first: Tensor, second: Tensor) -> Tensor:
    return torch.diag_embed(torch.stack([first, second], 1))
