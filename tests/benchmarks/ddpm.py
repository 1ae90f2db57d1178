"""DDPM training steps and DDIM images per second: ours against a plain fp32 loop with the same UNet.

`python -m tests.benchmarks.ddpm`; exit code 1 if a ratio falls short. Run it on an idle machine. With --cb it measures
steps of the class-balanced loss instead, against steps without it and a plain loop of two passes.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from synth.diffusion import linear_process, respace
from synth.requests import Requests
from tests.benchmarks.parts import cpu_run, new_source, pictures, training
from tests.benchmarks.timing import alternate, compare_all, fast_precision, verdict
from utils.training.schedule import TrainConfig

UNET = {
    "block_out_channels": [64, 120, 128], "layers_per_block": 1, "attention_levels": [], "dropout": 0.0,
    "norm_num_groups": 4,
}  # fmt: skip
BATCH, STEPS, IMAGES, SAMPLE_STEPS = 64, 4, 32, 5
BALANCED_BATCH = 16
LABELS = torch.arange(BATCH) % 10


def new_ddpm(precision: str, folder: Path):
    keys = {"name": "ddpm", **UNET, "sample_batch": IMAGES, "timestep_respacing": f"ddim{SAMPLE_STEPS}"}
    return new_source(cpu_run(folder, precision), 32, 10, **keys)


def describe(new: Callable) -> str:
    with tempfile.TemporaryDirectory() as name:
        count = sum(parameter.numel() for parameter in new("fp32", Path(name)).network.parameters())
    return f"UNet of {count / 1e6:.1f} M parameters, 3x32x32, {torch.get_num_threads()} threads"


def our_training(folder: Path, precision: str):
    """Some steps per call through `fit`, with moving average, checkpoint and log."""
    source = new_ddpm(precision, folder)
    config = TrainConfig(steps=STEPS, lr=2e-4, optimizer="adamw", ema_decay=0.9999)
    return training(source.run, source.network, pictures(512, 32, 10), source.transform, BATCH, source.loss, config)


def plain_training(folder: Path):
    """The textbook loop: fp32, one parameter at a time for the moving average."""
    network = new_ddpm("fp32", folder).network.train()
    optimizer = torch.optim.AdamW(network.parameters(), 2e-4, weight_decay=0)

    def loss(xt, t, labels, noise):
        return F.mse_loss(network(xt, t, labels), noise)

    return textbook_steps(network, optimizer, loss, BATCH)


def textbook_steps(network, optimizer, loss: Callable, batch: int, clip_norm: float = math.inf):
    """Some steps per call on noised pictures, as every paper's code takes them."""
    average = [parameter.detach().clone() for parameter in network.parameters()]
    alpha_bar = linear_process().alpha_bar.float()
    pixels = pictures(512, 32, 10).parts[0].images

    def steps() -> int:
        for _ in range(STEPS):
            pick = torch.randint(len(pixels), (batch,))
            x0 = pixels[pick].float() / 127.5 - 1
            t, noise = torch.randint(1000, (batch,)), torch.randn_like(x0)
            a = alpha_bar[t].view(-1, 1, 1, 1)
            value = loss(a.sqrt() * x0 + (1 - a).sqrt() * noise, t, pick % 10, noise)
            optimizer.zero_grad()
            value.backward()
            if clip_norm < math.inf:
                torch.nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
            optimizer.step()
            value.item()
            for mean, parameter in zip(average, network.parameters()):
                mean.mul_(0.9999).add_(parameter.detach(), alpha=0.0001)
        return STEPS

    return steps


def our_sampling(folder: Path, precision: str):
    """One request of a few images per class and call."""
    source = new_ddpm(precision, folder)
    requests = Requests(LABELS[:IMAGES], torch.full((IMAGES,), -1), torch.arange(IMAGES), (0, "bench", 0))
    return lambda: len(source.generate(requests))


def plain_sampling(folder: Path):
    """The textbook DDIM loop in fp32."""
    network = new_ddpm("fp32", folder).network.eval()
    process = respace(linear_process(), f"ddim{SAMPLE_STEPS}")
    alpha, previous = process.alpha_bar.float(), process.alpha_bar_prev.float()

    @torch.no_grad()
    def images() -> int:
        x = torch.randn(IMAGES, 3, 32, 32)
        for index in reversed(range(len(process))):
            noise = network(x, process.timesteps[index].expand(IMAGES), LABELS[:IMAGES])
            x0 = ((x - (1 - alpha[index]).sqrt() * noise) / alpha[index].sqrt()).clamp(-1, 1)
            noise = (x - alpha[index].sqrt() * x0) / (1 - alpha[index]).sqrt()
            x = previous[index].sqrt() * x0 + (1 - previous[index]).sqrt() * noise
        return len(((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))

    return images


def new_balanced(precision: str, folder: Path, **keys):
    keys = {"name": "cbdm", **UNET, **keys, "sample_batch": IMAGES}
    return new_source(cpu_run(folder, precision), 32, 10, **keys)


def balanced_training(folder: Path, precision: str, **keys):
    """Some steps per call through `fit`, the two predictions in one call of the network."""
    source = new_balanced(precision, folder, **keys)
    source.before_training(LABELS)
    config = TrainConfig(steps=STEPS, lr=2e-4, optimizer="adamw", ema_decay=0.9999, clip_norm=1.0)
    images = pictures(512, 32, 10)
    return training(source.run, source.network, images, source.transform, BALANCED_BATCH, source.loss, config)


def two_passes(folder: Path):
    """The loss as it is written: the network once under each label, in fp32, and a graph for each."""
    network = new_balanced("fp32", folder).network.train()

    def loss(xt, t, labels, noise):
        weight = (t / 1000).view(-1, 1, 1, 1)
        h, other = network(xt, t, labels), network(xt, t, torch.randint(10, labels.shape))
        balance = (weight * (h - other.detach()) ** 2).mean() + (weight * (h.detach() - other) ** 2).mean() / 4
        return F.mse_loss(h, noise) + balance

    optimizer = torch.optim.Adam(network.parameters(), 2e-4)
    return textbook_steps(network, optimizer, loss, BALANCED_BATCH, clip_norm=1.0)


def compare_balanced() -> int:
    """Time balanced steps against two plain passes, and against steps without balancing."""
    precision = fast_precision()
    print(f"{describe(new_balanced)}; steps/s of the class-balanced loss, batch {BALANCED_BATCH}")
    with tempfile.TemporaryDirectory() as name:
        arms = {
            "two passes, fp32": two_passes(Path(name) / "a"),
            f"ours, {precision}": balanced_training(Path(name) / "b", precision),
            f"without, {precision}": balanced_training(Path(name) / "c", precision, cb=False),
        }
        naive, ours, without = alternate(arms).values()
    print(f"a balanced step takes {without / ours:.2f} times as long as one without")
    return 0 if verdict("balanced steps, against two plain passes", ours / naive, wanted=0.95) else 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.ddpm", description=__doc__)
    parser.add_argument("--cb", action="store_true", help="measure the class-balanced loss")
    if parser.parse_args().cb:
        return compare_balanced()
    print(describe(new_ddpm))
    return compare_all(
        (f"training steps/s, batch {BATCH}", plain_training, our_training),
        (f"DDIM images/s, {SAMPLE_STEPS} steps, {IMAGES} at once", plain_sampling, our_sampling),
        wanted=1.4,
    )


if __name__ == "__main__":
    sys.exit(main())
