"""Rates and peak memory at the published sizes on one CUDA GPU: classifiers, DDPM, LDM, ControlNet.

`python -m tests.gpu.full_size ldm --json FILE` measures one part; run.py measures all. Nothing is fetched. Weights and
images are random, which changes neither. `--narrow` is a form for any device.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from learners.guide.guidance import toward_best_new
from models.files.diffusers_folder import LDM_SCHEDULE
from models.files.diffusers_parts import TextToImageParts
from models.frozen import fixed, weight_bytes
from models.heads import Head
from models.latent.control import ControlNetPipeline
from models.latent.text_to_image import Placement, TextToImage
from synth.ddpm.sampling import Sampling
from synth.requests import Requests
from synth.samplers import Bend
from tests.benchmarks import asp_epoch
from tests.benchmarks.classifier_step import BATCH, our_arm
from tests.benchmarks.parts import autoencoder, new_classifier, new_source, pictures, text_encoder, training, unet
from tests.support.tiny_ldm import bert_tokenizer, clip_tokenizer, folder, tiny_ldm_folder
from utils.data.manager import Task
from utils.run.files import write_json
from utils.training.run import Run
from utils.training.runtime import Runtime
from utils.training.schedule import TrainConfig

CLIP = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "max_position_embeddings": 77, "projection_dim": 768,
}  # fmt: skip
ROOT = Path(__file__).parents[2]


class Bench:
    """Measures one part on the GPU, or on the CPU where there is none, and keeps in a file what it has so far."""

    def __init__(self, narrow: bool, folder: Path, rows: Path | None = None):
        self.narrow, self.folder, self.file, self.rows = narrow, folder, rows, []
        self.cuda = torch.cuda.is_available()

    def run(self, precision: str) -> Run:
        name = f"{precision}-{time.monotonic_ns()}"
        return Run(self.folder / name, 0, Runtime(["auto"], precision), progress=False, checkpoint_every=10**9)

    def measure(self, what: str, unit: str, amount: int, work: Callable[[], object], warm: int = 1) -> None:
        """Time one call of ``work``, which does so much, after ``warm`` calls that pick kernels."""
        for _ in range(warm):
            work()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        work()
        if self.cuda:
            torch.cuda.synchronize()
        rate = amount / (time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.cuda else None
        self.rows.append({"what": what, "value": rate, "unit": unit, "peak_gib": peak})
        print(f"{what}: {rate:.2f} {unit}" + (f", peak {peak:.2f} GiB" if peak else ""), flush=True)
        if self.file:
            write_json(self.file, self.rows)


def classifier(bench: Bench) -> None:
    """ResNet-32 on 32x32 images, batch 128, through `fit`: augmentation, optimiser, log and checkpoint included."""
    images = pictures(128 if bench.narrow else 51200, 32, 10)
    for precision in ("fp32",) if bench.narrow else ("fp32", "bf16"):
        train = our_arm(images, bench.run(precision))
        bench.measure(f"ResNet-32 training, batch {BATCH}, {precision}", "images/s", len(images), train)


def asp(bench: Bench) -> None:
    """ASP's base session: a ViT-B/16 at 224 pixels, batch 48, an epoch with its search for anchors."""
    keys, side = {"convnet_type": "vit_base_patch16_224", "backbone_args": {}}, 224
    if bench.narrow:
        keys, side = {"backbone_args": {"patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 2}}, 32
    for precision in ("fp32",) if bench.narrow else ("bf16", "fp32"):
        epoch = asp_epoch.epochs(*asp_epoch.begin(bench.run(precision), side, **keys))
        amount = asp_epoch.CLASSES * asp_epoch.PER_CLASS
        bench.measure(f"ASP's base epoch, batch {asp_epoch.BATCH}, {precision}", "images/s", amount, epoch)


def ddpm(bench: Bench, precision: str) -> None:
    """GUIDE's CIFAR UNet (52.5 M): training at batch 256, DDIM of 50 steps, and bent by a PreAct-ResNet-18."""
    keys = json.loads((ROOT / "exps" / "guide_cifar10_5.json").read_text())["synth"]
    keys |= {"block_out_channels": [32, 64], "norm_num_groups": 8, "attention_resolutions": [16],
             "attention_head_dim": 8} if bench.narrow else {}  # fmt: skip
    batch, steps, draws, respacing = (4, 2, 4, "ddim5") if bench.narrow else (256, 50, 256, "ddim50")
    run = bench.run(precision)
    source = new_source(run, 32, 10, **{**keys, "batch_size": batch, "sample_batch": draws, "keep_sources": False})
    config = TrainConfig(steps=steps, lr=2e-4, optimizer="adamw", ema_decay=0.9999)
    train = training(run, source.network, pictures(4 * batch, 32, 10), source.transform, batch, source.loss, config)
    bench.measure(f"DDPM training, batch {batch}, {precision}", "steps/s", steps, train)
    requests = Requests.of_labels(torch.arange(draws) % 5, (0, "bench", 0))
    draw = partial(source.draw, requests, Sampling(respacing))
    bench.measure(f"{respacing} drawing, {draws} at once, {precision}", "images/s", draws, draw, warm=0)
    network = new_classifier("preact_resnet18", Head, image_size=32)
    network.to(run.device, memory_format=torch.channels_last).eval()

    def guided(gradient: str) -> None:
        with fixed(network):
            draw(lambda _: Bend(lambda x0: 0.5 * toward_best_new(network(x0), range(5, 10)), gradient))

    for gradient in ("xt", "x0"):
        what = f"{respacing} drawing guided at {gradient}, {draws} at once, {precision}"
        bench.measure(what, "images/s", draws, partial(guided, gradient), warm=0)


def ldm(bench: Bench) -> None:
    """text2img-large's architecture: class inversion with 12 images per step, drawing at guidance 10."""
    run = bench.run("bf16")
    model = TextToImage(big_parts(bench), placement=Placement.of(run.runtime, "auto"))
    print(f"LDM of {sum(p.numel() for p in model.parameters()) / 1e9:.2f} B parameters")
    steps, draws, sampling, classes = (2, 2, 2, 2) if bench.narrow else (50, 40, 50, 20)
    source = new_source(
        run, 32, classes, name="ldm", ldm_ckpt=tiny_ldm_folder(), g_local_bs=12, g_local_train_steps=steps,
        sample_steps=sampling, guidance=10, sample_batch=draws,
    )  # fmt: skip
    source.use(model)
    tasks, images = iter(range(9)), pictures(4 if bench.narrow else 60, 32, classes)

    def invert() -> None:
        task = Task(next(tasks), range(classes), tuple(map(str, range(classes))))
        source.invert(task, list(task.classes), images)

    bench.measure("LDM class inversion, batch 12, bf16 weights", "steps/s", steps, invert)
    draw = partial(source.generate, Requests.of_labels(torch.arange(draws) % classes, (0, "bench", 0)))
    bench.measure(f"LDM drawing, DDIM of {sampling} steps, {draws} at once", "images/s", draws, draw, warm=0)


def big_parts(bench: Bench) -> TextToImageParts:
    """text2img-large, or a narrow form of it."""
    widths, width, layers = ((32, 64, 128, 128), 128, 2) if bench.narrow else ((320, 640, 1280, 1280), 1280, 32)
    with torch.device("cuda" if bench.cuda else "cpu"):  # a billion random numbers are drawn faster there
        bert = text_encoder(width, layers, head_dim=width // 20)
        net = unet(widths, width, side=32)
        vae = autoencoder((32,) * 4 if bench.narrow else (128, 256, 512, 512))
    return TextToImageParts(
        vae, bert.model, bert_tokenizer(folder()), net, dict(LDM_SCHEDULE), latent_side=4 if bench.narrow else 32
    )


def controlnet(bench: Bench) -> None:
    """Stable Diffusion 1.5 with ControlNet in bf16, as published but for its vocabulary: 20 steps of DDIM."""
    from diffusers import ControlNetModel
    from transformers import CLIPTextConfig, CLIPTextModel

    side, steps, batches, narrow = (64, 2, (1, 2), 10) if bench.narrow else (512, 20, (1, 4, 16), 1)
    torch.manual_seed(0)
    device, tokenizer = bench.run("bf16").device, clip_tokenizer(folder())
    words = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    with device:
        net = unet(narrowed((320, 640, 1280, 1280), narrow), 768, side=64)
        control = ControlNetModel.from_unet(net, conditioning_embedding_out_channels=(16, 32, 96, 256))
        vae = autoencoder(narrowed((128, 256, 512, 512), narrow))
        encoder = CLIPTextModel(CLIPTextConfig(**CLIP, **words, vocab_size=len(tokenizer)))
    parts = TextToImageParts(vae, encoder, tokenizer, net, dict(LDM_SCHEDULE), latent_side=64)
    model = ControlNetPipeline(parts, control, Placement(device, torch.bfloat16))
    print(f"ControlNet: {weight_bytes(model) / 2**30:.2f} GiB of weights, {side} pixels, {steps} steps")
    for count in batches:
        edges = torch.rand(count, side, side, generator=torch.Generator().manual_seed(0)) < 0.07
        prompts, negative = model.embed(["a photo of dog"] * count), model.embed(["row"])

        def draw(steps=steps, count=count, edges=edges, prompts=prompts, negative=negative) -> None:
            generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
            model.draw(edges, prompts, negative, generators, steps, 9.0, 1.0)

        draw(steps=2)  # picks the kernels
        bench.measure(f"ControlNet drawing, {count} at once", "images/s", count, draw, warm=0)


def narrowed(widths: tuple[int, ...], narrow: int) -> tuple[int, ...]:
    """Widths stay multiples of the 32 groups that are normalised together."""
    return tuple(max(width // narrow // 32, 1) * 32 for width in widths)


PARTS: dict[str, Callable[[Bench], None]] = {
    "classifier": classifier,
    "asp": asp,
    "ddpm_bf16": partial(ddpm, precision="bf16"),
    "ddpm_fp32": partial(ddpm, precision="fp32"),
    "ldm": ldm,
    "controlnet": controlnet,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--narrow", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        PARTS[options.part](Bench(options.narrow, Path(folder), options.json))


if __name__ == "__main__":
    main()
