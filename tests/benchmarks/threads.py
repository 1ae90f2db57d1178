"""What every core together gain over one thread, by the FLOPs of a forward pass: networks from small to large.

`GOMP_SPINCOUNT=1000 python -m tests.benchmarks.threads`, as a run has it, without OMP_NUM_THREADS, on an idle machine;
then without it, to see what it costs that waiting threads soon sleep; then beside `python -c "while True: pass"`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

from models.heads import LinearHead
from tests.benchmarks.parts import cpu_run, new_classifier, new_source, pictures, training
from tests.benchmarks.timing import Arm, alternate
from utils.data.transforms import AUGMENTATIONS, ClassifierTransform
from utils.training.flops import forward_flops
from utils.training.run import Run
from utils.training.schedule import TrainConfig
from utils.training.threads import AVAILABLE, FLOPS_PER_THREAD

STEPS = 4
CLASSIFIERS = [("resnet20", 8, 64), ("resnet20", 16, 64), ("resnet32", 32, 32), ("resnet32", 32, 128)]  # side, batch
UNETS = [[32, 64], [64, 128], [128, 256]]  # widths, at 8x8 and batch 64 as in exps/digits.json


def classifier(run: Run, name: str, side: int, batch: int) -> tuple[str, int, Arm]:
    network = new_classifier(name, LinearHead).to(memory_format=torch.channels_last).eval()
    transform = ClassifierTransform(AUGMENTATIONS["cifar"], side, (0.5,) * 3, (0.5,) * 3, in_memory=True)
    flops = forward_flops(network, torch.zeros(batch, 3, side, side, device="meta"))

    def loss(step):
        return {"ce": F.cross_entropy(network(step.images), step.labels)}

    config = TrainConfig(steps=STEPS, lr=1e-3)
    arm = training(run, network, pictures(STEPS * batch, side, 10), transform, batch, loss, config)
    return f"{name}, {side} px, batch {batch}", flops, arm


def unet(run: Run, widths: list[int]) -> tuple[str, int, Arm]:
    keys = {"layers_per_block": 1, "attention_levels": [], "norm_num_groups": 2, "dropout": 0.0, "batch_size": 64}
    source = new_source(run, 8, 10, name="ddpm", block_out_channels=widths, **keys)
    config = TrainConfig(steps=STEPS, lr=2e-4, optimizer="adamw", ema_decay=0.99)
    arm = training(run, source.network, pictures(256, 8, 10), source.transform, 64, source.loss, config)
    return f"UNet {widths}, 8 px, batch 64", source.step_flops, arm


def with_threads(count: int, arm: Arm) -> Arm:
    def work() -> int:
        torch.set_num_threads(count)
        return arm()

    return work


def main() -> int:
    print(f"steps/s; a run takes a thread for every {FLOPS_PER_THREAD / 1e9:g} GFLOP, of {AVAILABLE}")
    with tempfile.TemporaryDirectory() as folder:
        places = map(Path(folder).joinpath, map(str, range(len(CLASSIFIERS + UNETS))))
        runs = (cpu_run(place, "fp32") for place in places)
        made = [classifier(next(runs), *each) for each in CLASSIFIERS] + [unet(next(runs), each) for each in UNETS]
        for name, flops, arm in sorted(made, key=lambda one: one[1]):
            one, more = alternate({f"{count} thread(s)": with_threads(count, arm) for count in (1, AVAILABLE)}).values()
            print(f"{name}: {flops / 1e9:.2f} GFLOP, {one:.2f} and {more:.2f} steps/s, {more / one:.2f} times")
    return 0


if __name__ == "__main__":
    sys.exit(main())
