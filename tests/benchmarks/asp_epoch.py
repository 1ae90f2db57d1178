"""One epoch of ASP's base session: ours against the same mathematics in the manner of the original.

`python -m tests.benchmarks.asp_epoch`; exit code 1 if a ratio falls short. Run it on an idle machine.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from functools import partial
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F

from learners import LEARNERS
from learners.asp.learner import ASP
from learners.run.configure import build_config
from synth.replay import Replay
from tests.benchmarks.parts import cpu_run
from tests.benchmarks.timing import alternate, fast_precision, peak_memory, segments, verdict
from tests.support.tiny_asp import base_loss_as_tokens, encode_layers, prompted_as_tokens
from utils.data.batches import test_batches
from utils.data.datasets import Dataset
from utils.data.images import ImageSet
from utils.data.manager import DataManager, Split, Task
from utils.training.fit import Hooks, Step, Training, fit
from utils.training.run import Run

# 65 tokens, and as many classes, images per step and test images for each training image as with CIFAR-100.
VIT = {"patch_size": 8, "embed_dim": 192, "depth": 6, "num_heads": 3}
SIDE, CLASSES, PER_CLASS, TEST_PER_CLASS, BATCH = 64, 60, 10, 2, 48
SEGMENTS = 3
CONFIG = {
    "model_name": "asp", "dataset": "bench", "init_cls": CLASSES, "increment": 1, "device": "cpu", "num_workers": 0,
    "convnet_type": "vit_tiny_patch16_224", "pretrained": False, "backbone_args": VIT, "batch_size": BATCH,
    "tuned_epoch": 1, "deduplicate_anchors": True,
}  # fmt: skip


def photographs(per_class: int, seed: int, side: int = SIDE) -> ImageSet:
    """Soft random colours, as photographs have them."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(CLASSES * per_class, 3, 6, 6, generator=generator)
    pixels = F.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1)
    return ImageSet.of((pixels * 255).to(torch.uint8), torch.arange(CLASSES).repeat(per_class))


def begin(run: Run, side: int = SIDE, **keys) -> tuple[ASP, Task]:
    """The learner at the start of its base session, with these keys in the place of its own."""
    names = [str(label) for label in range(CLASSES)]
    images, half = (photographs(PER_CLASS, 0, side), photographs(TEST_PER_CLASS, 1, side)), (0.5,) * 3
    data = DataManager(Dataset("bench", *images, names, side, 3, True, half, half, "vit_crop", ""),
                       Split(init_cls=CLASSES, increment=1, shuffle=False))  # fmt: skip
    config, _ = build_config({**CONFIG, **keys})
    learner = LEARNERS["asp"](config, data, run, Replay(config, None, data, run, run.folder))
    task = next(iter(data.tasks()))
    learner.present = data.train_images(task)
    learner.grow_network(task)
    return learner, task


def our_epochs(folder: Path, precision: str):
    return epochs(*begin(cpu_run(folder, precision, num_workers=0)))


def epochs(learner: ASP, task: Task):
    """One epoch per call through the learner's own training, its anchor search, checkpoint and log included."""
    learner.before_training(task)  # queries of the training images, once for a whole run
    numbers, loss = count(), partial(learner.compute_loss, task=task)

    def epoch() -> int:
        training = Training(learner.run, task, f"bench-{next(numbers)}")
        config, hooks = learner.train_config(task), Hooks(learner.before_epoch)
        fit(learner.network, learner.batches(task), loss, config, training, hooks)
        return CLASSES * PER_CLASS

    return epoch


