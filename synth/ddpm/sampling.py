"""How a DDPM draws: time steps, sampler, and the words for both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from synth.ddpm.config import DDPMConfig
from synth.diffusion import Model, Process, respace
from synth.samplers import Bend, denoiser, sample_ddim, sample_ddpm, sample_scheduled, sample_scheduler


class Sampling(NamedTuple):
    """How images are drawn: time steps such as "ddim50", and a sampler."""

    timestep_respacing: str
    sampler: str = "ddim"


@dataclass(frozen=True)
class Drawing:
    """One chunk that is drawn.

    Attributes:
        noise: pure, (B, C, H, W).
        step_noise: gives fresh noise of this shape.
        bend: what sampling follows uphill; None: nothing.
    """

    noise: Tensor
    step_noise: Callable[[], Tensor]
    bend: Bend | None = None

    def follow(self, model: Model, process: Process, sampling: Sampling, config: DDPMConfig) -> Tensor:
        """Follow a sampler from the noise to clean images, (B, C, H, W); see `synth.samplers`."""
        steps, clip = respace(process, sampling.timestep_respacing), config.clip_x0
        if sampling.sampler == "ddpm":
            return sample_ddpm(model, self.noise, steps, self.step_noise, self.bend, clip)
        if sampling.sampler in ("ddim", "ipndm"):
            return sample_ddim(model, self.noise, steps, self.bend, clip, 4 if sampling.sampler == "ipndm" else 1)
        schedule = {"num_train_timesteps": len(process), "beta_start": config.beta_start, "beta_end": config.beta_end,
                    "beta_schedule": "linear"}  # fmt: skip
        scheduler = sample_scheduler(sampling.sampler, schedule, len(steps))
        return sample_scheduled(denoiser(model, process, self.bend, clip), self.noise, scheduler)
