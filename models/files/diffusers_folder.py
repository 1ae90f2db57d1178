"""Where diffusers keeps a model, on disk or on the hub: a folder with model_index.json, or with one network."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from models.files.weights import check_content, first_line, first_names, hub_answers, is_weights_file
from models.latent.contract import NOISE
from utils.run.errors import WeightsError
from utils.run.files import read_json

HUB_ID = re.compile(r"([\w-][\w.-]*/)?[\w-][\w.-]*")
# Of each row one file is enough; an index stands for weights in several files.
WHOLE_OR_CUT = ("", ".index.json")
DIFFUSERS_WEIGHTS = [f"diffusion_pytorch_model.{kind}{cut}" for cut in WHOLE_OR_CUT for kind in ("safetensors", "bin")]
TRANSFORMERS_WEIGHTS = [f"{name}{cut}" for cut in WHOLE_OR_CUT for name in ("model.safetensors", "pytorch_model.bin")]
VOCABULARIES = ("vocab.txt", "tokenizer.json", "merges.txt")
# What text2img-large was trained with. Its scheduler file is of 2022 and may lack fields, so it is not read.
LDM_SCHEDULE = {**NOISE, "prediction_type": "epsilon"}


@dataclass(frozen=True)
class PipelineLayout:
    """Where a pipeline keeps its parts, and of which class they are.

    Attributes:
        vae, text_encoder: folders.
        text_encoder_class, tokenizer_class: of transformers, but for diffusers' own LDMBertModel.
        schedule: null: the scheduler's own file counts.
    """

    vae: str
    text_encoder: str
    text_encoder_class: str
    tokenizer_class: str
    schedule: dict[str, Any] | None = None

    @property
    def classes(self) -> dict[str, str]:
        return {self.vae: "AutoencoderKL", self.text_encoder: self.text_encoder_class, "unet": "UNet2DConditionModel"}

    @property
    def files(self) -> list[list[str]]:
        """What a whole folder holds; of each row one file is enough."""
        weights = {self.vae: DIFFUSERS_WEIGHTS, self.text_encoder: TRANSFORMERS_WEIGHTS, "unet": DIFFUSERS_WEIGHTS}
        rows = [[f"{part}/config.json"] for part in weights]
        rows += [[f"{part}/{name}" for name in names] for part, names in weights.items()]
        rows += [[f"tokenizer/{name}" for name in VOCABULARIES]]
        return rows if self.schedule else [*rows, ["scheduler/scheduler_config.json"]]


LAYOUTS = {
    "LDMTextToImagePipeline": PipelineLayout("vqvae", "bert", "LDMBertModel", "BertTokenizerFast", LDM_SCHEDULE),
    "StableDiffusionPipeline": PipelineLayout("vae", "text_encoder", "CLIPTextModel", "CLIPTokenizerFast"),
}


@dataclass(frozen=True)
class PublishedModel:
    """A model as a user names it, for checks and errors.

    Attributes:
        key: what the user calls it.
        kind: of model.
        example: a hub id that fits.
        file: a published single file that fits as well.
        index: the file by which such a folder is known: that of a pipeline, or of one network.
    """

    key: str
    kind: str
    example: str
    file: str | None = None
    index: Literal["model_index.json", "config.json"] = "model_index.json"

    def missing(self, folder: Path) -> list[str]:
        """List files that are absent, each by the best of its names.

        Raises:
            WeightsError: if weights are there that are none, such as pointers of git-lfs.
        """
        if not (folder / self.index).is_file():
            return [self.index]
        rows = [DIFFUSERS_WEIGHTS] if self.index == "config.json" else layout_of(folder).files
        found = [[folder / name for name in names if (folder / name).is_file()] for names in rows]
        for best in (paths[0] for paths in found if paths and is_weights_file(paths[0])):
            check_content(best)
        return [names[0] for names, paths in zip(rows, found) if not paths]


def check_folder(source: str, offline: bool, model: PublishedModel) -> Path | None:
    """See that a folder is whole, or that a hub id is in the cache or may be fetched; nothing is read or fetched.

    Returns:
        The folder, which lacks nothing; None: it has to be fetched.

    Raises:
        WeightsError: if not; it names what is missing and where it belongs.
    """
    if Path(source).is_dir():
        return _require_whole(Path(source), model)
    if "/" not in source or not HUB_ID.fullmatch(source):
        another = f"another {model.file}, a folder" if model.file else "another folder"
        remedy = f"Put the weights there, or name {another} with {model.index}, or a hub id such as {model.example}"
        raise WeightsError(f"{model.key}={source!r}: there is no such file or folder. {remedy}")
    index = _cached_file(source, model.index)
    if index is not None and not model.missing(index.parent):
        return index.parent
    if offline or not hub_answers():
        raise _absent(source, "nothing is fetched offline" if offline else "the hub does not answer", model)
    return None


def check_tokenizer(source: str, file: str, model: str, offline: bool) -> None:
    """See that a tokenizer is a folder with words, or is in the cache under its hub id, or may be fetched.

    Args:
        source: folder or hub id.
        file: that holds the words of the tokenizer which is wanted, for the message.
        model: that this file comes from, for the message.
        offline: nothing may be fetched.

    Raises:
        WeightsError: if not.
    """
    may_be_fetched = HUB_ID.fullmatch(source) and not Path(source).exists() and not offline
    if not may_be_fetched and not has_vocabulary(source):
        nor_cached = ", nor is it in the hub's cache, and nothing is fetched offline" if offline else ""
        remedy = f"put the {file} of {model} into a folder and name that"
        raise WeightsError(f"tokenizer={source!r} is no folder with a {file}{nor_cached}: {remedy}")


def layout_of(folder: Path) -> PipelineLayout:
    """Tell how the pipeline in this folder is laid out; a kind that we cannot drive is refused by name."""
    index = read_json(folder / "model_index.json", "fetch it again", WeightsError)
    pipeline = str(index.get("_class_name"))
    if pipeline not in LAYOUTS:
        raise WeightsError(f"{folder} holds a {pipeline}; use a model of one of these kinds: {', '.join(LAYOUTS)}")
    for part, kind in LAYOUTS[pipeline].classes.items():
        found = index[part][-1] if isinstance(index.get(part), list) and index[part] else None
        if found != kind:
            raise WeightsError(f"{folder / part} holds a {found}, where {pipeline} is read with a {kind}")
    return LAYOUTS[pipeline]


def has_vocabulary(source: str) -> bool:
    """Say whether a tokenizer's words lie in this folder, or in the cache under this hub id."""
    if Path(source).is_dir():
        return any((Path(source) / name).is_file() for name in VOCABULARIES)
    return any(_cached_file(source, name) for name in VOCABULARIES)


