"""What a backbone may need to know, besides its name, to be built."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from utils.data.datasets import Dataset
from utils.run.config import RunConfig


@dataclass(frozen=True)
class BackboneOptions:
    """How a backbone is built; each one reads what concerns it.

    Args:
        stem: first layers of ResNet-18/34/50: "cifar" 3x3 stride 1; "imagenet" 7x7 stride 2 and max-pool;
            "imagenet_small" 3x3 stride 1 and max-pool.
        image_size: side of the input in pixels; timm models with positions (ViT, Swin) are built for it.
        pretrained: timm models start from published weights. Ours have none and start at random.
        weights: a local file of weights, for any backbone; it takes the place of published ones.
        offline: fetch nothing; what is absent is an error.
        args: for a timm model that starts at random or from a local file: patch_size, embed_dim, depth, num_heads, ...
    """

    stem: Literal["cifar", "imagenet", "imagenet_small"] = "cifar"
    image_size: int = 32
    pretrained: bool = True
    weights: str | None = None
    offline: bool = False
    args: dict[str, Any] = field(default_factory=dict)

    @property
    def wants_published(self) -> bool:
        """Whether a timm model starts from published weights, and not from a local file or at random."""
        return self.pretrained and self.weights is None


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
