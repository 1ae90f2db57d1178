"""The parts of a latent diffusion model's work: cached latents in batches, the training loss, sampling."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from models.latent.contract import LatentDiffusion
from synth.diffusion import Model
from utils.data.batches import Batch, Loading, ShuffledBatches
from utils.data.images import ImageSet
from utils.data.transforms import match_channels, stack_images, to_unit_range
from utils.training.run import Run

# How replay is drawn: diffusers' scheduler and what differs from its defaults. All are deterministic.
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    # Latent diffusion's own DDIM visits 981, 961, ..., 1 and ends at the first alpha_bar, not at 1: another offset or
    # end moves the latents visibly.
    "ddim": ("DDIMScheduler", {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False}),
    "dpmpp": ("DPMSolverMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),  # the default's time steps are no integers
}


class Predictor(Protocol):
    """A denoiser."""

    def predict(self, zt: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        """The noise or velocity in zt, (B, c, h, w), at the times t, int64 (B,)."""


def noise_scheduler(schedule: dict[str, Any]):
    """What adds noise and makes the target of training."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(**schedule)


def sample_scheduler(name: str, schedule: dict[str, Any], steps: int):
    """A deterministic sampler of ``SAMPLERS``, with its time steps set."""
    import diffusers

    kind, settings = SAMPLERS[name]
    scheduler = getattr(diffusers, kind)(**schedule, **settings)
    scheduler.set_timesteps(steps)
    return scheduler


def sample_scheduled(model: Model, zt: Tensor, scheduler) -> Tensor:
    """Follow a scheduler's steps from pure noise to a clean latent.

    Args:
        model: what the scheduler's prediction type says, of (zt, t).
        zt: standard normal, (B, c, h, w).
        scheduler: of diffusers, its time steps set.
    """
    zt = zt * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        predicted = model(scheduler.scale_model_input(zt, t), t.long().expand(len(zt)).to(zt.device))
        zt = scheduler.step(predicted, t, zt).prev_sample
    return zt


def denoising_loss(model: Predictor, z0: Tensor, context: Tensor | None, scheduler) -> Tensor:
    """Mean squared error of the predicted noise or velocity at uniform times (LDM, arXiv:2112.10752, Eq. 2).

    Draws from the global random generators.

    Args:
        model: predicts what the scheduler's prediction type says.
        z0: clean latents, or images in [-1, 1], (B, c, h, w).
        context: what the model reads beside them: vectors of words, edge maps, or nothing.
        scheduler: of `noise_scheduler`.
    """
    t = torch.randint(scheduler.config.num_train_timesteps, (len(z0),)).to(z0.device)
    eps = torch.randn_like(z0)
    zt = scheduler.add_noise(z0, eps, t)
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(z0, eps, t) if velocity else eps
    return F.mse_loss(model.predict(zt, t, context).float(), target)


@dataclass(frozen=True)
class Latents:
    """Images as the autoencoder sees them, computed once.

    Attributes:
        moments: float32 (N, V, 2c, h, w) on the CPU, mean and standard deviation; V is 2 with mirror images, else 1.
        labels: int64 (N,).
    """

    moments: Tensor
    labels: Tensor

    def take(self, positions: Tensor) -> Latents:
        return Latents(self.moments[positions], self.labels[positions])


@torch.no_grad()
def encode(model: LatentDiffusion, images: ImageSet, mirror: bool, chunk: int, run: Run, label: str) -> Latents:
    """Moments of all images, resized to the model's size (bicubic), and of their mirror images."""
    pieces, bar = [], run.bar(len(images), label)
    for positions in torch.arange(len(images)).split(chunk):  # only a chunk is ever held in pixels
        pixels = match_channels(stack_images(images.take(positions), model.image_size), model.image_channels)
        views = [pixels, pixels.flip(-1)] if mirror else [pixels]
        with run.runtime.autocast():
            pieces.append(torch.stack([model.moments(to_unit_range(view)).float().cpu() for view in views], 1))
        bar.update(len(positions))
    bar.close()
    return Latents(torch.cat(pieces), images.labels)


class LatentBatches(ShuffledBatches):
    """Shuffled batches of latents, each a fresh sample of the posterior of an image or its mirror image.

    Args:
        latents: of the images.
        loading: see `Loading`; there is no transform.
    """

    def __init__(self, latents: Latents, loading: Loading):
        super().__init__(latents.labels, loading)
        self.latents = latents

    def batches(self, epoch: int, picks: list[Tensor], generators: Iterator[torch.Generator]) -> Iterator[Batch]:
        for pick, generator in zip(picks, generators):
            labels = self.labels[pick.to(self.device)]
            z0 = self._sample(pick, generator).to(self.device)
            yield Batch(z0, labels, torch.zeros_like(labels, dtype=torch.bool))

    def _sample(self, pick: Tensor, generator: torch.Generator) -> Tensor:
        """Draw z0 = mean + std * noise, (B, c, h, w)."""
        view = torch.randint(self.latents.moments.shape[1], (len(pick),), generator=generator)
        mean, std = self.latents.moments[pick, view].chunk(2, dim=1)
        return mean + std * torch.randn(mean.shape, generator=generator)
