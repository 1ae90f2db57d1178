"""How the backbone of a run is built, read off its config and its data set."""

from __future__ import annotations

from dataclasses import replace

from models.options import BackboneOptions
from utils.data.datasets import Dataset
from utils.run.config import RunConfig


def weight_options(config: RunConfig) -> BackboneOptions:
    """Return where the backbone's weights come from, as far as the config alone can say."""
    return BackboneOptions(pretrained=config.pretrained, weights=config.backbone_weights, offline=config.offline,
                           args=config.backbone_args)  # fmt: skip


def backbone_options(config: RunConfig, dataset: Dataset) -> BackboneOptions:
    """Return how the backbone of a run is built; the stem follows PyCIL where the config leaves it open."""
    stem = config.stem
    if stem == "auto":
        of_photographs = "imagenet" if config.init_cls == config.increment else "imagenet_small"
        stem = "cifar" if dataset.in_memory else of_photographs
    return replace(weight_options(config), stem=stem, image_size=dataset.image_size)