# ---------------------------------------------------------------------- what is there


def _require_whole(folder: Path, model: PublishedModel) -> Path:
    if absent := model.missing(folder):
        checkpoints = list(folder.glob(f"*{Path(model.file).suffix}")) if model.file else []
        hint = f"; or name the file itself, {model.key}={checkpoints[0]}" if checkpoints else ""
        lacking = f"is not a whole {model.kind} of diffusers, it lacks {first_names(absent)}"
        raise WeightsError(f"{folder} {lacking}: copy the files from the published model{hint}")
    return folder


def _cached_file(hub_id: str, filename: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(hub_id, filename) if HUB_ID.fullmatch(hub_id) else None
    return Path(path) if isinstance(path, str) else None


def _absent(hub_id: str, why: str, model: PublishedModel) -> WeightsError:
    from huggingface_hub import constants

    index = _cached_file(hub_id, model.index)
    absent = model.missing(index.parent) if index else [model.index]
    lacking = f"the cache {constants.HF_HUB_CACHE} lacks {first_names(absent)} of this model, and {why}"
    copied = f"copy the folder models--{hub_id.replace('/', '--')} into the cache from a machine that has it"
    placed = "put the model's files into a folder of yours and name that folder"
    return WeightsError(f"{model.key}={hub_id!r}: {lacking}. Run once with a network, or {copied}, or {placed}")


def fetch_folder(hub_id: str, model: PublishedModel) -> Path:
    """Fill the folder in the cache, which is not whole, and return it.

    Raises:
        WeightsError: if the model cannot be fetched, or is incomplete or of a kind that we do not know.
    """
    from diffusers import DiffusionPipeline
    from huggingface_hub.errors import HfHubHTTPError

    try:
        # diffusers knows which of a repository's many files one needs. What these two would add, we never call.
        folder = DiffusionPipeline.download(hub_id, safety_checker=None, feature_extractor=None)
    except (OSError, ValueError, HfHubHTTPError) as error:
        why = f"they could not be fetched ({first_line(error.__cause__ or error)})"
        raise _absent(hub_id, why, model) from error
    return _require_whole(Path(folder), model)
