"""The mathematics of diffusion: pure functions on tensors, in the symbols of the papers.

x0 is a clean image in [-1, 1], xt its noisy form at time t, alpha_bar the cumulative product of 1 - beta, eps noise.
Every sampler has the signature (model, xt, process, ...), so that one replaces another. ``model(xt, t)`` predicts eps;
t holds original time steps, int64 (B,).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from utils.run.errors import ConfigError
from utils.run.registry import shown

Model = Callable[[Tensor, Tensor], Tensor]
# Clean predictions (B, C, H, W) in [-1, 1] to one log-likelihood per image, (B,), already multiplied by its scale.
Bend = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Process:
    """A noising process on a subset of its time steps.

    Attributes:
        alpha_bar: float64 (S,), falling from nearly 1 to nearly 0.
        timesteps: int64 (S,), the original time steps that are kept, ascending; what the network is told.
    """

    alpha_bar: Tensor
    timesteps: Tensor

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def alpha_bar_prev(self) -> Tensor:
        """Return alpha_bar one step earlier, 1 before the first."""
        return torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bar[:-1]])

    @property
    def betas(self) -> Tensor:
        """Return the noise variances between kept steps."""
        return 1 - self.alpha_bar / self.alpha_bar_prev


def linear_process(num_steps: int = 1000, beta_start: float = 1e-3, beta_end: float = 2e-2) -> Process:
    """Make the linear schedule (Ho et al. 2020, arXiv:2006.11239, section 4).

    Its start is ten times the usual one, as Cywinski et al. have it (2024, arXiv:2403.03938).

    Raises:
        ConfigError: if so little of an image is left at its end that float32 cannot tell it from nothing.
    """
    betas = torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64)
    alpha_bar = (1 - betas).cumprod(0)
    if alpha_bar[-1] < 1e-70:  # whose root divides
        raise ConfigError(f"{beta_start=}, {beta_end=}, diffusion_steps={num_steps}: too much noise, lower one of them")
    return Process(alpha_bar, torch.arange(num_steps))


def respace(process: Process, spacing: str | int, key: str = "timestep_respacing") -> Process:
    """Keep some time steps with their alpha_bar; the betas between them follow.

    Args:
        process: of T steps.
        spacing: "ddimN" takes the smallest integer stride that gives exactly N steps from 0 on; a number N spreads
            N steps evenly from 0 to T - 1; empty: all steps.
        key: says in a message whose value it is.

    Raises:
        ConfigError: if no integer stride gives N steps, or N is not in 1..T.
    """
    total, text = len(process), str(spacing) or str(len(process))
    number = re.fullmatch("(?:ddim)?([0-9]{1,9})", text)
    count = int(number[1]) if number else 0
    if not 1 <= count <= total:
        raise ConfigError(f"{key}={shown(text)}: use 1 to {total}, or ddimN with such an N; empty: all steps")
    kept = np.linspace(0, total - 1, count).round().astype(int)
    if text.startswith("ddim"):
        kept = np.arange(0, total, -(-total // count))  # the smallest stride that gives no more than N
        if len(kept) < count:
            why = f"no integer stride through {total} steps gives {count} of them"
            raise ConfigError(f"{key}={text!r}: {why}; use {count} without ddim")
    return Process(process.alpha_bar[kept], process.timesteps[kept])


def _rows(values: Tensor, like: Tensor) -> Tensor:
    """(B,) coefficients that multiply (B, C, H, W) images."""
    return values.to(like.device, like.dtype).view(-1, *[1] * (like.ndim - 1))


def add_noise(process: Process, x0: Tensor, index: Tensor, eps: Tensor) -> Tensor:
    """Return xt = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps (DDPM, Eq. 4); ``index`` (B,) counts kept steps."""
    alpha_bar = process.alpha_bar[index.cpu()]
    return _rows(alpha_bar.sqrt(), x0) * x0 + _rows((1 - alpha_bar).sqrt(), x0) * eps


def noise_prediction_loss(model: Model, process: Process, x0: Tensor) -> Tensor:
    """Compute the mean squared error of the predicted noise at uniform times (DDPM, Eq. 14); a scalar.

    Draws from the global random generators of x0's device.
    """
    xt, t, eps = draw_noised(process, x0)
    return (model(xt, t).float() - eps).square().mean()


def draw_noised(process: Process, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Draw (xt, t, eps) of clean images at uniform times; t holds original time steps, int64 (B,) on x0's device.

    Draws from the global random generators of x0's device.
    """
    index = torch.randint(len(process), (len(x0),))
    eps = torch.randn_like(x0)
    return add_noise(process, x0, index, eps), process.timesteps[index].to(x0.device), eps


