"""A frozen vision transformer with learned prompts as extra keys and values (ASP, arXiv:2403.09857)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.frozen import Frozen
from utils.run.errors import ConfigError
from utils.training.ledger import counted

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
        network = getattr(vit.network, "network", vit.network)
        _check_is_vit(network)
        self.vit, self.alpha, self.num_layers = vit, alpha, len(network.blocks)
        self.num_features = D = vit.num_features
        shape = (self.num_layers, num_prompts // 2, D)
        self.tip = nn.Parameter(torch.zeros(shape) if tip_init == "zero" else torch.randn(shape))
        # No activation between the layers: both encoders are affine (the code's, not the figure's, form).
        self.f_mu = nn.Sequential(nn.Linear(2 * D, ENCODER_WIDTH), nn.Linear(ENCODER_WIDTH, num_prompts // 2 * D))
        self.f_sigma = nn.Sequential(nn.Linear(2 * D, ENCODER_WIDTH), nn.Linear(ENCODER_WIDTH, num_prompts // 2 * D))
        self.register_buffer("average_prompt", torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        """Map images, float (B, 3, H, W), to features (B, D), without noise."""
        return self.prompted(x, self.query(x))[0]

    @torch.no_grad()
    def query(self, x: Tensor) -> Tensor:
        """Return images as the bare ViT sees them, float32 (B, D).

        They never change: keep them where the images stay.
        """
        return self._run(x, None).float()

    def encode(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and spread of the task-specific prompts.

        Args:
            query: (B, D).

        Returns:
            mu and sigma, float32 (B * L, p * D), image by image.
        """
        with torch.autocast(query.device.type, enabled=False):
            first = self.tip[:, 0].detach()  # the encoders read the first TIP token of each layer, and do not move it
            u = torch.cat([first.repeat(len(query), 1), query.repeat_interleave(len(first), dim=0)], dim=1)  # (BL, 2D)
            return self.f_mu(u), F.softplus(self.f_sigma(u) + SOFTPLUS_SHIFT)

    @torch.no_grad()
    def mean_prompt(self, queries: Tensor) -> Tensor:
        """Return the mean of mu over images with these queries, (N, D) on any device: float32 (L, p, D).

        The encoder is affine, so the mean prompt is the prompt of the mean query.
        """
        return self.encode(queries.to(self.tip.device).mean(0, keepdim=True))[0].view_as(self.tip)

    def prompted(self, x: Tensor, query: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return features under prompts.

        Args:
            x: images, float (B, 3, H, W).
            query: (B, D), of the same images.
            noise: standard normal (B * L, p * D), scaled; None: the mean prompts.

        Returns:
            Features (B, D), and mu and sigma of ``encode``.
        """
        mu, sigma = self.encode(query)
        z = (mu if noise is None else mu + noise * sigma).view(len(x), *self.tip.shape)  # (B, L, p, D)
        specific = self.alpha * self.average_prompt + (1 - self.alpha) * z
        prompts = torch.cat([self.tip.expand_as(z), specific], dim=2)  # (B, L, P, D)
        return self._run(x, prompts).float(), mu, sigma

    @counted
    def _run(self, x: Tensor, prompts: Tensor | None) -> Tensor:
        vit = self.vit.network.network  # timm's, within its adapter
        h = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(x))))  # (B, N, D)
        for layer, block in enumerate(vit.blocks):
            # Of the last block nothing but the class token (two, in a distilled ViT) is read.
            last = layer == self.num_layers - 1 and vit.global_pool == "token"
            wanted = vit.num_prefix_tokens if last else h.shape[1]
            h = run_block(block, h, None if prompts is None else prompts[:, layer], wanted)
        return vit.forward_head(vit.norm(h), pre_logits=True)


def run_block(block: nn.Module, h: Tensor, prompts: Tensor | None, wanted: int) -> Tensor:
    """Run a timm block whose attention also looks at prompts.

    It equals a block that gets the prompts as further tokens and drops them behind it, but no prompt asks questions of
    its own or goes through the MLP.

    Args:
        block: timm's ViT block.
        h: tokens (B, N, D).
        prompts: (B, P, D); None: none.
        wanted: how many of the first tokens are computed.

    Returns:
        (B, wanted, D).
    """
    attn, tokens = block.attn, h if prompts is None else torch.cat([h, prompts], dim=1)
    qkv = attn.qkv(block.norm1(tokens)).unflatten(2, (3, attn.num_heads, attn.head_dim))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N + P, d)
    out = F.scaled_dot_product_attention(attn.q_norm(q[:, :, :wanted]), attn.k_norm(k), v)
    h = h[:, :wanted] + block.ls1(attn.proj(attn.norm(out.transpose(1, 2).flatten(2))))
    return h + block.ls2(block.mlp(block.norm2(h)))


def _check_is_vit(network: nn.Module) -> None:
    from timm.models.vision_transformer import Attention, Block, VisionTransformer

    if not isinstance(network, VisionTransformer):
        remedy = "choose a convnet_type such as vit_base_patch16_224.augreg_in21k_ft_in1k"
        raise ConfigError(f"prompts need a vision transformer of timm, not a {type(network).__name__}: {remedy}")
    for block in network.blocks:
        if type(block) is not Block or type(block.attn) is not Attention or getattr(block.attn, "gate", None):
            raise ConfigError("prompts need plain pre-norm blocks, timm's Block with Attention: choose another ViT")
