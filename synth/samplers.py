"""Samplers: from pure noise to clean images, in the symbols of `synth.diffusion`.

Those of our own have the signature (model, xt, process, ...), so that one replaces another; others are diffusers'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from synth.diffusion import Model, Process, predict_eps, predict_x0
from utils.run.errors import ConfigError

# Diffusers' schedulers and what differs from their defaults, unless the model's own scheduler file says it. All are
# deterministic.
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    # Latent diffusion's own DDIM visits 981, 961, ..., 1 and ends at the first alpha_bar, not at 1: another offset or
    # end moves the latents visibly.
    "ddim": ("DDIMScheduler", {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False}),
    "pndm": ("PNDMScheduler", {"set_alpha_to_one": False, "steps_offset": 1, "skip_prk_steps": True}),
    "dpmpp": ("DPMSolverMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),  # the default's time steps are no integers
}
# Of the newest noise predictions, newest first, what a step of Adams and Bashforth takes of each (PNDM, Eq. 9 and 12).
ADAMS_BASHFORTH = [(1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24)]


@dataclass(frozen=True)
class Bend:
    """What sampling follows uphill.

    Attributes:
        uphill: clean predictions (B, C, H, W) in [-1, 1] to one log-likelihood per image, (B,), already multiplied by
            its scale.
        gradient: "xt": with respect to xt, through x0's clamp and the network (Cywinski et al. 2024,
            arXiv:2403.03938). "x0": with respect to the predicted x0, without a backward pass of the network (MPGD, He
            et al. 2024, arXiv:2311.16424); for dx0 / dxt stands what it is for Gaussian images of unit variance,
            sqrt(alpha_bar), so that a scale means about the same.
    """

    uphill: Callable[[Tensor], Tensor]
    gradient: str = "xt"


def sample_ddim(model: Model, xt: Tensor, process: Process, bend: Bend | None = None, clip: bool = True,
                order: int = 1) -> Tensor:  # fmt: skip
    """Sample without noise of its own (Song et al. 2021, arXiv:2010.02502, Eq. 12 with eta = 0).

    Args:
        xt: pure noise, (B, C, H, W).
        bend: its gradient shifts eps (Cywinski et al. 2024, arXiv:2403.03938). The bent x0 is not clamped again.
        clip: clamp the predicted x0 to [-1, 1] at every step.
        order: of the newest predictions so many, at most 4, make a step: 1 is DDIM, 4 iPNDM (Zhang and Chen 2023,
            arXiv:2204.13902), whose first steps are of lower order.

    Returns:
        (B, C, H, W), about [-1, 1].
    """
    seen: list[Tensor] = []
    for t, alpha_bar, alpha_bar_prev in _backwards(process):
        x0, shift = _denoise(model, xt, t, alpha_bar, bend, clip)
        eps = predict_eps(xt, x0, alpha_bar)
        if shift is not None:
            eps = eps - (1 - alpha_bar) ** 0.5 * shift
        seen = [eps, *seen][:order]
        if len(seen) > 1:
            eps = sum(weight * past for weight, past in zip(ADAMS_BASHFORTH[len(seen) - 1], seen))
        if shift is not None or len(seen) > 1:
            x0 = predict_x0(xt, eps, alpha_bar)
        xt = alpha_bar_prev**0.5 * x0 + (1 - alpha_bar_prev) ** 0.5 * eps
    return xt


def sample_ddpm(model: Model, xt: Tensor, process: Process, step_noise: Callable[[], Tensor],
                bend: Bend | None = None, clip: bool = True) -> Tensor:  # fmt: skip
    """Sample by ancestors, with variance beta (DDPM, Algorithm 2).

    Args:
        xt: pure noise, (B, C, H, W).
        step_noise: gives fresh noise of xt's shape; not called for the last step.
        bend: its gradient, times the variance, shifts the mean (Dhariwal and Nichol 2021, arXiv:2105.05233,
            Algorithm 1); in the last step, which has no noise, with the variance of the one before.
        clip: clamp the predicted x0 to [-1, 1] at every step.
    """
    for t, alpha_bar, alpha_bar_prev in _backwards(process):
        x0, shift = _denoise(model, xt, t, alpha_bar, bend, clip)
        beta = 1 - alpha_bar / alpha_bar_prev
        of_x0 = alpha_bar_prev**0.5 * beta / (1 - alpha_bar)  # Eq. 7
        of_xt = (1 - beta) ** 0.5 * (1 - alpha_bar_prev) / (1 - alpha_bar)
        xt = of_x0 * x0 + of_xt * xt
        if shift is not None:
            xt = xt + (beta if alpha_bar_prev < 1 else _last_variance(process)) * shift
        if alpha_bar_prev < 1:
            xt = xt + beta**0.5 * step_noise().to(xt)
    return xt


def denoiser(model: Model, process: Process, bend: Bend | None, clip: bool) -> Model:
    """Return the noise that ``sample_ddim`` goes by, for samplers that know of neither ``bend`` nor ``clip``.

    Args:
        model: noise predictor.
        process: all of its time steps.
        bend, clip: see `sample_ddim`.
    """

    def model_of_steps(xt: Tensor, t: Tensor) -> Tensor:
        alpha_bar = process.alpha_bar[t[0]].item()
        x0, shift = _denoise(model, xt, t[0], alpha_bar, bend, clip)
        eps = predict_eps(xt, x0, alpha_bar)
        return eps if shift is None else eps - (1 - alpha_bar) ** 0.5 * shift

    return model_of_steps


def _denoise(model: Model, xt: Tensor, t: Tensor, alpha_bar: float, bend: Bend | None,
             clip: bool) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Predict x0 and, where sampling is bent, the gradient of ``bend`` with respect to xt.

    The graph is that of this one step: xt itself has none.
    """
    through = bend is not None and bend.gradient == "xt"
    with torch.set_grad_enabled(through):
        xt = xt.detach().requires_grad_(through)
        x0 = predict_x0(xt, model(xt, t.expand(len(xt)).to(xt.device)).float(), alpha_bar)
    if bend is None:
        return (x0.clamp(-1, 1) if clip else x0), None
    with torch.enable_grad():
        free, slope = (xt, 1.0) if through else (x0.requires_grad_(), alpha_bar**0.5)
        x0 = x0.clamp(-1, 1) if clip else x0
        return x0.detach(), slope * torch.autograd.grad(bend.uphill(x0).sum(), free)[0]


