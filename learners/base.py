"""The life of a task. A learner is this class with a few hooks replaced; none of them needs super()."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from learners.memory import handed_exemplars, keep_exemplars, make_memory
from models.heads import HEADS
from models.incremental import IncrementalNet
from models.options import backbone_options
from models.timm_backbone import build_backbone
from synth.replay import Replay
from utils.data.batches import TOO_SMALL, Batch, Batches, test_batches
from utils.data.images import ImageSet, Samples
from utils.data.manager import DataManager, Task
from utils.data.transforms import ClassifierTransform, classifier_transform
from utils.run.carried import Carried, Items
from utils.run.config import RunConfig
from utils.run.errors import ConfigError
from utils.training import seeding
from utils.training.fit import Hooks, Step, Training, fit
from utils.training.run import Run
from utils.training.schedule import TrainConfig


class Learner(ABC):
    """A class-incremental classifier and what it carries from task to task.

    Subclasses register themselves with `LEARNERS.register(name)`, extend ``Config`` with the keys of their method,
    and replace hooks. `learn_task` calls the hooks in one fixed order. Inside it ``present`` stands for the new classes
    and ``past`` for the old ones; real images reach a learner in no other way.

    Args:
        config: the frozen Config of this very class.
        data: tasks and their images.
        run: folder, device, random keys.
        replay: how the past comes back; its ``source`` is None where it does not.
    """

    Config = RunConfig

    accepts: frozenset[str] = frozenset({"images", "features"})  # kinds of samples that it can replay
    needs_source = False
    upper_bound = False  # trains on real images of all seen classes
    uses_exemplars = False
    replay_kind: type[Replay] | None = None  # its own way of replay; None: the source's
    head = "linear"
    counters: tuple[str, ...] = ()  # whole numbers of its own that a checkpoint must hold
    eval_batch = 256  # images that are looked at together

    def __init__(self, config, data: DataManager, run: Run, replay: Replay):
        self.config, self.data, self.run, self.replay = config, data, run, replay
        self.transform = self.build_transform()
        self.memory = make_memory(config, data, replay, self.uses_exemplars)
        self.network = self.build_network()
        alone = [key for key in type(config).model_fields if key.endswith("batch_size") and getattr(config, key) == 1]
        if alone and self.network.least_batch(self.transform.size) > 1:
            raise ConfigError(f"{alone[0]}=1: {TOO_SMALL}")
        self.old_network: IncrementalNet | None = None
        self.present: Samples = ImageSet()
        self.past: Samples = ImageSet()
        self.choices: dict[int, list[int]] = {}  # new class -> its exemplars among its images, best first
        self.class_means: dict[int, Tensor] = {}

    # ------------------------------------------------------------------ the fixed order

    def learn_task(self, task: Task) -> None:
        """Learn one task. The order is fixed; every step is a hook with a complete default.

        ``present`` is there before ``before_training``, which may look at it, and ``past`` after it, since a source may
        be asked for it anew.
        """
        real = self.data.all_seen_images(task) if self.upper_bound else self.data.train_images(task)
        self.grow_network(task)
        self.replay.fit_before(task, real)
        self.present, self.past, self.choices = self.replay.present(task, real), ImageSet(), {}
        self.before_training(task)
        if task.num_old:
            self.past = self.replay.past(task)
        with self.run.timed("train"):
            self.train(task)
            self.after_training(task)
        self.replay.fit_after(task, real, self.past, handed_exemplars(self, task), self.network)
        if self.replay.source is not None:
            self.after_source_fit(task)
        self.old_network = self.network.frozen_copy()

    # ------------------------------------------------------------------ hooks, in order of their call

    def build_transform(self) -> ClassifierTransform:
        """Say what is done to images; default: what the data set is used to."""
        return classifier_transform(self.data.dataset, self.config.replay_resize)

    def build_network(self) -> IncrementalNet:
        """Build a network without classes, on the device, drawn from the run's seed."""
        seeding.seed_everything(self.run.seed, "network")
        backbone = build_backbone(self.config.convnet_type, backbone_options(self.config, self.data.dataset))
        network = IncrementalNet(backbone, HEADS[self.head](backbone.num_features)).to(self.run.device)
        return network.to(memory_format=torch.channels_last).eval()

    def grow_network(self, task: Task) -> None:
        """Add outputs for the task's classes."""
        self.network.grow(task.num_seen, seeding.generator(self.run.seed, task.index, "grow"))

    def before_training(self, task: Task) -> None:
        """Look at ``present``, once the source has looked at the new images."""

    def batches(self, task: Task) -> Batches:
        """Shuffle present, exemplars and past together."""
        loading = self.run.loading(self.transform, self.config.batch_size, task.index, "train", network=self.network)
        return self.replay.batches(self.present + self.memory.images, self.past, loading)

    @abstractmethod
    def train_config(self, task: Task) -> TrainConfig:
        """Return length, rate and optimiser of this task's training; each family of learners has keys for it."""

    def before_epoch(self, step: Step) -> None:
        """Prepare an epoch of the training, before its first step."""

    def compute_loss(self, batch: Batch, task: Task) -> dict[str, Tensor]:
        """Return named scalar terms, which are summed: cross-entropy over all seen classes."""
        targets = batch.labels if batch.soft_targets is None else batch.soft_targets
        return {"cross_entropy": F.cross_entropy(self.network(batch.images), targets)}

    def after_backward(self, step: Step) -> None:
        """Change reduced, unclipped gradients."""

    def after_step(self, step: Step) -> None:
        """Look at the network after a step."""

    def train(self, task: Task) -> None:
        """Train the network on the task's batches; a task of no step builds none."""
        config = self.train_config(task)
        if not (config.epochs or config.steps):
            return
        extra = SimpleNamespace(state_dict=self.extra_state, load_state_dict=self.load_extra_state)
        hooks = Hooks(self.before_epoch, self.after_backward, self.after_step, {"learner": extra})
        fit(self.network, self.batches(task), partial(self.compute_loss, task=task), config,
            Training(self.run, task, "train"), hooks)  # fmt: skip

    def after_training(self, task: Task) -> None:
        """Align, keep exemplars, compute prototypes. The default keeps exemplars if the learner uses them."""
        if self.uses_exemplars:
            keep_exemplars(self, task)

    def after_source_fit(self, task: Task) -> None:
        """Go on once the source has learned the task; for learners that retrain their head then."""

    def extra_state(self) -> dict[str, Tensor]:
        """Return tensors that a checkpoint must hold beside network and exemplars: the counters."""
        return {name: torch.tensor(getattr(self, name)) for name in self.counters}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Take over what ``extra_state`` gave."""
        for name in self.counters:
            setattr(self, name, int(state[name]))

    @torch.no_grad()
    def predict(self, images: ImageSet) -> dict[str, Tensor]:
        """Score every image.

        Args:
            images: N images, as stored.

        Returns:
            "cnn": logits (N, num_seen) on the CPU; "nme", if the learner has class means: negative squared distances
            of normalised features to them, (N, num_seen).
        """
        features = self.extract_features(images)
        logits = torch.cat([self.network.head(chunk.to(self.run.device)).cpu() for chunk in features.split(4096)])
        if len(self.class_means) < self.network.num_classes:
            return {"cnn": logits}
        means = torch.stack([self.class_means[label] for label in sorted(self.class_means)])
        unit = features / (features.norm(dim=1, keepdim=True) + 1e-8)
        return {"cnn": logits, "nme": -torch.cdist(unit, means).square()}

    # ------------------------------------------------------------------ parts for hooks to use

    @torch.no_grad()
    def extract_features(self, images: ImageSet) -> Tensor:
        """Compute features of un-augmented images, float32 (N, D) on the CPU, in stored order."""
        self.network.eval()
        return map_images(self, images, lambda x, _: self.network.features(x))

    def carried(self) -> list[Carried]:
        """Name what it carries to the next task; see `learners.run.state` for the files."""
        if self.upper_bound:  # it goes back to all of them
            items = Items("real images", False, 1.0, lambda: dict(enumerate(self.data.class_counts)), lambda label: 0)
            exemplars = Carried("exemplars", nbytes=self.data.all_real_bytes, items=items)
        else:
            files = sum(part.nbytes for part in self.memory.images.parts if not isinstance(part.images, Tensor))
            items = Items("real exemplars", False, 1.0, self.memory.counts, self.memory.drop_last)
            exemplars = Carried("exemplars", ("exemplars.safetensors",), files, items)
        prototypes = Carried("prototypes", ("class_means.safetensors", "extra.safetensors"))
        return [exemplars, Carried("network", ("network.safetensors",)), prototypes]


def map_images(learner: Learner, images: ImageSet, function: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """Return what a function says of un-augmented images, float32 on the CPU, a row for each in stored order.

    Args:
        learner: prepares the images, ``eval_batch`` at a time.
        images: at least one.
        function: a batch, float (B, 3, H, W), and which of the images it holds, to (B, ...).
    """
    if (ledger := learner.run.ledger).foresees and len(images) > ledger.rows:
        few = images.take(torch.arange(ledger.rows))
        rows = ledger.times(len(images) / ledger.rows, lambda: map_images(learner, few, function))
        return rows[torch.arange(len(images)) % ledger.rows]
    pieces, start = [], 0
    for x in test_batches(images, learner.transform, learner.eval_batch, learner.run.device, learner.run.num_workers):
        with learner.run.runtime.autocast():
            pieces.append(function(x, slice(start, start + len(x))).float().cpu())
        start += len(x)
    return torch.cat(pieces)
