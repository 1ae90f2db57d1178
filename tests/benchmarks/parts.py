"""What the measurements share: random images, networks and sources of random weights, and a training through `fit`."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path

import torch
from torch import nn

from models.incremental import IncrementalNet
from models.options import BackboneOptions
from models.timm_backbone import build_backbone
from synth import SOURCES
from synth.base import ReplaySource
from tests.benchmarks.timing import Arm
from tests.support.tiny_ldm import BERT_WORDS
from utils.data.batches import ImageBatches
from utils.data.datasets import Dataset
from utils.data.images import ImageSet
from utils.data.manager import Task
from utils.training.fit import Training, fit
from utils.training.run import Run
from utils.training.runtime import Runtime
from utils.training.schedule import TrainConfig


def cpu_run(folder: Path, precision: str, **options) -> Run:
    return Run(folder, 0, Runtime(["cpu"], precision), progress=False, **options)


def pictures(number: int, side: int, classes: int) -> ImageSet:
    """Random pixels, the labels in turn."""
    pixels = torch.randint(256, (number, 3, side, side), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return ImageSet.of(pixels, torch.arange(number) % classes)


def new_classifier(name: str, head: type[nn.Module], classes: int = 10, **options) -> IncrementalNet:
    torch.manual_seed(0)
    backbone = build_backbone(name, BackboneOptions(**options))
    network = IncrementalNet(backbone, head(backbone.num_features))
    network.grow(classes)
    return network


def new_source(run: Run, side: int, classes: int, **keys) -> ReplaySource:
    """A source with these keys of `synth` that believes it has learned every class."""
    kind, names, images = SOURCES[keys["name"]], list(map(str, range(classes))), pictures(classes, side, classes)
    dataset = Dataset("bench", images, images, names, side, 3, True, (0.5,) * 3, (0.5,) * 3, "cifar", "")
    source = kind(kind.Config.parse(keys), run, classes, names, dataset)
    source.fitted_classes = set(range(classes))
    return source


def training(
    run: Run, network: nn.Module, images: ImageSet, transform, batch: int, loss: Callable, config: TrainConfig
) -> Arm:
    """Return what trains once per call through `fit`: augmentation, optimiser, log and checkpoint included."""
    batches = ImageBatches(images, None, run.loading(transform, batch, 0, "bench"))
    tasks, amount = count(), config.steps or config.epochs * len(images)

    def train() -> int:
        fit(network, batches, loss, config, Training(run, Task(next(tasks), range(0), ()), "bench"))
        return amount

    return train


def unet(widths: tuple[int, ...], context: int, side: int):
    """A UNet of latent diffusion as published, but for its widths."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=side, in_channels=4, out_channels=4, block_out_channels=widths, layers_per_block=2,
        attention_head_dim=8, cross_attention_dim=context,
        down_block_types=("CrossAttnDownBlock2D",) * (len(widths) - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (len(widths) - 1),
    )  # fmt: skip


def autoencoder(widths: tuple[int, ...]):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=widths, layers_per_block=2, latent_channels=4, scaling_factor=0.18215,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip


def text_encoder(width: int, layers: int, head_dim: int):
    """LDMBert, as in text2img-large, but for its vocabulary and these sizes."""
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    sizes = {"encoder_layers": layers, "encoder_attention_heads": 8, "head_dim": head_dim, "encoder_ffn_dim": 4 * width}
    return LDMBertModel(LDMBertConfig(vocab_size=len(BERT_WORDS), d_model=width, **sizes))
