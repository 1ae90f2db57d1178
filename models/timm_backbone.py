"""Backbones by name: ours first, then every model of timm, always with an explicit weight tag."""

from __future__ import annotations

import sys
from contextlib import suppress

from torch import Tensor, nn

from models import BACKBONES
from models.files.weights import (
    UNREADABLE,
    check_weights_file,
    load_exactly,
    published_weights,
    read_weights,
    renamed_in_order,
)
from models.options import BackboneOptions
from utils.run.errors import ConfigError, WeightsError
from utils.run.registry import nearest, shown

PILOT_ALIASES = {
    "pretrained_vit_b16_224": "vit_base_patch16_224.augreg_in21k_ft_in1k",
    "vit_base_patch16_224": "vit_base_patch16_224.augreg_in21k_ft_in1k",
    "pretrained_vit_b16_224_in21k": "vit_base_patch16_224.augreg_in21k",
    "vit_base_patch16_224_in21k": "vit_base_patch16_224.augreg_in21k",
    # For a ViT with prompts: the name meant these weights in the timm that it was written for.
    "pretrained_vit_b16_224_vpt": "vit_base_patch16_224.augreg_in21k_ft_in1k",
}
OURS_TO_SAY = ("num_classes", "img_size", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path")


class TimmBackbone(nn.Module):
    """A timm model without its classifier; the model itself is ``network``.

    Args:
        network: built with num_classes=0, so that its output is pooled features.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        # Some models (MobileNetV3) widen the features once more behind the pooling.
        self.num_features: int = getattr(network, "head_hidden_size", None) or network.num_features

    def forward(self, x: Tensor) -> Tensor:
        """Images, float (B, 3, H, W), normalised as the weights want it, to features (B, D)."""
        return self.network(x)


def check_backbone_name(name: str, options: BackboneOptions, fetch: bool = False) -> None:
    """Find mistakes in the name and in where weights come from, without building anything.

    With ``fetch``, published weights are fetched into the cache unless they are there; else nothing is fetched.

    Raises:
        ConfigError: for an unknown name or tag, a timm model without a tag that says which weights to take, or
            arguments that cannot be given.
        WeightsError: if the local file is absent, or published weights are and cannot be fetched.
    """
    if options.weights is not None:
        check_weights_file(options.weights)
    name = _full_name(name, options)
    if name not in BACKBONES and options.wants_published and (fetch or options.offline):
        import timm

        published_weights(timm.get_pretrained_cfg(name), options.offline)


def has_weights(name: str, options: BackboneOptions) -> bool:
    """Say whether a backbone starts from weights that somebody trained; else it starts at random."""
    return options.weights is not None or (options.pretrained and name.lower() not in BACKBONES)


def build_backbone(name: str, options: BackboneOptions) -> nn.Module:
    """Build a backbone by name, with ``num_features`` and (B, 3, H, W) -> (B, num_features).

    Args:
        name: one of `models.BACKBONES`, or a timm name with weight tag such as "vit_small_patch16_224.augreg_in1k", or
            one of PILOT's names for ViT-B/16. A name that we share with timm means ours.
        options: see `BackboneOptions`.

    Raises:
        ConfigError: for an unknown name or tag, a missing tag, or a size of images or arguments that do not suit it.
        WeightsError: if weights are absent, unreadable or do not fit.
    """
    name = _full_name(name, options)
    network = BACKBONES[name](options) if name in BACKBONES else _build_timm(name, options)
    if options.weights is not None:
        try:
            _load_local(network, options.weights)
        except WeightsError as error:
            raise WeightsError(f"backbone_weights: {error}") from error
    return network if name in BACKBONES else TimmBackbone(network)


def end_after_block(backbone: nn.Module, block: int) -> None:
    """Cut what follows a block of a ViT, so that its class token, behind the last norm, is the feature.

    Args:
        backbone: of `build_backbone`.
        block: counted from 0.

    Raises:
        ConfigError: if the network has no class token, or not so many blocks.
    """
    network, key = getattr(backbone, "network", backbone), f"features_from={block}"
    blocks = getattr(network, "blocks", None)
    if blocks is None or getattr(network, "cls_token", None) is None:
        remedy = "leave it out, or choose a ViT with one as convnet_type"
        raise ConfigError(f"{key} asks for a class token, which {type(network).__name__} has not: {remedy}")
    if block >= len(blocks):
        raise ConfigError(f"{key}: this ViT has the blocks 0 to {len(blocks) - 1}")
    network.blocks = blocks[: block + 1]
    network.global_pool = "token"


def _full_name(name: str, options: BackboneOptions) -> str:
    """Return one of our names, or a timm name that says all that is needed."""
    if options.args and name.lower() in BACKBONES:
        raise ConfigError(f"backbone_args={options.args!r} is for timm's models: {name} takes no arguments")
    if options.args and options.wants_published:
        remedy = "pretrained=false trains it from scratch, backbone_weights names a file that fits"
        another = f"another network than the published weights of {name} are for"
        raise ConfigError(f"backbone_args={options.args!r} builds {another}: {remedy}")
    if taken := sorted(set(options.args) & set(OURS_TO_SAY)):
        raise ConfigError(f"backbone_args.{taken[0]} follows from the data and other keys: leave it out")
    return name.lower() if name.lower() in BACKBONES else _timm_name(name.lower(), options)


def _timm_name(name: str, options: BackboneOptions) -> str:
    import timm

    name = PILOT_ALIASES.get(name, name)
    base, _, tag = name.partition(".")
    if base not in timm.list_models():
        ours = BACKBONES.names()
        hint = nearest(name, [*ours, *PILOT_ALIASES, *timm.list_models(), *timm.list_pretrained()]) or "."
        choice = f"Ours: {', '.join(ours)}; any timm model works too, by its full name with weight tag"
        raise ConfigError(f"convnet_type: unknown backbone {shown(name)}{hint} {choice}")
    tagged = timm.list_pretrained(f"{base}.*")
    if tag and name not in tagged:
        known = ", ".join(tagged) or "none"
        raise ConfigError(f"convnet_type: timm has no weights {shown(name)}{nearest(name, tagged)} Known: {known}")
    if not tag and options.wants_published:
        choice = f"say which weights: {', '.join(tagged)}" if tagged else "timm has no weights for it"
        raise ConfigError(f"convnet_type={name!r} has no weight tag: {choice}; pretrained=false trains it from scratch")
    return name


def _build_timm(name: str, options: BackboneOptions) -> nn.Module:
    import timm

    cfg, images = timm.get_pretrained_cfg(name), f"images of {options.image_size} px"
    arguments: dict = {"num_classes": 0, **options.args}
    if cfg is not None and cfg.fixed_input_size:
        # Also with published weights: timm then interpolates the positions.
        arguments["img_size"] = options.image_size
    if options.wants_published:
        file = published_weights(cfg, options.offline)
        # Only original files, .npz, need a model's own reader; the hub holds them converted.
        overlay = {"file": str(file), "custom_load": file.suffix == ".npz"}
        arguments |= {"pretrained": True, "pretrained_cfg_overlay": overlay}
    try:
        network = timm.create_model(name, **arguments)
    except (AssertionError, *UNREADABLE) as error:
        given, reason = f"backbone_args={options.args!r}", error or type(error).__name__
        raise ConfigError(f"timm cannot build {name} for {images} with {given}: {reason}") from error
    embed = getattr(network, "patch_embed", None)
    # What is left over would be cut off in silence.
    patch = embed.patch_size[0] if isinstance(embed, timm.layers.PatchEmbed) and not embed.dynamic_img_pad else 1
    if options.image_size % patch or 0 in getattr(embed, "grid_size", ()):
        raise ConfigError(f"{images} are no whole patches of {name}: set image_size to a multiple of {patch}")
    return network


def _load_local(network: nn.Module, path: str) -> None:
    classifiers = getattr(network, "pretrained_cfg", {}).get("classifier") or "fc"
    classifiers = (classifiers,) if isinstance(classifiers, str) else classifiers
    weights = {key: value for key, value in read_weights(path).items() if key.rpartition(".")[0] not in classifiers}
    # timm's own translation of foreign key names and of positions for other image sizes, where a model has one.
    translate = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", lambda weights, _: weights)
    with suppress(AssertionError, *UNREADABLE):  # of another width: what does not fit is said below
        weights = translate(weights, network)
    weights = renamed_in_order(network, weights)
    load_exactly(network, weights, path, "this backbone", "Check convnet_type, stem and image size")
