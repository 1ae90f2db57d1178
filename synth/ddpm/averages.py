"""Moving averages of several lengths, of which held-out images choose one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from synth.diffusion import Predict, Process, draw_noised
from utils.data.images import ImageSet
from utils.run.files import flatten, nest
from utils.run.log import log
from utils.training import seeding
from utils.training.fit import Step

REPEATS, CHUNK = 8, 128  # how often a held-out image is noised, and how many are looked at together


class Averages:
    """Averages of one training, chosen among when it is over, as Karras et al. do (2024, arXiv:2312.02696, section 3).

    Args:
        network: that is trained.
        rates: decay of each.
    """

    def __init__(self, network: nn.Module, rates: Sequence[float]):
        self.network, self.rates = network, rates
        self.networks = [copy.deepcopy(network).eval().requires_grad_(False) for _ in rates]

    def move(self, step: Step) -> None:
        """Take in what the network is after a step."""
        for rate, average in zip(self.rates, self.networks):
            get_ema_multi_avg_fn(rate)(list(average.parameters()), list(self.network.parameters()), None)

    @torch.no_grad()
    def best(self, usual: tuple[float, nn.Module], predictor: Callable[[nn.Module], Predict], process: Process,
             images: Tensor, labels: Tensor) -> nn.Module:  # fmt: skip
        """Return the average that predicts the noise in held-out images best, each noised to eight times.

        Args:
            usual: another decay and its average, which takes part.
            predictor: a network to its noise predictor.
            process: whose times are drawn.
            images: held-out ones, (B, C, H, W) in [-1, 1] on the device.
            labels: int64 (B,).
        """

        def error(named: tuple[float, nn.Module]) -> float:
            predict, errors = predictor(named[1]), []
            for repeat in range(REPEATS):
                seeding.seed_everything("held out", repeat)  # the same noise for every average
                for x0, shown in zip(images.split(CHUNK), labels.to(images.device).split(CHUNK)):
                    xt, t, eps = draw_noised(process, x0)
                    errors.append((predict(xt, t, shown) - eps).square().sum())
            return torch.stack(errors).sum().item()

        rate, network = min([usual, *zip(self.rates, self.networks)], key=error)
        log.info("Of all averages that of decay %g predicts %d held-out images best", rate, len(images))
        return network

    def state_dict(self) -> dict[str, Tensor]:
        """Return all weights, for a checkpoint inside the training."""
        return flatten({number: average.state_dict() for number, average in enumerate(self.networks)})

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what ``state_dict`` gave."""
        for number, weights in nest(state).items():
            self.networks[int(number)].load_state_dict(weights)


def hold_out(images: ImageSet, share: float) -> tuple[ImageSet, ImageSet]:
    """Part images, evenly over their order: those to train on, and ``share`` of them, one at least."""
    every = round(1 / share)
    kept = [position for position in range(len(images)) if position % every]
    return images.take(kept), images.take(range(0, len(images), every))
