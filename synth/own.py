"""A generator of our own in a source: a small network that is trained on the first task, or comes from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from models.latent.own import OwnModel
from utils.data.batches import Batches
from utils.data.transforms import DiffusionTransform
from utils.run.config import BaseConfig, Place
from utils.run.errors import ConfigError
from utils.training.fit import Hooks, LossFunction, Training, fit
from utils.training.schedule import TrainConfig


class OwnGenerator:
    """What sources with a small network of ours share; it stands before their other base class.

    Attributes:
        network: class of the network.
    """

    network: type[OwnModel]

    class Config(BaseConfig):
        weights: Place | None = Field(None, description="folder of a model trained before; then none is trained")
        lr_schedule: Literal["constant", "cosine", "linear"] = Field("linear", description="of the rates, down to 0")
        ema_rate: float = Field(0.99, ge=0, lt=1, description="decay of the averages that are used; 0: raw weights")

    def load_model(self, folder: str | Path) -> OwnModel:
        """Read a frozen network from a folder that holds one, onto the run's device."""
        remedy = f"name a folder that `python -m synth.train` wrote with the source {self.config.name!r}"
        return self.network.load(folder, remedy).to(self.run.device)

    def require_channels(self, channels: int) -> None:
        """Raise ConfigError if the network from elsewhere draws images of other channels than the data set's."""
        if channels != self.dataset.channels:
            there, here = f"synth.weights={self.config.weights!r}", f"{self.dataset.name} has {self.dataset.channels}"
            raise ConfigError(f"{there} draws images of {channels} channels, but {here}: name a model of such images")

    def train_part(self, part: nn.Module, batches: Batches, loss: LossFunction, length: tuple[int, float],
                   training: Training, hooks: Hooks | None = None) -> None:  # fmt: skip
        """Train a part of the network; what is kept is the moving average of its weights, if there is one.

        Args:
            part: whose weights move.
            batches: of images or latents.
            loss: a batch to named terms.
            length: steps, and AdamW's rate.
            training: run, task and purpose.
            hooks: called inside the training.
        """
        (steps, lr), schedule, decay = length, self.config.lr_schedule, self.config.ema_rate
        config = TrainConfig(steps=steps, lr=lr, optimizer="adamw", schedule=schedule, ema_decay=decay)
        average = fit(part, batches, loss, config, training, hooks or Hooks())
        if average is not None:
            part.load_state_dict(average.state_dict())

    def describe_model(self, model: OwnModel, steps: str) -> str:
        """Say how large the network is, and how long it is trained or where it comes from."""
        millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        origin = f"of {self.config.weights}" if self.config.weights else f"trained on the first task, {steps}"
        return f"{millions:.1f} M parameters, {origin}"


class TurningTransform(DiffusionTransform):
    """Square images in all eight positions, each equally likely.

    A network that saw a few classes alone draws later ones badly: on digits, turned ones, which are no digits but
    strokes, halve an autoencoder's error on unseen classes.
    """

    def __init__(self, size: int):
        super().__init__(size, flip=True)

    def train(self, images: Tensor, generator: torch.Generator) -> Tensor:
        images = super().train(images, generator)
        upside_down, turned = (torch.rand(2, len(images), 1, 1, 1, generator=generator) < 0.5).to(images.device)
        images = torch.where(upside_down, images.flip(-2), images)
        return torch.where(turned, images.transpose(-1, -2), images).contiguous()
