"""A small diffusion model in pixels and a ControlNet for it, both our own, made to be trained from scratch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from models.config import NetworkConfig
from models.latent.contract import NOISE
from models.latent.own import OwnModel
from models.latent.small import build_unet
from utils.run.config import Side, Width
from utils.run.errors import ConfigError
from utils.training.ledger import counted


class SmallControlNetConfig(NetworkConfig):
    """Hyperparameters of a `SmallControlNet`. Every level after the first halves the side of what it gets."""

    map_size: Side | None = Field(None, description="side of the edge maps; null: the images' own")
    block_out_channels: list[Width] = Field([32, 64], min_length=1, description="UNet's width per level")
    layers_per_block: int = Field(1, ge=1, le=64, description="residual blocks per level of the UNet")
    norm_num_groups: Width = Field(8, description="groups of every GroupNorm")
    prediction_type: Literal["epsilon", "v_prediction"] = Field("v_prediction", description="of the UNet")

    def halvings(self, side: int) -> int:
        """Return how often a map is halved to images of this side.

        Raises:
            ConfigError: if the sizes do not fit each other.
        """
        self.require_side(side, "block_out_channels")
        self.require_multiples("block_out_channels", of="norm_num_groups")
        times, rest = divmod(self.map_size or side, side)
        if rest or not times or times & (times - 1):  # no power of two
            raise ConfigError(f"map_size={self.map_size}: it must be the side of the images, {side}, times 1, 2, 4 ...")
        return times.bit_length() - 1


class SmallControlNet(OwnModel):
    """A UNet that draws small images, and a copy of its encoder that bends it along given edges.

    Zhang et al., "Adding Conditional Control to Text-to-Image Diffusion Models", ICCV 2023, arXiv:2302.05543, at the
    size of a laptop. It knows no classes and no words: all that an image shows comes from its edges.

    Args:
        image_shape: (C, S, S) of the images.
        config: hyperparameters; ``map_size`` is S times a power of two.

    Raises:
        ConfigError: if the shapes do not fit each other.
    """

    Config = SmallControlNetConfig

    def __init__(self, image_shape: Sequence[int], config: SmallControlNetConfig):
        super().__init__(config, image_shape=list(image_shape))
        self.image_shape = tuple(image_shape)
        side = self.image_shape[1]
        self.halvings, self.map_size = config.halvings(side), config.map_size or side
        self.schedule = {**NOISE, "prediction_type": config.prediction_type}
        down = ["DownBlock2D"] * len(config.block_out_channels)
        self.unet = build_unet(self.image_shape, config, down, mid_block_type="UNetMidBlock2D")
        self.control = self.fresh_control()

    def fresh_control(self) -> nn.Module:
        """Return a ControlNet that starts as a copy of the UNet's encoder and adds nothing yet.

        Convolutions before it bring a map to the size of an image.
        """
        from diffusers import ControlNetModel

        widths = tuple(16 * 2**level for level in range(self.halvings + 1))
        return ControlNetModel.from_unet(self.unet, conditioning_embedding_out_channels=widths, conditioning_channels=1)

    @counted
    def predict(self, xt: Tensor, t: Tensor, edges: Tensor | None, strength: float = 1.0) -> Tensor:
        """Predict the noise, or the velocity (``schedule``), in noisy images.

        Args:
            xt: (B, C, S, S).
            t: int64 (B,), time steps.
            edges: float (B, 1, M, M) in {0, 1}, M = ``map_size``; None: the UNet alone.
            strength: factor of what the ControlNet adds.

        Returns:
            (B, C, S, S).
        """
        down = middle = None
        if edges is not None:
            down, middle = self.control(xt, t, None, edges, strength, return_dict=False)
        added = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return self.unet(xt, t, None, **added, return_dict=False)[0].float()
