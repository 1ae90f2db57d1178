"""The life of a task. A learner is this class with a few hooks replaced; none of them needs super()."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from learners.backbones import backbone_options
from learners.exemplars import ExemplarKeeper
from learners.run.initial import train_or_take
from models.heads import HEADS
from models.incremental import IncrementalNet
from models.timm_backbone import build_backbone
from synth.bank import Bank
from synth.base import ReplaySource
from synth.escort.batches import CopiedBatches
from synth.escort.copies import TrainingCopies
from synth.stored import StoredSources
from utils.data.batches import Batch, Batches, ImageBatches, test_batches
from utils.data.images import ImageSet
from utils.data.manager import DataManager, Task
from utils.data.transforms import ClassifierTransform, classifier_transform
from utils.run.config import RunConfig
from utils.training import seeding
from utils.training.fit import TrainConfig, fit
from utils.training.run import Run

EVAL_BATCH = 256


class Learner(ExemplarKeeper, ABC):
    """A class-incremental classifier and what it carries from task to task.

    Subclasses register themselves with `LEARNERS.register(name)`, extend ``Config`` with the keys of their method,
    and replace hooks. `learn_task` calls the hooks in one fixed order.

    Args:
        config: the frozen Config of this very class.
        data: tasks and their images.
        run: folder, device, random keys.
        source: plays the past back; None for a learner without replay.
        bank: keeps the source's images on disk; given exactly if there is a source.
    """

    class Config(RunConfig):
        pass

    accepts: frozenset[str] = frozenset({"images"})  # kinds of replay that this learner can use
    needs_source = False
    upper_bound = False  # trains on real images of all seen classes
    uses_exemplars = False
    first_loss: str | None = None  # names how the first task is trained, for `init_from`; None: in a way of its own
    guides = False  # draws replay itself, bent by its classifier: its source must be one that can be guided
    head = "linear"
    eval_logits = "seen"  # or "all": whether classes not seen yet compete in `predict`

    def __init__(
        self, config, data: DataManager, run: Run, source: ReplaySource | None = None, bank: Bank | None = None
    ):
        self.config, self.data, self.run, self.source, self.bank = config, data, run, source, bank
        takes_stored = source is not None and config.synth.source_dir is not None
        self.source_fitter = StoredSources(source, data) if takes_stored else source
        self.transform = self.build_transform()
        self.memory = self.build_memory()
        self.network = self.build_network()
        self.old_network: IncrementalNet | None = None
        self.replay = ImageSet()
        self.class_means: dict[int, Tensor] = {}

    # ------------------------------------------------------------------ the fixed order

    def learn_task(self, task: Task) -> None:
        """Learn one task. The order is fixed; every step is a hook with a complete default."""
        images = self.data.train_images(task)
        self.grow_network(task)
        # A bank of another run's images, taken as it is, needs no source that could draw them.
        fits = self.source is not None and self.config.synth.need_syn_imgs
        if fits:
            with self.run.timed("fit_source"):
                self.source_fitter.fit_before(task, images)
            self.keep_replay(task)
        self.before_training(task)
        self.replay = self.make_replay(task)
        with self.run.timed("train"):
            train_or_take(self, task)
            self.after_training(task)
        if fits and (task.num_seen < self.data.num_classes or self.config.synth.fit_after_last_task):
            with self.run.timed("fit_source"):
                self.source_fitter.fit_after(task, images, self.replay, self.compressed_picks(task), self.network)
            self.keep_replay(task)
        if self.source is not None:
            self.after_source_fit(task)
        self.old_network = self.network.frozen_copy()

    # ------------------------------------------------------------------ hooks, in order of their call

    def build_transform(self) -> ClassifierTransform:
        """What is done to images; default: what the data set is used to."""
        return classifier_transform(self.data.dataset, self.config.replay_resize)

    def build_network(self) -> IncrementalNet:
        """A new network without classes, on the device, drawn from the run's seed."""
        seeding.seed_everything(self.run.seed, "network")
        backbone = build_backbone(self.config.convnet_type, backbone_options(self.config, self.data.dataset))
        network = IncrementalNet(backbone, HEADS[self.head](backbone.num_features)).to(self.run.device)
        return network.to(memory_format=torch.channels_last).eval()

    def grow_network(self, task: Task) -> None:
        """Add outputs for the task's classes."""
        self.network.grow(task.num_seen, seeding.generator(self.run.seed, task.index, "grow"))

    def keep_replay(self, task: Task) -> None:
        """Called when the source has learned: with `replay: keep`, draw the task's classes once and for all."""
        if self.config.synth.replay == "keep" and self.source.fitted_classes.issuperset(task.classes):
            with self.run.timed("generate"):
                self.bank.draw(self.source, task, task.classes)

    def before_training(self, task: Task) -> None:
        """Called after the source has looked at the new images and before replay is made."""

    def current_images(self, task: Task) -> ImageSet:
        """What stands for the present in training: the task's real images."""
        return self.data.train_images(task)

    def make_replay(self, task: Task) -> ImageSet:
        """Generated images of the old classes; empty without a source and in the first task."""
        if self.source is None or task.num_old == 0:
            return ImageSet()
        with self.run.timed("generate"):
            if self.config.synth.replay == "keep":
                return self.bank.stored(range(task.num_old))
            return self.bank.redraw(self.source, task)

    def batches(self, task: Task) -> Batches:
        """Real images, exemplars and replay, shuffled together."""
        return self.make_batches(task, self.current_images(task) + self.memory.images, self.replay)

    @abstractmethod
    def train_config(self, task: Task) -> TrainConfig:
        """Length, rate and optimiser of this task's training; each family of learners has its own keys for it."""

    def before_epoch(self, task: Task, epoch: int) -> None:
        """Called before the first step of an epoch."""

    def compute_loss(self, batch: Batch, task: Task) -> dict[str, Tensor]:
        """Named scalar terms, which are summed: cross-entropy over all seen classes."""
        return {"cross_entropy": F.cross_entropy(self.network(batch.images), batch.labels)}

    def after_backward(self, task: Task, batch: Batch) -> None:
        """Called with reduced, unclipped gradients."""

    def after_step(self, task: Task, step: int) -> None:
        """Called with the number of steps done."""

    def train(self, task: Task) -> None:
        """Train the network on the task's batches."""
        self.fit(task, "train", self.network, self.batches(task), partial(self.compute_loss, task=task),
                 self.train_config(task))  # fmt: skip

    def after_training(self, task: Task) -> None:
        """Align, keep exemplars, compute prototypes. The default keeps exemplars if the learner uses them."""
        if self.uses_exemplars:
            self.keep_herded_exemplars(task)

    def after_source_fit(self, task: Task) -> None:
        """Called after the source has learned the task, for learners that retrain their head then."""

    def extra_state(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint must hold beside network and exemplars."""
        return {}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Take over what ``extra_state`` gave."""

    @torch.no_grad()
    def predict(self, images: ImageSet) -> dict[str, Tensor]:
        """Scores of every image.

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

    @classmethod
    def saves_backbone(cls, config) -> bool:
        """Whether checkpoints hold the backbone's weights; else they come from where the run had them."""
        return True

    def frozen_bytes(self) -> int:
        """Bytes of weights that are used as they came and stay the same for every task."""
        return 0

    def count_draws(self) -> int:
        """Images that the whole run draws to replay them, for `--plan`; of copies, the most that it may come to."""
        if self.source.makes_copies:
            return self.source.most_copies(self.data)
        wanted = self.config.synth.syn_per_class
        counts = [count if wanted is None else wanted for count in self.data.class_counts]
        old = [self.data.task(index).num_old for index in range(self.data.num_tasks)]
        keeps = self.config.synth.replay == "keep"
        return sum(counts[: old[-1]]) if keeps else sum(sum(counts[:seen]) for seen in old)

    # ------------------------------------------------------------------ what a checkpoint holds

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict]:
        """Everything that the next task needs but the source: file stem -> tensors, and JSON."""
        exemplars, layout = self.memory.state()
        tensors = {
            "network": self.network.state_dict(),
            "exemplars": exemplars,
            "class_means": {str(label): mean for label, mean in self.class_means.items()},
            "extra": self.extra_state(),
        }
        return tensors, {**self.network.layout(), "exemplars": layout}

    def restore(self, tensors: dict[str, dict[str, Tensor]], state: dict) -> None:
        """Take over what ``state`` gave; the learner must be new."""
        self.network.rebuild(state)
        self.network.load_state_dict(tensors["network"])
        self.old_network = self.network.frozen_copy()
        self.memory.load(tensors["exemplars"], state["exemplars"])
        self.class_means = {int(label): mean for label, mean in tensors["class_means"].items()}
        self.load_extra_state(tensors["extra"])

    # ------------------------------------------------------------------ parts for hooks to use

    def fit(self, task: Task, purpose: str, module, batches: Batches, loss_fn, config: TrainConfig):
        """`utils.training.fit.fit` with this learner's hooks."""
        return fit(
            module, batches, loss_fn, config, run=self.run, task=task.index, purpose=purpose,
            before_epoch=partial(self.before_epoch, task), after_backward=partial(self.after_backward, task),
            after_step=partial(self.after_step, task), stateful={"learner": _Extra(self)},
        )  # fmt: skip

    def make_batches(
        self, task: Task, images: ImageSet, replay: ImageSet, purpose: str = "train", batch_size: int | None = None
    ) -> ImageBatches:
        """Batches of real images and replay under this run's random key; null: the config's ``batch_size``."""
        options = {
            "transform": self.transform, "batch_size": batch_size or self.config.batch_size,
            "key": (self.run.seed, task.index, purpose), "device": self.run.device,
            "num_workers": self.run.num_workers, "shard": self.run.runtime.shard,
        }  # fmt: skip
        if self.source is not None and self.source.makes_copies:
            return CopiedBatches(images, replay, TrainingCopies(self.bank, images, replay), **options)
        return ImageBatches(images, replay, **options)

    @torch.no_grad()
    def extract_features(self, images: ImageSet) -> Tensor:
        """Features of un-augmented images, float32 (N, D) on the CPU, in stored order."""
        self.network.eval()
        pieces = []
        for batch in test_batches(images, self.transform, EVAL_BATCH, self.run.device, self.run.num_workers):
            with self.run.runtime.autocast():
                pieces.append(self.network.features(batch).float().cpu())
        return torch.cat(pieces)


class _Extra:
    """A learner's extra state in the form that `fit` saves."""

    def __init__(self, learner: Learner):
        self.learner = learner

    def state_dict(self) -> dict:
        return self.learner.extra_state()

    def load_state_dict(self, state: dict) -> None:
        self.learner.load_extra_state(state)
