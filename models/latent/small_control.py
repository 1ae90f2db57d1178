"""A small diffusion model in pixels and a ControlNet for it, both our own, made to be trained from scratch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from models.latent.own import OwnModel
from models.latent.small import NOISE, require_multiples
from utils.run.errors import ConfigError


class SmallControlNet(OwnModel):
    """A UNet that draws small images, and a copy of its encoder that bends it along given edges.

    Zhang et al., "Adding Conditional Control to Text-to-Image Diffusion Models", ICCV 2023, arXiv:2302.05543, at the
    size of a laptop. It knows no classes and no words: all that an image shows comes from its edges.

    Args:
        image_shape: (C, S, S) of the images.
        map_size: side of the edge maps, S times a power of two.
        block_out_channels: width of each level of the UNet; every level after the first halves the side.
        layers_per_block: residual blocks per level on the way down; the way up has one more.
        norm_num_groups: groups of every GroupNorm.
        prediction_type: "epsilon" or "v_prediction".

    Raises:
        ConfigError: if the shapes do not fit each other.
    """

    source = "small_controlnet"

    def __init__(
        self,
        image_shape: Sequence[int],
        map_size: int,
        *,
        block_out_channels: Sequence[int] = (32, 64),
        layers_per_block: int = 1,
        norm_num_groups: int = 8,
        prediction_type: str = "v_prediction",
    ):
        super().__init__()
        self.arguments: dict[str, Any] = {
            "image_shape": list(image_shape), "map_size": map_size, "block_out_channels": list(block_out_channels),
            "layers_per_block": layers_per_block, "norm_num_groups": norm_num_groups,
            "prediction_type": prediction_type,
        }  # fmt: skip
        self.halvings = _check_shapes(self.arguments)
        self.image_shape, self.map_size = tuple(image_shape), map_size
        self.schedule = {**NOISE, "prediction_type": prediction_type}
        self.unet = _unet(self.image_shape, block_out_channels, layers_per_block, norm_num_groups)
        self.control = self.fresh_control()

    def fresh_control(self) -> nn.Module:
        """A ControlNet that starts as a copy of the UNet's encoder and adds nothing yet.

        Convolutions before it bring a map to the size of an image.
        """
        from diffusers import ControlNetModel

        widths = tuple(16 * 2**level for level in range(self.halvings + 1))
        return ControlNetModel.from_unet(self.unet, conditioning_embedding_out_channels=widths, conditioning_channels=1)

    def predict(self, xt: Tensor, t: Tensor, edges: Tensor | None, strength: float = 1.0) -> Tensor:
        """The noise, or the velocity (``schedule``), in noisy images.

        Args:
            xt: (B, C, S, S).
            t: int64 (B,), time steps.
            edges: float (B, 1, M, M) in {0, 1}, M = ``map_size``; None: the UNet alone.
            strength: factor of what the ControlNet adds.

        Returns:
            (B, C, S, S).
        """
        if edges is None:
            return self.unet(xt, t, None, return_dict=False)[0].float()
        down, middle = self.control(xt, t, None, controlnet_cond=edges, conditioning_scale=strength, return_dict=False)
        return self.unet(
            xt, t, None, down_block_additional_residuals=down, mid_block_additional_residual=middle, return_dict=False
        )[0].float()


def _unet(shape: Sequence[int], widths: Sequence[int], layers: int, groups: int) -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=shape[1], in_channels=shape[0], out_channels=shape[0], block_out_channels=tuple(widths),
        down_block_types=("DownBlock2D",) * len(widths), up_block_types=("UpBlock2D",) * len(widths),
        mid_block_type="UNetMidBlock2D", layers_per_block=layers, norm_num_groups=groups,
    )  # fmt: skip


def _check_shapes(given: dict[str, Any]) -> int:
    """How often a map is halved to an image's side."""
    side, map_size, widths = given["image_shape"][1], given["map_size"], given["block_out_channels"]
    if side % 2 ** (len(widths) - 1):
        raise ConfigError(
            f"{len(widths)} block_out_channels halve an image {len(widths) - 1} times, so its side must be a multiple "
            f"of {2 ** (len(widths) - 1)}, not {side}: give fewer of them"
        )
    require_multiples(given, "block_out_channels", "norm_num_groups")
    times, rest = divmod(map_size, side)
    if rest or not times or times & (times - 1):
        raise ConfigError(f"map_size={map_size}: it must be the side of the images, {side}, or 2, 4, 8, ... times that")
    return times.bit_length() - 1
