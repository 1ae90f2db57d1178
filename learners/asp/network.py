"""A frozen vision transformer with learned prompts as extra keys and values (ASP, arXiv:2403.09857)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.frozen import Frozen
from utils.run.errors import ConfigError

ENCODER_WIDTH = 256  # of both prompt encoders
SOFTPLUS_SHIFT = -5.0  # the encoder's spread starts near softplus(-5) = 0.0067


class PromptViT(nn.Module):
    """One frozen ViT in two roles: without prompts it gives the query, with prompts the features.

    Half of the prompts are the same for all images (task-invariant, TIP), half are drawn from a Gaussian that two
    affine encoders read off the image's query (task-specific, TSP), mixed with their mean over the data set.

    Args:
        vit: a timm VisionTransformer without classifier, frozen.
        num_prompts: P, even; P / 2 of each kind.
        alpha: share of the average prompt in the task-specific ones.
        tip_init: "zero" or "random" (standard normal).

    Raises:
        ConfigError: if the network is no plain vision transformer.
    """

    def __init__(self, vit: Frozen, num_prompts: int = 6, alpha: float = 0.8, tip_init: str = "zero"):
        super().__init__()
        _check_is_vit(getattr(vit.network, "network", vit.network))
        self.vit, self.alpha = vit, alpha
        self.num_features = D = vit.num_features
        self.num_layers, self.half = len(self._timm.blocks), num_prompts // 2
        shape = (self.num_layers, self.half, D)
        self.tip = nn.Parameter(torch.zeros(shape) if tip_init == "zero" else torch.randn(shape))
        # No activation between the layers: both encoders are affine (the code's, not the figure's, form).
        self.f_mu = nn.Sequential(nn.Linear(2 * D, ENCODER_WIDTH), nn.Linear(ENCODER_WIDTH, self.half * D))
        self.f_sigma = nn.Sequential(nn.Linear(2 * D, ENCODER_WIDTH), nn.Linear(ENCODER_WIDTH, self.half * D))
        self.register_buffer("average_prompt", torch.zeros(shape))

    @property
    def _timm(self) -> nn.Module:
        return self.vit.network.network

    def forward(self, x: Tensor) -> Tensor:
        """Images, float (B, 3, H, W), to features (B, D), without noise."""
        return self.prompted(x, self.query(x))[0]

    @torch.no_grad()
    def query(self, x: Tensor) -> Tensor:
        """The image as the bare ViT sees it, float32 (B, D). It never changes: keep it where the image stays."""
        return self._run(x, None).float()

    def encode(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and spread of the task-specific prompts.

        Args:
            query: (B, D).

        Returns:
            mu and sigma, float32 (B * L, p * D), image by image.
        """
        with torch.autocast(query.device.type, enabled=False):
            first = self.tip[:, 0].detach()  # the encoders read the first TIP token of each layer, and do not move it
            pairs = torch.cat([first.expand(len(query), -1, -1), query.unsqueeze(1).expand(-1, len(first), -1)], dim=2)
            u = pairs.flatten(0, 1)  # (B * L, 2D)
            return self.f_mu(u), F.softplus(self.f_sigma(u) + SOFTPLUS_SHIFT)

    def mean_prompt(self, query: Tensor) -> Tensor:
        """The mean of mu over images with these queries (N, D), float32 (L, p, D).

        The encoder is affine, so the mean prompt is the prompt of the mean query.
        """
        return self.encode(query.mean(0, keepdim=True))[0].view_as(self.tip)

    def prompted(self, x: Tensor, query: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Features under prompts.

        Args:
            x: images, float (B, 3, H, W).
            query: (B, D), of the same images.
            noise: standard normal (B * L, p * D), scaled; None: the mean prompts.

        Returns:
            Features (B, D), and mu and sigma of ``encode``.
        """
        mu, sigma = self.encode(query)
        z = mu if noise is None else mu + noise * sigma
        z = z.view(len(x), *self.tip.shape)  # (B, L, p, D)
        specific = self.alpha * self.average_prompt + (1 - self.alpha) * z
        prompts = torch.cat([self.tip.expand_as(z), specific], dim=2)  # (B, L, P, D)
        return self._run(x, prompts).float(), mu, sigma

    def noise_shape(self, num_images: int) -> tuple[int, int]:
        """Of the noise of so many images."""
        return num_images * self.num_layers, self.half * self.num_features

    def _run(self, x: Tensor, prompts: Tensor | None) -> Tensor:
        vit = self._timm
        h = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(x))))  # (B, N, D)
        for layer, block in enumerate(vit.blocks):
            # Of the last block nothing but the class token (two, in a distilled ViT) is read.
            last = layer == self.num_layers - 1 and vit.global_pool == "token"
            wanted = vit.num_prefix_tokens if last else h.shape[1]
            h = run_block(block, h, None if prompts is None else prompts[:, layer], wanted)
        return vit.forward_head(vit.norm(h), pre_logits=True)


def run_block(block: nn.Module, h: Tensor, prompts: Tensor | None, wanted: int) -> Tensor:
    """A timm block whose attention also looks at prompts.

    The same as appending the prompts as tokens and cutting them off behind the block, but no prompt asks questions of
    its own or goes through the MLP.

    Args:
        block: timm's ViT block.
        h: tokens (B, N, D).
        prompts: (B, P, D); None: none.
        wanted: the first so many tokens are computed.

    Returns:
        (B, wanted, D).
    """
    normed = block.norm1(h)
    out = _attend(block.attn, normed, None if prompts is None else block.norm1(prompts), wanted)
    h = h[:, :wanted] + block.ls1(out)
    return h + block.ls2(block.mlp(block.norm2(h)))


def _attend(attn: nn.Module, h: Tensor, prompts: Tensor | None, wanted: int) -> Tensor:
    q, k, v = attn.qkv(h).unflatten(2, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)  # (B, heads, N, d)
    q, k = attn.q_norm(q[:, :, :wanted]), attn.k_norm(k)
    if prompts is not None:
        width = attn.num_heads * attn.head_dim  # rows of the queries, which prompts do not need
        weight, bias = attn.qkv.weight[width:], None if attn.qkv.bias is None else attn.qkv.bias[width:]
        extra = F.linear(prompts, weight, bias).unflatten(2, (2, attn.num_heads, attn.head_dim))
        extra_k, extra_v = extra.permute(2, 0, 3, 1, 4)
        k, v = torch.cat([k, attn.k_norm(extra_k)], dim=2), torch.cat([v, extra_v], dim=2)
    out = F.scaled_dot_product_attention(q, k, v)
    return attn.proj(attn.norm(out.transpose(1, 2).flatten(2)))


def _check_is_vit(network: nn.Module) -> None:
    from timm.models.vision_transformer import Attention, Block, VisionTransformer

    if not isinstance(network, VisionTransformer):
        raise ConfigError(
            f"prompts need a vision transformer of timm, not a {type(network).__name__}: choose a convnet_type such as "
            "vit_base_patch16_224.augreg_in21k_ft_in1k"
        )
    plain = all(type(block) is Block and type(block.attn) is Attention for block in network.blocks)
    if not plain or any(getattr(block.attn, "gate", None) is not None for block in network.blocks):
        raise ConfigError(
            "prompts need plain pre-norm blocks (timm's Block with Attention), which this network does not have"
        )
