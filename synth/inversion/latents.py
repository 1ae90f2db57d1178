"""The parts of a latent diffusion model's work: cached latents in batches, the training loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.latent.contract import LatentDiffusion
from utils.data.batches import Batch, Loading, ShuffledBatches
from utils.data.images import ImageSet
from utils.data.transforms import match_channels, stack_images, to_unit_range
from utils.training.run import Run


def noise_scheduler(schedule: dict[str, Any]):
    """Return what adds noise and makes the target of training."""
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_config(schedule)


def denoising_loss(model: nn.Module | LatentDiffusion, z0: Tensor, context: Tensor | None, scheduler) -> Tensor:
    """Return the mean squared error of the predicted noise or velocity at uniform times (LDM, arXiv:2112.10752, Eq. 2).

    Draws from the global random generators.

    Args:
        model: its ``predict(zt, t, context)`` gives what the scheduler's prediction type says, of the shape of zt.
        z0: clean latents, or images in [-1, 1], (B, c, h, w).
        context: what the model reads beside them: vectors of words, edge maps, or nothing.
        scheduler: of `noise_scheduler`.
    """
    t = torch.randint(scheduler.config.num_train_timesteps, (len(z0),)).to(z0.device)
    eps = torch.randn_like(z0)
    target = scheduler.get_velocity(z0, eps, t) if scheduler.config.prediction_type == "v_prediction" else eps
    return F.mse_loss(model.predict(scheduler.add_noise(z0, eps, t), t, context).float(), target)


@torch.no_grad()
def encode(model: LatentDiffusion, images: ImageSet, mirror: bool, chunk: int, run: Run, label: str) -> Tensor:
    """Return all images, resized to the model's size (bicubic), and their mirror images as the autoencoder sees them.

    Returns:
        Mean and standard deviation, float32 (N, V, 2c, h, w) on the CPU; V is 2 with mirror images, else 1.
    """
    pieces, bar = [], run.bar(len(images), label)
    for positions in torch.arange(len(images)).split(chunk):  # only a chunk is ever held in pixels
        pixels = match_channels(stack_images(images.take(positions), model.image_size), model.image_channels)
        views = [pixels, pixels.flip(-1)] if mirror else [pixels]
        with run.runtime.autocast():
            pieces.append(torch.stack([model.moments(to_unit_range(view)).float().cpu() for view in views], 1))
        bar.update(len(positions))
    bar.close()
    return torch.cat(pieces)


class LatentBatches(ShuffledBatches):
    """Shuffled batches of latents, each a fresh sample of the posterior of an image or its mirror image.

    Args:
        moments: of `encode`, of N images.
        labels: int64 (N,).
        loading: see `Loading`; there is no transform.
    """

    def __init__(self, moments: Tensor, labels: Tensor, loading: Loading):
        super().__init__(labels, loading)
        self.moments = moments

    def batches(self, epoch: int, picks: list[Tensor], generators: Iterator[torch.Generator]) -> Iterator[Batch]:
        for pick, generator in zip(picks, generators):
            view = torch.randint(self.moments.shape[1], (len(pick),), generator=generator)
            mean, std = self.moments[pick, view].chunk(2, dim=1)
            z0 = mean + std * torch.randn(mean.shape, generator=generator)  # (B, c, h, w)
            labels = self.labels[pick.to(self.device)]
            yield Batch(z0.to(self.device), labels, torch.zeros_like(labels, dtype=torch.bool))
