"""The denoiser before a task, which says what the one after it should predict of the old classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from synth.diffusion import Objective, Process, draw_noised, thin_at_random
from synth.samplers import sample_ddim


class Noised(NamedTuple):
    """Rows of one training step.

    Attributes:
        xt: noisy images, (B, C, H, W).
        t: original time steps, int64 (B,).
        labels: int64 (B,), -1 where the label is hidden.
        target: what the network is to predict, (B, C, H, W).
    """

    xt: Tensor
    t: Tensor
    labels: Tensor
    target: Tensor

    def __add__(self, other: Noised) -> Noised:
        return Noised(*map(torch.cat, zip(self, other)))


@dataclass(frozen=True)
class Teacher:
    """Distils a denoiser into the next one (Masip et al. 2023, arXiv:2311.14028).

    Attributes:
        network: (xt, t, labels) to what ``objective`` says; it is not trained.
        objective: of the network.
        process: on which times the next one is trained.
        alpha_bar: of every original time step, on the device.
        classes: that the network has learned.
        image_shape: (C, H, W).
        steps: DDIM steps of what it draws itself, clamped or not.
        clip: clamp the predicted images.
        count: rows that it adds to every step; 0: it judges the replay in the batch.
        whole_chain: its rows are all states of a chain of drawing, and not its end noised anew.
    """

    network: nn.Module
    objective: Objective
    process: Process
    alpha_bar: Tensor
    classes: list[int]
    image_shape: tuple[int, int, int]
    steps: int
    clip: bool
    count: int
    whole_chain: bool

    @torch.no_grad()
    def teach(self, rows: Noised, is_replay: Tensor) -> Noised:
        """Return the rows of a step with its word as the target of all that is old.

        Draws from the global random generators where it adds rows.

        Args:
            rows: of the batch.
            is_replay: bool (B,).
        """
        if self.count:
            return rows + (self.states() if self.whole_chain else self.images())
        old = is_replay.nonzero()[:, 0]
        if not len(old):  # by chance none is: a network need not take an empty batch
            return rows
        said = self.say(rows.xt[old], rows.t[old], rows.labels[old])
        return rows._replace(target=rows.target.index_copy(0, old, said))

    def say(self, xt: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Return the network's output as float32."""
        return self.network(xt, t, labels).float()

    def images(self) -> Noised:
        """Draw images, noise them to uniform times, and say what is in them."""
        labels = self.draw_labels(self.count)
        xt, t, _ = draw_noised(self.process, self.draw(labels, []))
        return Noised(xt, t, labels, self.say(xt, t, labels))

    def states(self) -> Noised:
        """Draw images, and return what was noisy on the way to them, with what was said of it there."""
        labels, seen = self.draw_labels(-(-self.count // self.steps)), []
        self.draw(labels, seen)
        # By chain, so that what is too much is the end of one.
        return Noised(*(torch.stack(part, 1).flatten(0, 1)[: self.count] for part in zip(*seen)))

    def draw_labels(self, count: int) -> Tensor:
        """Draw one of its classes for each row, int64 (count,)."""
        return torch.tensor(self.classes)[torch.randint(len(self.classes), (count,))].to(self.alpha_bar.device)

    def draw(self, labels: Tensor, seen: list[Noised]) -> Tensor:
        """Draw an image of each label; the states on the way to them go into ``seen``."""

        def model(xt: Tensor, t: Tensor) -> Tensor:
            seen.append(Noised(xt, t, labels, self.say(xt, t, labels)))
            return self.objective.noise(seen[-1].target, xt, self.alpha_bar[t])

        noise = torch.randn(len(labels), *self.image_shape, device=labels.device)
        return sample_ddim(model, noise, thin_at_random(self.process, self.steps), clip=self.clip)