class Original:
    """Two ViTs, prompts as tokens, a copy of its anchor for every image, every query computed when it is asked for."""

    def __init__(self, folder: Path):
        self.learner, self.task = begin(cpu_run(folder, "fp32", num_workers=0))
        self.net, self.backbone = self.learner.network, self.learner.backbone
        vit = self.learner.frozen.network.network
        self.vits = vit, copy.deepcopy(vit)
        self.optimizer = torch.optim.SGD(self.net.parameters(), 0.01, 0.9, weight_decay=5e-4)
        self.images = self.learner.data.train_images(self.task)
        self.test_images = self.learner.data.test_images(range(CLASSES))
        self.num_epochs = 0

    def epoch(self) -> int:
        self.search_anchors()
        for batch in self.learner.batches(self.task).epoch(self.num_epochs):
            noise = torch.randn(2 * len(batch), *self.backbone.tip.flatten(1).shape)
            terms = self.terms(batch, noise)
            self.optimizer.zero_grad()
            sum(terms.values()).backward()
            self.optimizer.step()
        self.num_epochs += 1
        for _ in range(2):
            self.net.head(self.features(self.test_images)).argmax(1)
        return len(self.images)

    def terms(self, batch, noise) -> dict[str, torch.Tensor]:
        terms = base_loss_as_tokens(self.net, batch.images, batch.labels, self.anchors, noise, self.vits)
        return {name: {"anchor": 0.1, "kl": 1e-3}.get(name, 1) * term for name, term in terms.items()}

    def views(self, images: ImageSet):
        return test_batches(images, self.learner.transform, BATCH, torch.device("cpu"))

    @torch.no_grad()
    def features(self, images: ImageSet) -> torch.Tensor:
        return torch.cat([prompted_as_tokens(self.backbone, x, None, self.vits)[0] for x in self.views(images)])

    @torch.no_grad()
    def search_anchors(self) -> None:
        """One pass for the features, and one more of the query's ViT for the average prompt."""
        features, labels = self.features(self.images), self.images.labels
        means = torch.stack([features[labels == label].mean(0) for label in range(CLASSES)])
        cosines = F.normalize(features) @ F.normalize(means).T
        cosines[labels[:, None] != torch.arange(CLASSES)] = -2.0
        self.anchors = torch.cat([next(self.views(self.images.take([i]))) for i in cosines.argmax(0).tolist()])
        mu = torch.cat([encode_layers(self.backbone, self.vits[1](x))[0] for x in self.views(self.images)])
        self.backbone.average_prompt.copy_(mu.mean(0).view_as(self.backbone.tip))


def check_equal_losses(folder: Path) -> None:
    """Where copies of an anchor share their noise, both ways give one loss for the same weights, batch and anchors."""
    original = Original(folder)
    ours, task = original.learner, original.task
    torch.nn.init.normal_(ours.backbone.tip)  # prompts that matter, unlike the zeros that they start with
    ours.before_training(task)
    ours.before_epoch(Step(ours.run, task, "check", epoch=0, number=0, parameters=[]))
    original.anchors = ours.anchor_images
    batch = next(ours.batches(task).epoch(0))
    own, of_class = (torch.randn(size, *ours.backbone.tip.flatten(1).shape) for size in (len(batch), CLASSES))
    expected = original.terms(batch, torch.cat([own, of_class[batch.labels]]))
    ours.noise = lambda num_images: torch.cat([own, of_class[batch.labels.unique()]]).flatten(0, 1)
    terms = ours.base_loss(batch)
    for name, term in terms.items():
        print(f"  {name:<24} original {expected[name].item():.6f}, ours {term.item():.6f}")
    torch.testing.assert_close(terms, expected, rtol=1e-4, atol=1e-6)


def original_epochs(folder: Path):
    return Original(folder).epoch


def main() -> int:
    precisions = sorted({"fp32", fast_precision()}, reverse=True)
    wanted = {"fp32": 1.6, "bf16": 2.5}
    print(f"ViT of width {VIT['embed_dim']}, {VIT['depth']} layers, {SIDE} px; batch {BATCH} of {CLASSES * PER_CLASS} "
          f"images, {CLASSES} classes; {torch.get_num_threads()} threads; images/s over a base epoch:")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        check_equal_losses(Path(folder) / "check")
        arms = {"original, fp32": original_epochs(Path(folder) / "original")}
        arms |= {f"ours, {name}": our_epochs(Path(folder) / name, name) for name in precisions}
        rates = alternate(arms, SEGMENTS)
    ratios = {name: rates[f"ours, {name}"] / rates["original, fp32"] for name in precisions}
    good = [verdict(f"{name} against the original", ratio, wanted[name]) for name, ratio in ratios.items()]
    memory = {"original": peak_memory(partial(segments, original_epochs, 1))}
    memory |= {f"ours, {name}": peak_memory(partial(segments, our_epochs, 1, name)) for name in precisions}
    print("peak memory of the process: " + ", ".join(f"{arm} {size / 1e6:.0f} MB" for arm, size in memory.items()))
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