def _last_variance(process: Process) -> float:
    """The posterior variance of the second step (DDPM, Eq. 7); of the first it would be 0."""
    if len(process) == 1:
        return process.betas[0].item()
    (before, after), beta = process.alpha_bar[:2], process.betas[1]
    return (beta * (1 - before) / (1 - after)).item()


def _backwards(process: Process) -> Iterator[tuple[Tensor, float, float]]:
    """(t, alpha_bar, alpha_bar before it) from the noisiest step to the first."""
    return reversed(list(zip(process.timesteps, process.alpha_bar.tolist(), process.alpha_bar_prev.tolist())))


def sample_scheduler(name: str, schedule: dict[str, Any], steps: int):
    """Return a deterministic sampler of ``SAMPLERS``, with its time steps set.

    Raises:
        ConfigError: if the schedule has not so many steps, or something that this sampler cannot do.
    """
    import diffusers

    kind, settings = SAMPLERS[name]
    try:
        scheduler = getattr(diffusers, kind).from_config(settings | schedule)
        scheduler.set_timesteps(steps)
    except (ArithmeticError, ImportError, LookupError, RuntimeError, TypeError, ValueError) as error:
        wanted = f"{steps} steps of scheduler={name!r}"
        raise ConfigError(f"{wanted} do not suit a model with {schedule}: {error}") from error
    return scheduler


def sample_scheduled(model: Model, zt: Tensor, scheduler, first: int | None = None) -> Tensor:
    """Follow a scheduler's steps to a clean latent.

    Args:
        model: what the scheduler's prediction type says, of (zt, t).
        zt: (B, c, h, w): standard normal, or with ``first`` noisy latents as that step takes them.
        scheduler: of diffusers, its time steps set.
        first: step to begin with, counted from 0, where the noise is not pure (SDEdit, arXiv:2108.01073).
    """
    if first is None:
        zt = zt * scheduler.init_noise_sigma
    elif hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    for t in scheduler.timesteps[first or 0 :]:
        time = t if t % 1 else t.long()  # some schedules have steps between two of training
        predicted = model(scheduler.scale_model_input(zt, t), time.expand(len(zt)).to(zt.device))
        zt = scheduler.step(predicted, t, zt).prev_sample
    return zt
