"""DDDR's classifier: a ResNet from scratch on real, generated and replayed images."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from learners import LEARNERS
from learners.dddr.separate_replay import SeparateReplay
from models.incremental import IncrementalNet
from utils.data.manager import Task
from utils.run.config import BatchSize, Decay, Factor, PerClass, Rate, Width
from utils.training import seeding
from utils.training.fit import Step
from utils.training.schedule import TrainConfig


@LEARNERS.register("dddr")
class DDDR(SeparateReplay):
    """Cross-entropy on the present, weighted cross-entropy and distillation on replay, supervised contrast.

    Liang et al., "Diffusion-Driven Data Replay: A Novel Approach to Combat Forgetting in Federated Class Continual
    Learning", ECCV 2024, arXiv:2409.01128, with one client: the mean over clients is then its network, and its rounds
    of local epochs are one training, in which every round has a new optimiser.
    """

    class Config(SeparateReplay.Config):
        w_kd: Factor = Field(10.0, description="weight of distillation from the old network on replayed images")
        w_scl: Factor = Field(1.0, description="weight of the supervised contrastive loss on current images")
        base_cur_size: PerClass = Field(50, description="generated images per class in the first task")
        cur_size: PerClass = Field(50, description="generated images per new class that join later tasks' real ones")
        convnet_type: str = Field("resnet18", description="a backbone of ours or any timm model with its weight tag")
        com_round: int = Field(100, ge=1, description="rounds of every task; with local_ep the number of epochs")
        local_ep: int = Field(5, ge=1, description="epochs per round")
        replay_resize: Literal["bicubic", "bilinear", "nearest"] = Field("bilinear", description="of drawn images")
        batch_size: BatchSize = Field(128, description="current images per step")
        lr: Rate = Field(0.01, description="SGD's rate, constant")
        momentum: float = Field(0.9, ge=0, lt=1, description="of SGD")
        weight_decay: Decay = Field(5e-4, description="of SGD")
        scl_hidden: Width = Field(4096, description="width of the contrastive head's hidden layer")
        scl_size: Width = Field(256, description="width of the contrastive head's output")

    def build_network(self) -> IncrementalNet:
        network = super().build_network()
        seeding.seed_everything(self.run.seed, "contrastive-head")
        num_features, hidden = network.backbone.num_features, self.config.scl_hidden
        projection = nn.Sequential(nn.Linear(num_features, hidden), nn.GELU(), nn.Linear(hidden, self.config.scl_size))
        network.projection = projection.to(self.run.device)
        return network

    def train_config(self, task: Task) -> TrainConfig:
        """Return the same for every task."""
        config, epochs = self.config, self.config.com_round * self.config.local_ep
        return TrainConfig(config.lr, epochs, momentum=config.momentum, weight_decay=config.weight_decay)

    def before_epoch(self, step: Step) -> None:
        """Begin a round without the last one's momentum, as a client does."""
        if step.epoch % self.config.local_ep == 0:
            step.optimizer.state.clear()

    def contrasted(self, features: Tensor) -> Tensor:
        """Return projections (B, scl_size)."""
        return self.network.projection(features)
