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
from utils.run.errors import ConfigError, NotFittedError
from utils.training.fit import Hooks, LossFunction, Training, fit
from utils.training.schedule import TrainConfig


class OwnGenerator:
    """What sources with a small network of ours share; it stands before their other base class.

    A subclass says in ``new_model`` how the network is built with random weights, and in ``training_steps`` how long
    its parts are trained. Its other base class keeps the network as ``model``, read by ``build_model`` where it is
    first asked for.

    Attributes:
        network: class of the network.
    """

    network: type[OwnModel]

    class Config(BaseConfig):
        weights: Place | None = Field(None, description="folder of a model trained before; then none is trained")
        lr_schedule: Literal["constant", "cosine", "linear"] = Field("linear", description="of the rates, down to 0")
        ema_rate: float = Field(0.99, ge=0, lt=1, description="decay of the averages that are used; 0: raw weights")

    def __init__(self, config, run, num_classes, class_names, dataset):
        super().__init__(config, run, num_classes, class_names, dataset)
        if config.weights is None:
            self.new_model()  # what does not fit is said now, not after a classifier has trained
        elif config.need_syn_imgs and (channels := self.model.data["image_shape"][0]) != dataset.channels:
            there, here = f"synth.weights={config.weights!r}", f"{dataset.name} has {dataset.channels}"
            raise ConfigError(f"{there} draws images of {channels} channels, but {here}: name a model of such images")

    def load_model(self, folder: str | Path) -> OwnModel:
        """Read a frozen network from a folder that holds one, onto the run's device."""
        remedy = f"name a folder that `python -m synth.train` wrote with the source {self.config.name!r}"
        return self.network.load(folder, remedy).to(self.run.device)

    def build_model(self) -> OwnModel:
        """Read the frozen network that `weights` names.

        Raises:
            NotFittedError: if it was to be learned and the first task did not pass.
        """
        if self.config.weights is None:
            remedy = "fit task 0 too, or name the folder of a trained one with synth.weights"
            raise NotFittedError(f"{self.config.name} learns its generator on task 0, which has not passed: {remedy}")
        return self.load_model(self.config.weights)

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

    def save(self, directory: Path) -> None:
        """Write what the source keeps, and the network if it was learned here."""
        super().save(directory)
        if self._model is not None and self.config.weights is None:
            self._model.save(directory)

    def describe(self) -> str:
        """Say how large the network is, and how long it is trained or where it comes from."""
        model, origin = self.new_model(), f"trained on the first task, {self.training_steps()}"
        if self.config.weights is not None:
            model, origin = self.model, f"of {self.config.weights}"
        millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        return f"{millions:.1f} M parameters, {origin}; {super().describe()}"


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
