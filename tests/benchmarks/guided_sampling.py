"""Guided images per second: ours against a plain fp32 loop that keeps the graph over all denoising steps.

Then the gradient at the predicted clean image against that through the generator, and its memory against none.

`python -m tests.benchmarks.guided_sampling`; exit code 1 if a ratio falls short. Run it on an idle machine.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

from learners.guide.guidance import toward_best_new
from models.frozen import fixed
from models.heads import Head
from synth.ddpm.sampling import Sampling
from synth.diffusion import linear_process, respace
from synth.requests import Requests
from synth.samplers import Bend
from tests.benchmarks.ddpm import describe, new_ddpm
from tests.benchmarks.parts import new_classifier
from tests.benchmarks.timing import alternate, compare_all, fast_precision, peak_memory, segments, verdict

IMAGES, STEPS, OLD, SEEN, SCALE = 32, 5, 5, 10, 0.5
LABELS = torch.arange(IMAGES) % OLD


# GUIDE's classifier, in the middle of a training: its parameters want gradients.
new_guide = partial(new_classifier, "preact_resnet18", Head, SEEN, image_size=32)


def our_sampling(folder: Path, precision: str, gradient: str = "xt"):
    """One request per call, bent as the learner bends it; without a ``gradient`` not at all."""
    source, classifier = new_ddpm(precision, folder), new_guide().eval()
    requests = Requests.of_labels(LABELS, (0, "bench", 0))

    def bend(requests: Requests) -> Bend:
        return Bend(lambda x0: SCALE * toward_best_new(classifier(x0), range(OLD, SEEN)), gradient)

    def images() -> int:
        with fixed(classifier):
            return len(source.draw(requests, Sampling(f"ddim{STEPS}"), bend if gradient else None))

    return images


def plain_sampling(folder: Path):
    """The original's loop: x stays in the graph from the first step to the last."""
    network, classifier = new_ddpm("fp32", folder).network.eval(), new_guide().eval()
    process = respace(linear_process(), f"ddim{STEPS}")
    alpha, previous = process.alpha_bar.float(), process.alpha_bar_prev.float()

    def images() -> int:
        x = torch.randn(IMAGES, 3, 32, 32).requires_grad_()
        for index in reversed(range(len(process))):
            noise = network(x, process.timesteps[index].expand(IMAGES), LABELS)
            x0 = ((x - (1 - alpha[index]).sqrt() * noise) / alpha[index].sqrt()).clamp(-1, 1)
            noise = (x - alpha[index].sqrt() * x0) / (1 - alpha[index]).sqrt()
            scores = classifier(x0)[:, :SEEN].log_softmax(1)
            best = scores[:, OLD:].argmax(1) + OLD
            gradient = torch.autograd.grad(scores.gather(1, best[:, None]).sum(), x, retain_graph=True)[0]
            noise = noise - SCALE * (1 - alpha[index]).sqrt() * gradient
            x0 = (x - (1 - alpha[index]).sqrt() * noise) / alpha[index].sqrt()
            x = previous[index].sqrt() * x0 + (1 - previous[index]).sqrt() * noise
        return len(((x.detach() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))

    return images


def compare_gradients() -> bool:
    """Time and weigh the gradient at the clean image; whether it is as fast and as small as wanted."""
    precision, words = fast_precision(), {"xt": "through the generator", "x0": "at the clean image", "": "unguided"}
    with tempfile.TemporaryDirectory() as name:
        rates = alternate({words[key]: our_sampling(Path(name) / key, precision, key) for key in words})
    peaks = {key: peak_memory(partial(segments, our_sampling, 1, precision, key)) for key in words}
    print(", ".join(f"{words[key]} {peaks[key] / 1e6:.0f} MB" for key in words))
    faster = verdict("gradient at the clean image, rate", rates[words["x0"]] / rates[words["xt"]], 3)
    return verdict("its memory, of unguided", peaks[""] / peaks["x0"], 0.91) and faster


def main() -> int:
    print(describe(new_ddpm))
    title = f"guided DDIM images/s, {STEPS} steps, {IMAGES} at once, pre-activation ResNet-18"
    code = compare_all((title, plain_sampling, our_sampling), wanted=1.5, rounds=1, less_memory=2)
    return code if compare_gradients() else 1


if __name__ == "__main__":
    sys.exit(main())
