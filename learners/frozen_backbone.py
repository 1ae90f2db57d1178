"""What learners on a frozen backbone share: training it first where nobody else has, and class-mean prototypes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from learners.base import Learner
from learners.kept_features import KeptFeatures
from models.frozen import Frozen, weight_bytes
from models.heads import CosineHead, Head, LinearHead
from models.incremental import IncrementalNet
from models.options import backbone_options
from models.timm_backbone import build_backbone, end_after_block, has_weights
from synth.replay import Replay
from utils.data.batches import Batch, ImageBatches
from utils.data.datasets.base import IMAGENET_MEAN, IMAGENET_STD
from utils.data.images import ImageSet
from utils.data.manager import DataManager, Task
from utils.data.transforms import ClassifierTransform, classifier_transform
from utils.run.carried import Carried
from utils.run.config import BatchSize, Decay, Place, Rate, RunConfig
from utils.run.files import explained_refusal, require_writable
from utils.run.log import log
from utils.training import seeding
from utils.training.fit import Training, fit
from utils.training.run import Run
from utils.training.schedule import TrainConfig

NORMALIZE = {
    "none": ((0.0,) * 3, (1.0,) * 3), "0.5": ((0.5,) * 3, (0.5,) * 3), "imagenet": (IMAGENET_MEAN, IMAGENET_STD)
}  # fmt: skip


class FrozenBackboneLearner(Learner):
    """A learner whose backbone never changes after it was loaded, or after the first task has trained it."""

    class Config(RunConfig):
        shelves: ClassVar[set[str]] = {"feature_cache"}

        shuffle: bool = Field(False, description="permute the class order with the seed")
        normalize: Literal["none", "0.5", "imagenet", "dataset"] = Field(
            "none", description="pixels: none: in [0, 1]; 0.5: in [-1, 1]; imagenet: by its mean; dataset: by its own"
        )
        batch_size: BatchSize = Field(48, description="images per step of the first task")
        features_from: int | None = Field(None, ge=0, le=1000, description="ViT's block whose class token is taken")
        feature_cache: Place | None = Field(None, description="folder of frozen features for other runs; null: none")
        pretrain_epochs: int = Field(0, ge=0, description="epochs that train the backbone on the first task; 0: none")
        pretrain_lr: Rate = Field(1e-3, description="AdamW's rate there, with cosine decay")
        pretrain_weight_decay: Decay = Field(0.05, description="AdamW's there")
        pretrain_batch_size: BatchSize = Field(128, description="images per step there")

    head = "cosine"

    def __init__(self, config, data: DataManager, run: Run, replay: Replay):
        super().__init__(config, data, run, replay)
        folder = None if config.feature_cache is None else Path(config.feature_cache)
        if folder is not None:
            with explained_refusal(f"feature_cache={config.feature_cache!r}"):
                require_writable(folder)
        self.kept = KeptFeatures(folder, self.features_made_by)

    def build_transform(self) -> ClassifierTransform:
        """Normalise as the backbone's weights want it."""
        dataset = self.data.dataset
        mean, std = NORMALIZE.get(self.config.normalize, (dataset.mean, dataset.std))
        return classifier_transform(replace(dataset, mean=mean, std=std), self.config.replay_resize)

    def build_network(self) -> IncrementalNet:
        seeding.seed_everything(self.run.seed, "network")
        name, options = self.config.convnet_type, backbone_options(self.config, self.data.dataset)
        network = build_backbone(name, options).to(self.run.device)
        if self.config.features_from is not None:
            end_after_block(network, self.config.features_from)
        # Checkpoints hold weights that are nowhere else: trained here or drawn at random.
        self.frozen = Frozen(network, learned=self.config.pretrain_epochs > 0 or not has_weights(name, options))
        if not self.frozen.learned:
            self.frozen.freeze(self.run.runtime.bf16)
        backbone = self.build_backbone(self.frozen)
        return IncrementalNet(backbone, self.build_head(backbone.num_features)).to(self.run.device).eval()

    def build_backbone(self, frozen: Frozen) -> torch.nn.Module:
        """Return what stands before the head; default: the frozen network itself."""
        return frozen

    def build_head(self, num_features: int) -> Head:
        """Return what turns features into logits; default: cosines to class vectors."""
        return CosineHead(num_features)

    def before_training(self, task: Task) -> None:
        """Train the backbone on the first task if the config wants it."""
        config = self.config
        if task.index == 0 and config.pretrain_epochs:
            schedule = TrainConfig(config.pretrain_lr, config.pretrain_epochs, optimizer="adamw", schedule="cosine",
                                   weight_decay=config.pretrain_weight_decay)  # fmt: skip
            self.pretrain(task, schedule, config.pretrain_batch_size, LinearHead)
        elif task.index == 0 and self.frozen.learned:
            log.warning("The backbone is frozen at random weights: give it weights, or train it with pretrain_epochs")
            self.frozen.freeze(self.run.runtime.bf16)

    def pretrain(self, task: Task, schedule: TrainConfig, batch_size: int, head: type[Head]) -> None:
        """Train the backbone under a head of its own on the task's real images, then freeze it."""
        backbone = self.frozen.network.requires_grad_(True)
        module = IncrementalNet(backbone, head(backbone.num_features)).to(self.run.device)
        module.grow(task.num_seen, seeding.generator(self.run.seed, task.index, "pretrain-head"))
        loading = self.run.loading(self.transform, batch_size, task.index, "pretrain", network=module)
        batches = ImageBatches(self.present, None, loading)
        with self.run.timed("train"):
            fit(module, batches, partial(_classify, module), schedule, Training(self.run, task, "pretrain"))
        self.frozen.freeze(self.run.runtime.bf16)

    def carried(self) -> list[Carried]:
        """Name the backbone apart unless it was learned here."""
        nbytes = 0 if self.frozen.learned else weight_bytes(self.frozen.network)
        return [*super().carried(), Carried("frozen", nbytes=nbytes, frozen=True)]

    def extract_features(self, images: ImageSet) -> Tensor:
        """Return the frozen backbone's features of un-augmented images, computed once for each image."""
        return self.kept.of(images, super().extract_features)

    def features_made_by(self) -> str:
        """Return what shapes a feature beside its image, down to the last bits."""
        config, runtime, device = self.config, self.run.runtime, self.run.runtime.device
        network = (type(self.network.backbone).__name__, config.convnet_type, config.backbone_args, config.stem,
                   config.features_from, self.frozen.fingerprint())  # fmt: skip
        card = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.get_num_threads()
        machine = (torch.__version__, device.type, card, runtime.bf16, self.eval_batch)
        return repr((network, self.transform.describe(), machine))

    @torch.no_grad()
    def set_prototypes(self, images: ImageSet) -> None:
        """Give the classes of these images their mean feature, not normalised before, as class vector."""
        features = self.extract_features(images)
        for label in images.classes:
            self.network.head.weight[label] = features[images.labels == label].mean(0).to(self.run.device)


def _classify(module: IncrementalNet, batch: Batch) -> dict[str, Tensor]:
    return {"cross_entropy": F.cross_entropy(module(batch.images), batch.labels)}
