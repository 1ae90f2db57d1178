"""Rates and peak memory at the published sizes on one CUDA GPU: classifier, GUIDE's DDPM, DDDR's LDM.

`python -m tests.gpu.full_size --json FILE`; nothing is fetched. Weights and images are random, which changes neither. A
narrow form of it runs on a CPU: `--device cpu --narrow`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from learners.guide.guidance import toward_best_new
from models.frozen import fixed
from models.heads import LinearHead, PlainHead
from models.incremental import IncrementalNet
from models.options import BackboneOptions
from models.timm_backbone import build_backbone
from synth import SOURCES
from synth.ddpm.source import Sampling
from synth.requests import Requests
from utils.data.batches import ImageBatches
from utils.data.datasets import Dataset
from utils.data.images import ImageSet
from utils.data.manager import Task
from utils.data.transforms import AUGMENTATIONS, ClassifierTransform
from utils.training.fit import Training, fit
from utils.training.run import Run
from utils.training.runtime import Runtime
from utils.training.schedule import TrainConfig

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
ROOT = Path(__file__).parents[2]


class Bench:
    """Runs parts, each on its own, and collects what they measure."""

    def __init__(self, device: str, narrow: bool, folder: Path):
        self.device, self.narrow, self.folder, self.rows = device, narrow, folder, []

    def run(self, precision: str) -> Run:
        name = f"{precision}-{len(self.rows)}-{time.monotonic_ns()}"
        return Run(self.folder / name, 0, Runtime([self.device], precision), progress=False, checkpoint_every=10**9)

    def sync(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()

    def measure(self, what: str, unit: str, work: Callable[[], int], warm: int = 1) -> None:
        """Time one call of ``work``, which returns how much it did, after ``warm`` calls that pick kernels."""
        for _ in range(warm):
            work()
        self.sync()
        if self.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        done = work()
        self.sync()
        rate = done / (time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.device != "cpu" else None
        self.rows.append({"what": what, "unit": unit, "rate": rate, "peak_gib": peak})
        print(f"{what}: {rate:.2f} {unit}" + (f", peak {peak:.2f} GiB" if peak else ""), flush=True)


def pictures(count: int, side: int, classes: int) -> ImageSet:
    pixels = torch.randint(256, (count, 3, side, side), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return ImageSet.of(pixels, torch.arange(count) % classes)


def dataset(side: int, classes: int) -> Dataset:
    images = pictures(classes, side, classes)
    names = [str(label) for label in range(classes)]
    return Dataset("bench", images, images, names, side, 3, True, (0.5,) * 3, (0.5,) * 3, "cifar", "")


def classifier(bench: Bench) -> None:
    """ResNet-32 on 32x32 images, batch 128, through `fit`: augmentation, optimiser, log and checkpoint included."""
    images = pictures(128 if bench.narrow else 51200, 32, 10)
    for precision in ("fp32",) if bench.narrow else ("fp32", "bf16"):
        torch.manual_seed(0)
        run, backbone = bench.run(precision), build_backbone("resnet32", BackboneOptions())
        network = IncrementalNet(backbone, LinearHead(backbone.num_features))
        network.grow(10)
        network.to(run.device, memory_format=torch.channels_last)
        transform = ClassifierTransform(AUGMENTATIONS["cifar"], 32, MEAN, STD, in_memory=True)
        batches = ImageBatches(images, None, run.loading(transform, 128, 0, "bench"))
        tasks = iter(range(9))

        def epoch(run=run, network=network, batches=batches, tasks=tasks) -> int:
            config = TrainConfig(epochs=1, lr=0.1, weight_decay=5e-4)
            fit(network, batches, lambda batch: {"ce": F.cross_entropy(network(batch.images), batch.labels)}, config,
                Training(run, next(tasks), "bench"))  # fmt: skip
            return len(images)

        bench.measure(f"ResNet-32 training, batch 128, {precision}", "images/s", epoch)


def ddpm(bench: Bench) -> None:
    """GUIDE's CIFAR UNet (52.5 M): training at batch 256, DDIM of 50 steps, the same bent by a PreAct-ResNet-18."""
    for precision in ("fp32",) if bench.narrow else ("bf16", "fp32"):
        _ddpm(bench, precision)
        free()


