"""The parts of a text-to-image model, read with diffusers and transformers from their folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError
from torch import nn

from models.files.diffusers_folder import (
    PublishedModel,
    check_folder,
    fetch_folder,
    has_vocabulary,
    layout_of,
)
from models.files.weights import UNREADABLE, count_keys, first_line, hub_answers
from utils.run.errors import WeightsError
from utils.run.files import read_json

PREDICTIONS = ("epsilon", "v_prediction")


@dataclass(frozen=True)
class TextToImageParts:
    """A text-to-image model in pieces, on the CPU, as they were read.

    Attributes:
        vae: AutoencoderKL.
        text_encoder: LDMBertEncoder or CLIPTextModel.
        tokenizer: of the text encoder's vocabulary.
        unet: UNet2DConditionModel.
        schedule: see `LatentDiffusion`.
        latent_side: of a latent of the images that it was trained on.

    Raises:
        WeightsError: if the pieces are not of one model.
    """

    vae: nn.Module
    text_encoder: nn.Module
    tokenizer: Any
    unet: nn.Module
    schedule: dict[str, Any]
    latent_side: int

    def __post_init__(self):
        text, unet, vae = self.text_encoder.config, self.unet.config, self.vae.config
        pairs = {
            # A tokenizer that was read from a wrong place knows five words and says nothing about it.
            "the tokenizer's vocabulary": (len(self.tokenizer), text.vocab_size, "the text encoder's"),
            "the text encoder's width": (text.hidden_size, unet.cross_attention_dim, "the UNet's cross_attention_dim"),
            "the number of the VAE's channels": (vae.latent_channels, unet.in_channels, "the UNet's in_channels"),
        }
        for one, (value, wanted, other) in pairs.items():
            if value != wanted:
                raise WeightsError(f"these parts are not of one model: {one} is {value}, {other} {wanted}")

    @property
    def vae_factor(self) -> int:
        """Pixels per latent."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)


def read_folder(source: str, offline: bool, model: PublishedModel) -> TextToImageParts:
    """Read all parts of a folder or a hub id, which is fetched into the usual cache unless it is there.

    Raises:
        WeightsError: if the model is absent, incomplete, damaged or of a kind that we do not know.
    """
    folder = check_folder(source, offline, model) or fetch_folder(source, model)
    layout = layout_of(folder)
    vae, text_encoder, unet = (_read_network(str(folder / part), kind) for part, kind in layout.classes.items())
    text_encoder = getattr(text_encoder, "model", text_encoder)  # LDMBertModel adds a vocabulary head that nobody uses
    words = read_tokenizer(str(folder / "tokenizer"), layout.tokenizer_class, offline=True)
    schedule = layout.schedule or _read_schedule(folder)
    return TextToImageParts(vae, text_encoder, words, unet, schedule, unet.config.sample_size)


def read_tokenizer(source: str, kind: str, offline: bool) -> Any:
    """Read a tokenizer of transformers from a folder or a hub id.

    Raises:
        WeightsError: if it is absent or unreadable.
    """
    import transformers

    # What is here is taken as it is; and an unreachable hub would be asked again and again for most of a minute.
    local = offline or has_vocabulary(source) or not hub_answers()
    try:
        return getattr(transformers, kind).from_pretrained(source, local_files_only=local)
    except (OSError, ValueError, TypeError) as error:
        remedy = "Name a folder that holds vocab.txt, or run once with a network"
        raise WeightsError(f"no tokenizer could be read from {source!r} ({first_line(error)}). {remedy}") from error


def read_network(source: str, kind: str, offline: bool, model: PublishedModel) -> nn.Module:
    """Read one network from a folder or a hub id, which is fetched into the usual cache unless it is there.

    Raises:
        WeightsError: if it is absent, incomplete, damaged or of another architecture than its config.json says.
    """
    here = check_folder(source, offline, model)
    return _read_network(source if here is None else str(here), kind, local=here is not None)


def _read_network(source: str, kind: str, local: bool = True) -> nn.Module:
    """Read a network of which every weight is there.

    Weights that are left over are told by the library and do no harm.
    """
    import diffusers
    import transformers
    from diffusers.pipelines.latent_diffusion import pipeline_latent_diffusion

    places = (diffusers, transformers, pipeline_latent_diffusion)
    try:
        # The library would give weights that are absent or misshapen random values, with a warning; here they count.
        network, report = next(getattr(place, kind) for place in places if hasattr(place, kind)).from_pretrained(
            source, local_files_only=local, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (SafetensorError, UnpicklingError, *UNREADABLE) as error:
        pickled = "its .bin is damaged, or reading it could run foreign code"
        why = pickled if isinstance(error, UnpicklingError) else first_line(error)
        advice = "fetch it again, or save the tensors of its .bin alone, if it holds more"
        raise WeightsError(f"{source} cannot be read as {kind}: {why}; {advice}") from error
    missing, mismatched = sorted(report["missing_keys"]), sorted(report["mismatched_keys"])
    if missing or mismatched:
        misshapen = [f"{key} {tuple(there)} instead of {tuple(wanted)}" for key, there, wanted in mismatched]
        text = count_keys(missing=missing, misshapen=misshapen, unexpected=sorted(report["unexpected_keys"]))
        wrong = f"the weights in {source} are not those that its config.json asks for"
        raise WeightsError(f"{wrong}. {text}. Copy both from one and the same model")
    return network


def _read_schedule(folder: Path) -> dict[str, Any]:
    """Read all that the scheduler's file says, for diffusers to make any of its schedulers from."""
    from diffusers import DDPMScheduler

    path = folder / "scheduler" / "scheduler_config.json"
    config = read_json(path, "fetch it again", WeightsError)
    # Files of 2022 do not say what is predicted.
    schedule = {"prediction_type": "epsilon"} | {key: value for key, value in config.items() if key[:1] != "_"}
    said = {key: schedule.get(key) for key in ("prediction_type", "algorithm_type", "rescale_betas_zero_snr")}
    # By an SDE, an image would not follow from its seed alone; of pure noise, the noise says nothing of an image.
    known = PREDICTIONS[1:] if said["rescale_betas_zero_snr"] else PREDICTIONS
    if said["prediction_type"] not in known or str(said["algorithm_type"]).startswith("sde"):
        raise WeightsError(f"{path}: {said} is not supported; use a model of {' or '.join(known)}, and no SDE")
    try:
        DDPMScheduler.from_config(schedule)
    except UNREADABLE as error:
        raise WeightsError(f"{path} makes no noise of diffusers ({first_line(error)}): fetch it again") from error
    return schedule
