"""GUIDE: replay drawn inside the training step and bent by the classifier that is being trained."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from learners import LEARNERS
from learners.base import Learner
from learners.guide.batches import RenewedBatches
from learners.guide.guidance import log_likelihood
from learners.guide.picture import picture
from learners.guide.replay import Guided
from synth.ddpm.words import complete, drop_switches
from synth.requests import Requests
from synth.samplers import Bend
from utils.data.batches import Batch
from utils.data.images import ImageSet
from utils.data.manager import Task
from utils.data.transforms import ClassifierTransform, classifier_transform, match_channels, resize_to_square
from utils.run.config import BatchSize, Decay, Factor, Rate, RunConfig
from utils.run.errors import ConfigError
from utils.training import seeding
from utils.training.schedule import TrainConfig


@LEARNERS.register("guide")
class GUIDE(Learner):
    """Cross-entropy on real new images and on replay that the classifier pulls over its decision boundary.

    Cywinski et al., "GUIDE: Guidance-based Incremental Learning with Diffusion Models", 2024, arXiv:2403.03938. At
    every denoising step the classifier's gradient shifts images of old classes toward the new class that they are
    nearest to (`learners.guide.guidance`); their label stays. Without a source it is finetuning in GUIDE's setting.
    """

    class Config(RunConfig):
        shuffle: bool = Field(False, description="permute the class order with the seed")
        convnet_type: str = Field("preact_resnet18", description="a backbone of ours or any timm model")
        batch_size: BatchSize = Field(256, description="images per step; 1 / (task + 1) of them are real")
        classifier_init_lr: Rate = Field(0.1, description="learning rate of the first task, falling to 0")
        classifier_lr: Rate = Field(0.01, description="learning rate of later tasks, falling to 0")
        disjoint_classifier_init_num_steps: int = Field(5000, ge=1, description="steps of the first task")
        disjoint_classifier_num_steps: int = Field(2000, ge=1, description="steps of every later task")
        classifier_weight_decay: Decay = Field(5e-4, description="on all parameters")
        classifier_augmentation: bool = Field(True, description="crop, rotation, flip, colours, erasing; false: none")
        use_new_grad: bool = Field(True, description="bend replay by the classifier that is being trained")
        guid_to_new_classes: bool = Field(True, description="toward the likeliest new class; false: off its own label")
        use_old_grad: bool = Field(False, description="bend replay by the classifier of the task before, by its label")
        negate_old_grad: bool = Field(False, description="away from its own label; false: toward it")
        # Each image draws its factor of the gradient between the two ends; null: the other end
        classifier_scale_min_new: Factor | None = Field(None, description="smallest factor with use_new_grad")
        classifier_scale_max_new: Factor | None = Field(None, description="largest factor with use_new_grad")
        classifier_scale_min_old: Factor | None = Field(None, description="smallest factor with use_old_grad")
        classifier_scale_max_old: Factor | None = Field(None, description="largest factor with use_old_grad")
        # x0: at the predicted clean image, without a backward pass of the generator (MPGD, arXiv:2311.16424)
        guide_gradient: Literal["xt", "x0"] = Field("xt", description="with respect to what the replay is bent")
        trim_logits: bool = Field(True, description="leave classes not seen yet out of the bending softmax")
        guid_generation_interval: int = Field(1, ge=1, description="steps from one draw of replay to the next")
        timestep_respacing: str = Field("ddim50", description="sampling steps of the replay in training")
        use_ddim: bool = Field(True, description="false: ancestral sampling of the replay in training")
        # reference: each label by chance, as GUIDE has it; balanced: equally many of each
        label_draw: Literal["reference", "balanced"] = Field("reference", description="how labels of replay are drawn")
        eval_logits: Literal["all", "seen"] = Field("all", description="all: classes not seen yet compete as well")

        @classmethod
        def translate(cls, raw: dict[str, Any]) -> dict[str, Any]:
            """Read GUIDE's flags of the classifier run; those that its command leaves out have its defaults.

            Raises:
                ConfigError: if ``depth`` is not 18, a switch has a value that is not there, or a command leaves out a
                    flag whose default is not known.
            """
            given = {key: value for key, value in drop_switches(raw).items() if value is not None or key == "synth"}
            if str(depth := given.pop("depth", 18)) != "18":
                raise ConfigError(f"{depth=}: only 18 is there, the published one; other networks go by convnet_type")
            given.pop("lr", None)  # the diffusion run's, which GUIDE's command of the classifier names to no effect
            return given if raw.get("cl_method") is None else complete(given, "classifier")

        @model_validator(mode="after")
        def _one_gradient_with_a_scale(self) -> GUIDE.Config:
            if self.use_old_grad and self.use_new_grad:
                raise ValueError("use_old_grad and use_new_grad exclude each other: set one of them to false")
            if self.negate_old_grad and not self.use_old_grad:
                raise ValueError("negate_old_grad=true acts with use_old_grad=true alone: set both or none")
            which, scale = "new" if self.use_new_grad else "old", self.scale
            if scale is None and (self.use_old_grad or self.use_new_grad) and self.synth is not None:
                needed = f"classifier_scale_min_{which} or classifier_scale_max_{which}"
                raise ValueError(f"model_name={self.model_name!r}: use_{which}_grad needs {needed}, or be false")
            if scale is not None and scale[0] > scale[1]:
                raise ValueError(f"classifier_scale_min_{which}={scale[0]} is above its max, {scale[1]}")
            if self.synth is not None and not self.synth.need_syn_imgs:
                raise ValueError("synth.need_syn_imgs=false: replay of guide is drawn anew in training; set it to true")
            return self

        @property
        def scale(self) -> tuple[float, float] | None:
            """The smallest and largest factor of the gradient; None where none is given."""
            which = "new" if self.use_new_grad else "old"
            ends = [getattr(self, f"classifier_scale_{end}_{which}") for end in ("min", "max")]
            given = [end for end in ends if end is not None]
            return (given[0], given[-1]) if given else None

    head = "plain"
    accepts = frozenset({"images"})
    replay_kind = Guided
    num_seen = 0
    counters = ("num_seen",)

    def __init__(self, config, data, run, replay):
        super().__init__(config, data, run, replay)
        if not self.transform.whole_batch:
            remedy = "take a data set of up to 64 pixels, such as imagenet100_64"
            raise ConfigError(f"{config.model_name} keeps images in memory, {config.dataset!r} is in files: {remedy}")
        if replay.source is not None:
            replay.network = self.network
            replay.bender = self.bend if config.use_new_grad or config.use_old_grad else None

    # ------------------------------------------------------------------ network and training

    def build_transform(self) -> ClassifierTransform:
        """Take the generator's range, [-1, 1], and GUIDE's augmentation, whatever the data set is used to."""
        augmentation = "strong" if self.config.classifier_augmentation else "none"
        dataset = replace(self.data.dataset, augmentation=augmentation, mean=(0.5,) * 3, std=(0.5,) * 3)
        return classifier_transform(dataset, self.config.replay_resize)

    def grow_network(self, task: Task) -> None:
        """Add all outputs in the first task."""
        self.num_seen = task.num_seen
        self.network.grow(self.data.num_classes, seeding.generator(self.run.seed, "grow"))

    def train_config(self, task: Task) -> TrainConfig:
        config = self.config
        steps, lr = config.disjoint_classifier_num_steps, config.classifier_lr
        if task.index == 0:
            steps, lr = config.disjoint_classifier_init_num_steps, config.classifier_init_lr
        num_real = sum(self.data.class_counts[0 if self.upper_bound else task.num_old : task.num_seen])
        hold = max(1, num_real // config.batch_size)  # steps of its epochs, in which the rate stays
        return TrainConfig(lr, steps=steps, weight_decay=config.classifier_weight_decay, schedule="linear", hold=hold)

    def batches(self, task: Task) -> RenewedBatches:
        """Take a share 1 / (task + 1) of real images, and replay of the others."""
        draw, batch_size = None, self.config.batch_size
        if self.replay.source is not None and task.index > 0:
            draw, batch_size = partial(self.replay.draw_step, task), batch_size // (task.index + 1)
        loading = self.run.loading(self.transform, batch_size, task.index, "train", network=self.network)
        self.training_batches = RenewedBatches(self.present, draw, self.config.guid_generation_interval, loading)
        return self.training_batches

    def compute_loss(self, batch: Batch, task: Task) -> dict[str, Tensor]:
        return {"cross_entropy": F.cross_entropy(self.network(batch.images)[:, : task.num_seen], batch.labels)}

    def logits(self, images: ImageSet) -> Tensor:
        """Compute logits of all classes, (N, num_classes), on the CPU."""
        return super().predict(images)["cnn"]

    def predict(self, images: ImageSet) -> dict[str, Tensor]:
        logits = self.logits(images)
        return {"cnn": logits if self.config.eval_logits == "all" else logits[:, : self.num_seen]}

    # ------------------------------------------------------------------ what bends the replay

    def bend(self, task: Task, requests: Requests) -> Bend:
        """Return what sampling of these requests follows uphill: see `synth.diffusion`."""
        labels, scales = requests.labels.to(self.run.device), self.scales(requests).to(self.run.device)
        judge = self.old_network if self.config.use_old_grad else self.network

        def scaled(x0: Tensor) -> Tensor:
            view = resize_to_square(match_channels(x0, 3), self.transform.size, self.config.replay_resize)
            return scales * log_likelihood(self.config, judge(view), labels, task.num_old, task.num_seen)

        return Bend(scaled, self.config.guide_gradient)

    def scales(self, requests: Requests) -> Tensor:
        """Draw one factor for each image, (N,), the same in all of its denoising steps."""
        low, high = self.config.scale
        generators = replace(requests, key=(*requests.key, "scale")).generators()
        return low + (high - low) * torch.stack([torch.rand((), generator=generator) for generator in generators])

    def after_training(self, task: Task) -> None:
        """Lay out the last replay, and what bending does to some images."""
        if self.replay.source is not None and task.index > 0:
            self.replay.show(task, self.training_batches.replay)
            if self.replay.bender is not None:
                self.run.panels.write(f"guidance_{task.index}", picture(self, task))
