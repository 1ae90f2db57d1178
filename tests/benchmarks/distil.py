"""Prototypes per second and the memory that they take: `python -m tests.benchmarks.distil`, on an idle machine.

Exit code 1 if clustering is slower than scikit-learn alone on the same latents, or if 1,300 latents of images of 512
pixels need more than four times their own size. What is encoded are random pictures of 64 pixels.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from sklearn.cluster import KMeans

from synth.d4m.prototypes import cluster
from synth.inversion.latents import encode
from tests.benchmarks.parts import cpu_run, new_source, pictures
from tests.benchmarks.timing import alternate, peak_memory, verdict

COUNT, IPC, SHAPE = 1300, 10, (4, 64, 64)  # ImageNet's largest class, at 512 pixels
SMALL = (4, 16, 16)
ALLOWED = 4  # copies of the latents, beside what the packages take


def latents(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(COUNT, *shape, generator=torch.Generator().manual_seed(0))


def ours() -> int:
    cluster(latents(SMALL), IPC, seed=0)
    return IPC


def alone() -> int:
    KMeans(IPC, n_init=1, random_state=0).fit(latents(SMALL).flatten(1).numpy())
    return IPC


def load() -> None:
    """Take what is needed without any latents."""
    cluster(torch.randn(20, 2, 2, 2), 2, seed=0)


def largest() -> None:
    cluster(latents(SHAPE), IPC, seed=0)


def encoding(folder: Path) -> float:
    """Images per second from pixels to latents."""
    source = new_source(cpu_run(folder, "auto"), 64, 1, name="small_d4m", ipc=IPC, vae_channels=[32, 64, 128])
    source._model = source.new_model(["0"]).freeze()
    images = pictures(200, 64, 1)

    def arm() -> int:
        encode(source.model, images, False, 100, source.run, "encode")
        return len(images)

    return alternate({"latents": arm}, segments=3)["latents"]


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        print(f"{encoding(Path(folder)):.0f} latents per second, 64 pixels, {torch.get_num_threads()} threads")
    rates = alternate({"prototypes": ours, "scikit-learn alone": alone}, segments=3)
    print(f"{rates['prototypes']:.1f} prototypes per second of {COUNT} latents {SMALL}")
    size = latents(SHAPE).nbytes
    copies = (peak_memory(largest) - peak_memory(load)) / size
    print(f"{COUNT} latents {SHAPE}: {size / 1e6:.0f} MB, at most {copies:.1f} times that beside the packages")
    fast = verdict("clustering", rates["prototypes"] / rates["scikit-learn alone"], 0.8)
    return 0 if fast and verdict("memory", ALLOWED / copies, 1.0) else 1


if __name__ == "__main__":
    sys.exit(main())
