"""Checkpoints of CompVis' latent diffusion code, a .ckpt and its YAML, taken apart into diffusers' networks."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from models.files.compvis_yaml import read_yaml
from models.files.diffusers_folder import LDM_SCHEDULE, check_tokenizer
from models.files.diffusers_parts import TextToImageParts, read_tokenizer
from models.files.weights import check_weights_file, load_exactly, read_weights
from utils.run.errors import ConfigError, WeightsError

Prefix = str | tuple[str, ...]  # one of several is enough
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
VAE_PARTS = tuple(VAE + part for part in ("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))  # no losses
TEXT_HEADS = 8  # BERTEmbedder's; shapes tell heads times width alone
# Side of the latents of text2img-large. The YAML's image_size is not read: it stands there with 8, 32 and 64.
LATENT_SIDE = 32

SCHEDULE_KEYS = {"num_train_timesteps": "timesteps", "beta_start": "linear_start", "beta_end": "linear_end"}
# Numbers of the YAML that CompVis keeps beside the weights too: in which buffer, and how they are read off it.
KEPT = {"timesteps": ("betas", len), "linear_start": ("betas", itemgetter(0)),
        "linear_end": ("betas", itemgetter(-1)), "scale_factor": ("scale_factor", float)}  # fmt: skip
# Weights by which such a checkpoint is known: one of each part, and all from which a size is read.
SHOWN = {"unet": UNET + "out.2.weight", "vae": VAE + "post_quant_conv.weight", "words": TEXT + "token_emb.weight",
         "positions": TEXT + "pos_emb.emb.weight", "queries": TEXT + "attn_layers.layers.0.1.to_q.weight",
         "feed_forward": TEXT + "attn_layers.layers.1.1.net.0.0.weight"}  # fmt: skip
# A key that gives another kind of model away.
FOREIGN = {TEXT + "text_model.": "Stable Diffusion 1.x", "cond_stage_model.model.": "Stable Diffusion 2.x",
           "conditioner.embedders.": "Stable Diffusion XL", "denoise_fn.": "a diffusion model in pixels",
           "unet.": "a model in the names of diffusers"}  # fmt: skip
# CompVis' names of the text encoder's layers to those of LDMBertEncoder. Even blocks (0.) are attention, odd ones (1.)
# feed-forward.
TEXT_NAMES = {"token_emb": "embed_tokens", "pos_emb.emb": "embed_positions", "norm": "layer_norm",
              "0.0": "self_attn_layer_norm", "0.1.to_q": "self_attn.q_proj", "0.1.to_k": "self_attn.k_proj",
              "0.1.to_v": "self_attn.v_proj", "0.1.to_out": "self_attn.out_proj",
              "1.0": "final_layer_norm", "1.1.net.0.0": "fc1", "1.1.net.2": "fc2"}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """Weights of several networks in one file, under CompVis' names, from which diffusers' networks are filled.

    Attributes:
        path: where they come from, for messages.
        weights: by name.
        wanted: which networks they must be of, for messages.
        hint: what the user may do, for messages.
    """

    path: str
    weights: dict[str, Tensor]
    wanted: str = "that the YAML describes"
    hint: str = "Use the YAML that came with the checkpoint, or fetch the checkpoint again"

    def shapes(self, shown: dict[str, str], kind: str, advice: str) -> dict[str, torch.Size]:
        """Return the shapes of those weights by which a checkpoint is known.

        Raises:
            WeightsError: if it lacks one, and so is of another kind.
        """
        if absent := [key for key in shown.values() if key not in self.weights]:
            found = f"it has {len(self.weights)} weights, but lacks {absent[0]}"
            raise WeightsError(f"{self.path} is {kind}: {found}. {advice}")
        return {name: self.weights[key].shape for name, key in shown.items()}

    def section(self, prefix: Prefix, unused: Prefix = ()) -> dict[str, Tensor]:
        """Return the weights whose names begin with a prefix, but for those that begin as an unused one."""
        names = (key for key in self.weights if key.startswith(prefix) and not key.startswith(unused))
        return {key: self.weights[key] for key in names}

    def fill(self, network: nn.Module, convert: Callable, prefix: Prefix, unused: Prefix = ()) -> None:
        """Put the converted weights of a section into a network; each of them must be used.

        diffusers' own ``from_single_file`` would not say which weights are missing, nor that some were left over, and
        would fetch its config from the hub.

        Args:
            network: takes the very tensors; build it on the meta device, so that no weight is drawn at random first.
            convert: gives diffusers' names to a section, by the network's config.
            prefix, unused: of the section, see `section`.

        Raises:
            WeightsError: if a weight is missing, misshapen or left over.
        """
        section = self.section(prefix, unused)
        try:
            converted = {key: value for key, value in convert(section, network.config).items() if value is not None}
        except KeyError as error:
            raise WeightsError(f"{self.path} lacks the weight {error.args[0]}: fetch the checkpoint again") from error
        used = {tensor.data_ptr() for tensor in converted.values()}
        converted |= {key: tensor for key, tensor in section.items() if tensor.data_ptr() not in used}
        what = f"the {type(network).__name__} {self.wanted}"
        load_exactly(network, converted, self.path, what, self.hint, assign=True)


def check_checkpoint(path: str, yaml: str | None, tokenizer: str, offline: bool, key: str) -> None:
    """See that checkpoint, YAML and tokenizer are there; no weights are read.

    Raises:
        WeightsError: if the checkpoint or the tokenizer is absent.
        ConfigError: if the YAML is absent or is none of a latent diffusion model.
    """
    check_weights_file(path, key, ". Put text2img-large's model.ckpt there, or name CompVis/ldm-text2im-large-256")
    read_yaml(yaml)
    check_tokenizer(tokenizer, "vocab.txt", "bert-base-uncased", offline)


def read_checkpoint(path: str, yaml: str | None, tokenizer: str, offline: bool) -> TextToImageParts:
    """Read and convert a checkpoint; every weight must find its place.

    Args:
        path: .ckpt or .safetensors with CompVis' names.
        yaml: that describes it.
        tokenizer: folder or hub id of the text encoder's BERT tokenizer.
        offline: fetch nothing.

    Raises:
        WeightsError: if a file is absent, is a pickle with code, or is of another architecture.
        ConfigError: if the YAML is wrong or contradicts the checkpoint.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders import single_file_utils as names

    params = read_yaml(yaml)
    checkpoint = Checkpoint(path, read_weights(path))
    kinds = (kind for prefix, kind in FOREIGN.items() if checkpoint.section(prefix))
    kind = next(kinds, "no latent diffusion model with a BERT text encoder")
    advice = "Use text2img-large's model.ckpt here; a Stable Diffusion is read from its hub id or its diffusers folder"
    shape = checkpoint.shapes(SHOWN, kind, advice)
    _check_numbers(params, checkpoint.weights, yaml)
    original = {"model": {"params": params}}
    unet_config = names.create_unet_diffusers_config_from_ldm(original, checkpoint.section(UNET))
    unet_config["sample_size"] = LATENT_SIDE  # the library takes every checkpoint for one of 512 pixels
    vae_config = names.create_vae_diffusers_config_from_ldm(original, checkpoint.section(VAE_PARTS))
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**unet_config), AutoencoderKL(**vae_config)
        text_encoder = _text_encoder(params["cond_stage_config"]["params"], shape)
    checkpoint.fill(unet, names.convert_ldm_unet_checkpoint, UNET)
    checkpoint.fill(vae, names.convert_ldm_vae_checkpoint, VAE_PARTS)
    checkpoint.fill(text_encoder, _rename_text, TEXT, unused=TEXT + "to_logits.")  # a vocabulary head
    schedule = LDM_SCHEDULE | {name: params[key] for name, key in SCHEDULE_KEYS.items()}
    words = read_tokenizer(tokenizer, "BertTokenizerFast", offline)
    return TextToImageParts(vae, text_encoder, words, unet, schedule, LATENT_SIDE)


