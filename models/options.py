"""What a backbone may need to know, besides its name, to be built."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


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