def predict_x0(xt: Tensor, eps: Tensor, alpha_bar: float) -> Tensor:
    """Return the clean image that noise eps implies."""
    return (xt - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5


def predict_eps(xt: Tensor, x0: Tensor, alpha_bar: float) -> Tensor:
    """Return the noise that a clean image x0 implies."""
    return (xt - alpha_bar**0.5 * x0) / (1 - alpha_bar) ** 0.5


def classifier_free(conditional: Model, unconditional: Model, guidance: float) -> Model:
    """Predict eps_u + g (eps_c - eps_u) (Ho and Salimans 2022, arXiv:2207.12598, in the g = 1 + w convention)."""
    if guidance in (0, 1):  # one of the two is all there is to compute
        return conditional if guidance else unconditional

    def model(xt: Tensor, t: Tensor) -> Tensor:
        eps = unconditional(xt, t)
        return eps + guidance * (conditional(xt, t) - eps)

    return model


def classifier_free_at_once(predict: Callable[[Tensor, Tensor, Tensor], Tensor], labels: Tensor, omega: float) -> Model:
    """Predict eps_c + omega (eps_c - eps_u), which is g = 1 + omega in `classifier_free`, in one doubled call.

    Args:
        predict: (xt, t, labels) to eps; label -1 is no class.
        labels: int64 (B,).
        omega: 0 leaves the conditional alone, of half the cost.
    """
    if not omega:
        return lambda xt, t: predict(xt, t, labels)
    both = torch.cat([labels, torch.full_like(labels, -1)])  # (2B,)

    def model(xt: Tensor, t: Tensor) -> Tensor:
        conditional, unconditional = predict(torch.cat([xt, xt]), torch.cat([t, t]), both).chunk(2)
        return conditional + omega * (conditional - unconditional)

    return model


def sample_ddim(model: Model, xt: Tensor, process: Process, bend: Bend | None = None, clip: bool = True) -> Tensor:
    """Sample without noise of its own (Song et al. 2021, arXiv:2010.02502, Eq. 12 with eta = 0).

    Args:
        xt: pure noise, (B, C, H, W).
        bend: its gradient with respect to xt, through x0's clamp and the network, shifts eps (Cywinski et al. 2024,
            arXiv:2403.03938). The bent x0 is not clamped again.
        clip: clamp the predicted x0 to [-1, 1] at every step.

    Returns:
        (B, C, H, W), about [-1, 1].
    """
    for t, alpha_bar, alpha_bar_prev in _backwards(process):
        x0, shift = _denoise(model, xt, t, alpha_bar, bend, clip)
        eps = predict_eps(xt, x0, alpha_bar)
        if shift is not None:
            eps = eps - (1 - alpha_bar) ** 0.5 * shift
            x0 = predict_x0(xt, eps, alpha_bar)
        xt = alpha_bar_prev**0.5 * x0 + (1 - alpha_bar_prev) ** 0.5 * eps
    return xt


def sample_ddpm(model: Model, xt: Tensor, process: Process, step_noise: Callable[[], Tensor],
                bend: Bend | None = None, clip: bool = True) -> Tensor:  # fmt: skip
    """Sample by ancestors, with variance beta (DDPM, Algorithm 2).

    Args:
        xt: pure noise, (B, C, H, W).
        step_noise: gives fresh noise of xt's shape; not called for the last step.
        bend: its gradient with respect to xt, times the variance, shifts the mean (Dhariwal and Nichol 2021,
            arXiv:2105.05233, Algorithm 1); in the last step, which has no noise, with the variance of the one before.
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


def _denoise(model: Model, xt: Tensor, t: Tensor, alpha_bar: float, bend: Bend | None,
             clip: bool) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Predict x0 and, where sampling is bent, the gradient of ``bend`` with respect to xt.

    The graph is that of this one step: xt itself has none.
    """
    with torch.set_grad_enabled(bend is not None):
        xt = xt.detach().requires_grad_(bend is not None)
        eps = model(xt, t.expand(len(xt)).to(xt.device)).float()
        x0 = predict_x0(xt, eps, alpha_bar)
        x0 = x0.clamp(-1, 1) if clip else x0
        shift = None if bend is None else torch.autograd.grad(bend(x0).sum(), xt)[0]
    return x0.detach(), shift


def _last_variance(process: Process) -> float:
    """The posterior variance of the second step (DDPM, Eq. 7); of the first it would be 0."""
    if len(process) == 1:
        return process.betas[0].item()
    (before, after), beta = process.alpha_bar[:2], process.betas[1]
    return (beta * (1 - before) / (1 - after)).item()


def _backwards(process: Process) -> Iterator[tuple[Tensor, float, float]]:
    """(t, alpha_bar, alpha_bar before it) from the noisiest step to the first."""
    return reversed(list(zip(process.timesteps, process.alpha_bar.tolist(), process.alpha_bar_prev.tolist())))
