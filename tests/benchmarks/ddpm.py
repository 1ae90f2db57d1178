"""DDPM training steps and DDIM images per second: ours against a plain fp32 loop with the same UNet.

`python -m tests.benchmarks.ddpm`; exit code 1 if a ratio falls short. Run it on an idle machine.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

from synth.diffusion import linear_process, respace
from synth.requests import Requests
from tests.benchmarks.parts import cpu_run, new_source, pictures, training
from tests.benchmarks.timing import compare_all
from utils.training.schedule import TrainConfig

UNET = {
    "block_out_channels": [64, 120, 128], "layers_per_block": 1, "attention_levels": [], "dropout": 0.0,
    "norm_num_groups": 4,
}  # fmt: skip
BATCH, STEPS, IMAGES, SAMPLE_STEPS = 64, 4, 32, 5
LABELS = torch.arange(BATCH) % 10


def new_ddpm(precision: str, folder: Path):
    keys = {"name": "ddpm", **UNET, "sample_batch": IMAGES, "timestep_respacing": f"ddim{SAMPLE_STEPS}"}
    return new_source(cpu_run(folder, precision), 32, 10, **keys)


def describe() -> str:
    with tempfile.TemporaryDirectory() as name:
        count = sum(parameter.numel() for parameter in new_ddpm("fp32", Path(name)).network.parameters())
    return f"UNet of {count / 1e6:.1f} M parameters, 3x32x32, {torch.get_num_threads()} threads"


def our_training(folder: Path, precision: str):
    """Some steps per call through `fit`, with moving average, checkpoint and log."""
    source = new_ddpm(precision, folder)
    config = TrainConfig(steps=STEPS, lr=2e-4, optimizer="adamw", ema_decay=0.9999)
    return training(source.run, source.network, pictures(512, 32, 10), source.transform, BATCH, source.loss, config)


def plain_training(folder: Path):
    """The textbook loop: fp32, one parameter at a time for the moving average."""
    network = new_ddpm("fp32", folder).network.train()
    average = [parameter.detach().clone() for parameter in network.parameters()]
    optimizer = torch.optim.AdamW(network.parameters(), 2e-4, weight_decay=0)
    alpha_bar = linear_process().alpha_bar.float()
    pixels = pictures(512, 32, 10).parts[0].images

    def steps() -> int:
        for _ in range(STEPS):
            pick = torch.randint(len(pixels), (BATCH,))
            x0 = pixels[pick].float() / 127.5 - 1
            t, noise = torch.randint(1000, (BATCH,)), torch.randn_like(x0)
            a = alpha_bar[t].view(-1, 1, 1, 1)
            loss = F.mse_loss(network(a.sqrt() * x0 + (1 - a).sqrt() * noise, t, pick % 10), noise)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
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


def main() -> int:
    print(describe())
    return compare_all(
        (f"training steps/s, batch {BATCH}", plain_training, our_training),
        (f"DDIM images/s, {SAMPLE_STEPS} steps, {IMAGES} at once", plain_sampling, our_sampling),
        wanted=1.4,
    )


if __name__ == "__main__":
    sys.exit(main())
