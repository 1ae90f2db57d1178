"""ASP's smallest network for tests, and its forward pass a second time: prompts as tokens through timm's own blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models import VisionTransformer
from torch import Tensor, nn

from learners.asp.network import PromptViT
from models.frozen import Frozen
from models.incremental import IncrementalNet
from models.timm_backbone import TimmBackbone

# The tiny setting of ASP's card: 17 tokens of width 48, two layers.
TINY_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2, "num_classes": 0}
IMAGES = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def tiny_vit(**changes) -> VisionTransformer:
    """A random ViT whose norms, positions and biases are no longer the neutral ones that it starts with."""
    torch.manual_seed(0)
    vit = VisionTransformer(**{**TINY_VIT, **changes}).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return vit


def tiny_vit_file(folder: Path, name: str, **arguments: Any) -> str:
    """A file with the random weights of a ViT for 8x8 images; it stands for published weights."""
    torch.manual_seed(7)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(timm.create_model(name, img_size=8, num_classes=0, **arguments).state_dict(), folder / "vit.safetensors")
    return str(folder / "vit.safetensors")


def tiny_prompt_vit(vit: nn.Module | None = None, *, trained: bool = True, **arguments) -> PromptViT:
    """A PromptViT around it; ``trained`` prompts are away from the zeros that they start with."""
    net = PromptViT(Frozen(TimmBackbone(vit or tiny_vit())), **arguments)
    if trained:
        torch.manual_seed(1)
        net.tip.data.normal_()
        net.average_prompt.normal_()
    return net


def attend_as_tokens(vit: nn.Module, x: Tensor, prompts: Tensor, behind: int | None = None) -> Tensor:
    """Class tokens (B, D) of a ViT whose blocks see prompts as further tokens, cut off again behind each block.

    Images x are float (B, 3, H, W), prompts (B, L, P, D); they follow the token ``behind``, or the last one.
    """
    h = vit._pos_embed(vit.patch_embed(x))  # (B, N, D)
    cut = h.shape[1] if behind is None else behind
    for block, extra in zip(vit.blocks, prompts.unbind(1)):
        out = block(torch.cat([h[:, :cut], extra, h[:, cut:]], dim=1))
        h = torch.cat([out[:, :cut], out[:, cut + extra.shape[1] :]], dim=1)
    return vit.norm(h)[:, 0]


def encode_layers(net: PromptViT, query: Tensor) -> tuple[Tensor, Tensor]:
    """Queries (B, D) to mu and sigma (B, L, p * D), layer by layer."""
    layers = [torch.cat([first.detach().expand_as(query), query], dim=1) for first in net.tip[:, 0]]
    mu = torch.stack([net.f_mu(u) for u in layers], dim=1)
    return mu, torch.stack([F.softplus(net.f_sigma(u) - 5) for u in layers], dim=1)


def prompted_as_tokens(
    net: PromptViT, x: Tensor, noise: Tensor | None = None, vits: tuple[nn.Module, nn.Module] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """ASP's forward pass, step by step as its card counts them: features (B, D), mu and sigma (B, L, p * D).

    ``net`` gives prompts and encoders, and both ViTs unless ``vits`` does: the prompted one and the query's. Images x
    are float (B, 3, H, W); the noise (B, L, p * D) is scaled.
    """
    vit, query_vit = vits or (net.vit.network.network,) * 2
    with torch.no_grad():
        query = query_vit(x)
    mu, sigma = encode_layers(net, query)
    z = (mu if noise is None else mu + noise * sigma).view(len(x), *net.tip.shape)  # (B, L, p, D)
    specific = net.alpha * net.average_prompt + (1 - net.alpha) * z
    return attend_as_tokens(vit, x, torch.cat([net.tip.expand_as(z), specific], dim=2)), mu, sigma


def base_loss_as_tokens(
    net: IncrementalNet, images: Tensor, labels: Tensor, anchors: Tensor, noise: Tensor, vits=None
) -> dict[str, Tensor]:
    """The terms of the base session's loss before they are weighed, with a copy of its anchor for every image.

    There is one anchor for every class; noise is (2B, L, p * D), of the B images and of the copies.
    """
    both = torch.cat([images, anchors[labels]])
    features, mu, sigma = prompted_as_tokens(net.backbone, both, noise, vits)
    features, copies = features.split(len(labels))
    distance = 1 - F.cosine_similarity(copies.detach()[:, None], features[None], dim=2, eps=1e-6)  # (copy, image)
    mates = (labels[:, None] == labels[None]).float()
    return {
        "cross_entropy": F.cross_entropy(net.head(features), labels),
        "anchor": ((distance * mates).sum(1) / mates.sum(1)).mean(),
        "kl": (0.5 * (mu**2 + sigma**2 - 2 * sigma.log() - 1)).sum(2).mean(),
    }