def _check_numbers(params: dict[str, Any], weights: dict[str, Tensor], path: str) -> None:
    """Compare the YAML's numbers with those that CompVis keeps beside the weights; no shape would show a mistake."""
    found = {key: float(read(weights[buffer])) for key, (buffer, read) in KEPT.items() if buffer in weights}
    for key, there in found.items():
        # In half precision the checkpoint's numbers are rounded; those that count are the YAML's.
        if abs(params[key] - there) > max(1e-4, torch.finfo(weights[KEPT[key][0]].dtype).eps) * abs(there):
            numbers = f"it says model.params.{key}: {params[key]}, the checkpoint {there:.6g} (in {KEPT[key][0]})"
            raise ConfigError(f"yaml={path!r} does not belong to this checkpoint: {numbers}")


# ---------------------------------------------------------------------- the text encoder


def _text_encoder(sizes: dict[str, int], shape: dict[str, torch.Size]) -> nn.Module:
    """Build a text encoder of the YAML's and the weights' sizes, not yet filled."""
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertEncoder

    return LDMBertEncoder(LDMBertConfig(
        vocab_size=shape["words"][0], max_position_embeddings=shape["positions"][0], d_model=sizes["n_embed"],
        encoder_layers=sizes["n_layer"], encoder_attention_heads=TEXT_HEADS, head_dim=shape["queries"][0] // TEXT_HEADS,
        encoder_ffn_dim=shape["feed_forward"][0], dropout=0.0))  # fmt: skip


def _rename_text(section: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Give weights the names of LDMBertEncoder; one whose name is nobody's is left out."""
    renamed = {}
    for key, value in section.items():
        layer, (name, _, kind) = "", key.removeprefix(TEXT).rpartition(".")  # kind: weight or bias
        if block := re.fullmatch(r"attn_layers\.layers\.(\d+)\.(.*)", name):
            layer, name = f"layers.{int(block[1]) // 2}.", f"{int(block[1]) % 2}.{block[2]}"
        if name in TEXT_NAMES:
            renamed[f"{layer}{TEXT_NAMES[name]}.{kind}"] = value
    return renamed