def _ddpm(bench: Bench, precision: str) -> None:
    keys = json.loads((ROOT / "exps" / "guide_cifar10_5.json").read_text())["synth"]
    keys |= {"block_out_channels": [32, 64], "norm_num_groups": 8, "attention_resolutions": [16],
             "attention_head_dim": 8} if bench.narrow else {}  # fmt: skip
    batch, steps, draws, respacing = (4, 2, 4, "ddim5") if bench.narrow else (256, 50, 256, "ddim50")
    run, kind, tasks = bench.run(precision), SOURCES["ddpm"], iter(range(9))
    config = kind.Config.parse({**keys, "batch_size": batch, "sample_batch": draws, "keep_sources": False})
    source = kind(config, run, 10, [str(label) for label in range(10)], dataset(32, 10))
    source.fitted_classes = set(range(10))
    batches = ImageBatches(pictures(4 * batch, 32, 10), None, run.loading(source.transform, batch, 0, "bench"))

    def train() -> int:
        config = TrainConfig(steps=steps, lr=2e-4, optimizer="adamw", ema_decay=0.9999)
        fit(source.network, batches, source.loss, config, Training(run, next(tasks), "bench"))
        return steps

    bench.measure(f"DDPM training, batch {batch}, {precision}", "steps/s", train)
    requests = Requests.of_labels(torch.arange(draws) % 5, (0, "bench", 0))

    def draw(bend=None) -> int:
        return len(source.draw(requests, Sampling(respacing), bend))

    bench.measure(f"{respacing} drawing, {draws} at once, {precision}", "images/s", draw, warm=0)
    backbone = build_backbone("preact_resnet18", BackboneOptions(image_size=32))
    network = IncrementalNet(backbone, PlainHead(backbone.num_features))
    network.grow(10)
    network.to(run.device, memory_format=torch.channels_last).eval()

    def guided() -> int:
        with fixed(network):
            return draw(lambda requests: lambda x0: 0.5 * toward_best_new(network(x0), range(5, 10)))

    bench.measure(f"{respacing} guided drawing, {draws} at once, {precision}", "images/s", guided, warm=0)


def ldm(bench: Bench) -> None:
    """text2img-large's architecture: class inversion with 12 images per step, drawing at guidance 10."""
    from models.latent.text_to_image import Placement, TextToImage
    from tests.support.tiny_ldm import tiny_ldm_folder

    run = bench.run("bf16")
    model = TextToImage(big_parts(bench), placement=Placement.of(run.runtime, "auto"))
    print(f"LDM of {sum(p.numel() for p in model.networks.parameters()) / 1e9:.2f} B parameters")
    steps, draws, sampling, classes = (2, 2, 2, 2) if bench.narrow else (50, 40, 50, 20)
    config = SOURCES["ldm"].Config.parse({
        "name": "ldm", "ldm_ckpt": tiny_ldm_folder(), "g_local_bs": 12, "g_local_train_steps": steps,
        "sample_steps": sampling, "guidance": 10, "sample_batch": draws,
    })  # fmt: skip
    names = [str(label) for label in range(classes)]
    source = SOURCES["ldm"](config, run, classes, names, dataset(32, classes))
    source.use(model)
    tasks = iter(range(9))

    def invert() -> int:
        task = Task(next(tasks), range(classes), tuple(names))
        source.invert(task, list(task.classes), pictures(60 if not bench.narrow else 4, 32, classes))
        return steps

    bench.measure("LDM class inversion, batch 12, bf16 weights", "steps/s", invert)
    source.fitted_classes = set(range(classes))
    requests = Requests.of_labels(torch.arange(draws) % classes, (0, "bench", 0))
    bench.measure(f"LDM drawing, DDIM of {sampling} steps, {draws} at once", "images/s",
                  lambda: len(source.generate(requests)), warm=0)  # fmt: skip


def big_parts(bench: Bench):
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    from models.files.diffusers_folder import LDM_SCHEDULE
    from models.files.diffusers_parts import TextToImageParts
    from tests.support.tiny_ldm import BERT_WORDS, bert_tokenizer, folder

    narrow, factor = bench.narrow, 10 if bench.narrow else 1
    text = LDMBertConfig(vocab_size=len(BERT_WORDS), d_model=1280 // factor, encoder_layers=2 if narrow else 32,
                         encoder_attention_heads=8, head_dim=64 // factor, encoder_ffn_dim=5120 // factor)  # fmt: skip
    with torch.device("cpu" if bench.device == "cpu" else "cuda"):
        unet = UNet2DConditionModel(
            sample_size=32, in_channels=4, out_channels=4, attention_head_dim=8, cross_attention_dim=1280 // factor,
            block_out_channels=(32, 64, 128, 128) if narrow else (320, 640, 1280, 1280), layers_per_block=2,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(32, 32, 32, 32) if narrow else (128, 256, 512, 512), layers_per_block=2,
            latent_channels=4, scaling_factor=0.18215, down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
        bert = LDMBertModel(text).model
    return TextToImageParts(
        vae, bert, bert_tokenizer(folder()), unet, dict(LDM_SCHEDULE), latent_side=4 if narrow else 32
    )


def free() -> None:
    import gc

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="0")
    parser.add_argument("--narrow", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options.device, options.narrow, Path(folder))
        for part in (classifier, ddpm, ldm):
            start = time.perf_counter()
            try:
                part(bench)
            except Exception:  # the other parts are still worth their time on a lent card
                traceback.print_exc()
            free()
            print(f"[{part.__name__}: {time.perf_counter() - start:.0f} s]", flush=True)
    if options.json:
        options.json.write_text(json.dumps(bench.rows, indent=1))


if __name__ == "__main__":
    main()
