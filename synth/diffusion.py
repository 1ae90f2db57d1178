"""The mathematics of diffusion: pure functions on tensors, in the symbols of the papers.

x0 is a clean image in [-1, 1], xt its noisy form at time t, alpha_bar the cumulative product of 1 - beta, eps noise.
``model(xt, t)`` predicts eps; t holds original time steps, int64 (B,). What draws images is in `synth.samplers`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from utils.run.errors import ConfigError
from utils.run.registry import shown

Model = Callable[[Tensor, Tensor], Tensor]
Predict = Callable[[Tensor, Tensor, Tensor], Tensor]  # (xt, t, labels) to eps; label -1 is no class


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


def thin_at_random(process: Process, count: int) -> Process:
    """Keep ``count`` time steps at most: the noisiest, and one by chance of each of count - 1 equal spans below it.

    Draws from the global random generator of the CPU.
    """
    spans = torch.arange(len(process) - 1).tensor_split(max(0, min(count, len(process)) - 1) or 1)
    chosen = [span[torch.randint(len(span), ())] for span in spans if len(span) and count > 1]
    kept = torch.stack([*chosen, torch.tensor(len(process) - 1)])
    return Process(process.alpha_bar[kept], process.timesteps[kept])


def rows(values: Tensor, like: Tensor) -> Tensor:
    """(B,) coefficients that multiply (B, C, H, W) images."""
    return values.to(like.device, like.dtype).view(-1, *[1] * (like.ndim - 1))


def add_noise(process: Process, x0: Tensor, index: Tensor, eps: Tensor) -> Tensor:
    """Return xt = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps (DDPM, Eq. 4); ``index`` (B,) counts kept steps."""
    alpha_bar = process.alpha_bar[index.cpu()]
    return rows(alpha_bar.sqrt(), x0) * x0 + rows((1 - alpha_bar).sqrt(), x0) * eps


@dataclass(frozen=True)
class Objective:
    """What a network predicts, and how much each time counts in its loss.

    Attributes:
        prediction: "epsilon"; "v", the velocity sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0 (Salimans and Ho 2022,
            arXiv:2202.00512, section 4); or "x0".
        weighting: "none" weighs the error of the prediction alike at all times. With SNR = alpha_bar / (1 - alpha_bar),
            "min_snr" weighs the error of x0 by min(SNR, 5) (Hang et al. 2023, arXiv:2303.09556, Eq. 9), "soft_min_snr"
            by 4 SNR / (SNR + 4) (Crowson et al. 2024, arXiv:2401.11605, section 3.2).
    """

    prediction: str = "epsilon"
    weighting: str = "none"

    def target(self, x0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
        """Return what the network is to predict; ``alpha_bar`` is (B,)."""
        if self.prediction == "v":
            return rows(alpha_bar.sqrt(), x0) * eps - rows((1 - alpha_bar).sqrt(), x0) * x0
        return eps if self.prediction == "epsilon" else x0

    def noise(self, output: Tensor, xt: Tensor, alpha_bar: Tensor) -> Tensor:
        """Return the noise in xt that the network's output implies; ``alpha_bar`` is (B,)."""
        if self.prediction == "epsilon":
            return output
        signal, noise = rows(alpha_bar.sqrt(), xt), rows((1 - alpha_bar).sqrt(), xt)
        return signal * output + noise * xt if self.prediction == "v" else (xt - signal * output) / noise

    def loss(self, output: Tensor, target: Tensor, alpha_bar: Tensor) -> Tensor:
        """Return the weighted mean squared error, a scalar."""
        error = (output - target).square()
        if self.weighting == "none":
            return error.mean()
        snr = alpha_bar / (1 - alpha_bar)
        weight = snr.clamp(max=5) if self.weighting == "min_snr" else 4 * snr / (snr + 4)
        # The error of x0, in units of what is predicted.
        scale = {"epsilon": snr, "v": snr + 1, "x0": torch.ones_like(snr)}[self.prediction]
        return (rows(weight / scale, error) * error).mean()


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


def within(process: Process, interval: tuple[float, float], inside: Model, outside: Model) -> Model:
    """Take one model where the noise level is inside an interval, another elsewhere (Kynkaanniemi et al. 2024).

    Guidance in an interval, arXiv:2404.07724; the level is sigma = sqrt(1 / alpha_bar - 1), above the first end and up
    to the second.
    """
    low, high = interval
    sigma = (1 / process.alpha_bar - 1).sqrt()

    def model(xt: Tensor, t: Tensor) -> Tensor:
        return (inside if low < sigma[t[0]] <= high else outside)(xt, t)

    return model


def autoguided(predict: Predict, before: Predict, known: Tensor, strength: float) -> Predict:
    """Go away from a weaker model: eps + (w - 1) (eps - eps_before) (Karras et al. 2024, arXiv:2406.02507, Eq. 3).

    Args:
        predict, before: (xt, t, labels) to eps, of the model and of a weaker one.
        known: bool (num_classes + 1,), whether the weaker one has learned a class; the last is no class, label -1.
        strength: w; 1 leaves the model alone.
    """

    def model(xt: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        eps = predict(xt, t, labels)
        return eps + rows((strength - 1) * known[labels], eps) * (eps - before(xt, t, labels))

    return model


def classifier_free_at_once(predict: Predict, labels: Tensor, omega: float) -> Model:
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
