"""ESCORT with Stable Diffusion and ControlNet: what is kept of an exemplar are its edges and the name of its class."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from models.frozen import weight_bytes
from models.latent.control import (
    BASE,
    CLIP_TOKENIZER,
    ControlNetPipeline,
    check_controlnet,
    load_controlnet,
)  # fmt: skip
from models.latent.text_to_image import Placement
from synth import SOURCES
from synth.base import weights_place
from synth.escort.edges import EdgeMap, drawing_size, resize_edges, short_side
from synth.escort.source import ExemplarCompression
from synth.prompts import class_words
from synth.requests import Requests
from utils.data.images import ImageSet
from utils.data.manager import Task
from utils.data.transforms import to_uint8
from utils.run.carried import Carried
from utils.run.command import promised_offline
from utils.run.config import BatchSize, Factor, Place, Side

CLASS = "{class}"  # stands in a prompt for the words of the class
# The two published scripts, `compress.py` and `compress_lowres.py`: prompt, what it is guided away from, DDIM steps.
SCRIPTS = {
    "high": (f"{CLASS}, best quality, extremely detailed",
             "longbody, lowres, bad anatomy, bad hands, missing fingers, extra digit, fewer digits, cropped, "
             "worst quality, low quality", 20),
    "low": (f"{CLASS}, clean, clear, bright, neat", "blurry, dark, messy, dotted", 50)}  # fmt: skip


@SOURCES.register("controlnet")
class ControlNetSource(ExemplarCompression):
    """ESCORT's own: Stable Diffusion 1.5 and ControlNet-Canny, frozen, drawing along edges and the name of the class.

    Duan et al., BMVC 2025, arXiv:2311.18266; Zhang et al., ICCV 2023, arXiv:2302.05543. At high resolution edges are
    found in the image as it is, and the map is brought to the size of the drawing; at low resolution the image is
    enlarged first, and the map has, and costs, that size.
    """

    class Config(ExemplarCompression.Config):
        places: ClassVar[set[str]] = {"base", "controlnet", "tokenizer", "class_prompts"}

        sample_batch: BatchSize = Field(4, description="images drawn at once, of one size each")
        base: Place = Field(BASE.example, description="hub id, folder, or control_sd15_canny.pth, with its ControlNet")
        controlnet: Place | None = Field(None, description="hub id or folder; null: lllyasviel/sd-controlnet-canny")
        tokenizer: Place = Field(CLIP_TOKENIZER, description="folder or hub id of the tokenizer that a file needs")
        model_precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="of the weights; auto: the run's")
        resolution: Literal["high", "low"] = Field("high", description="which of the two published scripts is followed")
        short_side: Side | None = Field(None, ge=8, description="of what is drawn, in pixels; null: the script's")
        grid: Side = Field(64, ge=8, multiple_of=8, description="sides of what is drawn are multiples of it")
        prompt: str | None = Field(None, description=f"what is drawn, {CLASS} is the class; null: the script's")
        negative_prompt: str | None = Field(None, description="what is avoided; null: the script's")
        class_prompts: Place | None = Field(None, description="JSON file, folder name -> words of the class")
        verbatim_names: bool = Field(False, description="true: names of folders as they are, as ESCORT has it")
        sample_steps: int | None = Field(None, ge=1, lt=1000, description="DDIM steps; null: the script's, 20 or 50")
        guidance: Factor = Field(9.0, ge=1, description="classifier-free, away from the negative prompt; 1 is none")
        control_strength: Factor = Field(1.0, description="factor of what the ControlNet adds")

        @model_validator(mode="after")
        def _a_class_in_a_cell(self) -> ControlNetSource.Config:
            if self.prompt is not None and self.prompt.count(CLASS) != 1:
                raise ValueError(f"synth.prompt={self.prompt!r}: a prompt names the class exactly once, as {CLASS}")
            if self.short_side is not None and self.short_side < self.grid:
                raise ValueError(f"synth.short_side={self.short_side} is below synth.grid={self.grid}: lower the grid")
            return self

    def __init__(self, config, run, num_classes, class_names, dataset):
        super().__init__(config, run, num_classes, class_names, dataset)
        words = class_words(class_names, config.class_prompts, config.verbatim_names)
        prompt, negative, steps = SCRIPTS[config.resolution]
        self.prompts = [(config.prompt or prompt).replace(CLASS, word) for word in words]
        self.negative = negative if config.negative_prompt is None else config.negative_prompt
        self.steps = config.sample_steps or steps

    @classmethod
    def check_weights(cls, config, offline: bool) -> None:
        check_controlnet(config.base, config.controlnet, offline, config.tokenizer)

    @cached_property
    def model(self) -> ControlNetPipeline:
        """The frozen networks, read when they are first asked for."""
        config, placement = self.config, Placement.of(self.run.runtime, self.config.model_precision)
        files = {"tokenizer": config.tokenizer, "offline": promised_offline()}
        return load_controlnet(config.base, config.controlnet, placement=placement, **files)

    @cached_property
    def texts(self) -> Tensor:
        """All prompts, (num_classes + 1, 77, W), the negative one last; embedded alone, to depend on no neighbour."""
        return torch.cat([self.model.embed([text]) for text in [*self.prompts, self.negative]])

    @property
    def _draws(self) -> bool:
        return bool(self.config.syn_per_class or self.config.augmentation_prob)

    def fit_before(self, task: Task, images: ImageSet) -> None:
        """See that the networks fit each other now, not after a classifier has trained."""
        super().fit_before(task, images)
        if self._draws:
            _ = self.model

    # ------------------------------------------------------------------ maps and images

    def map_shape(self, height: int, width: int) -> tuple[int, int]:
        return (height, width) if self.config.resolution == "high" else self.drawing_size(height, width)

    def drawing_size(self, height: int, width: int) -> tuple[int, int]:
        side = self.config.short_side or short_side(height, width, self.config.resolution)
        return drawing_size(height, width, side, self.config.grid)

    def draw(self, requests: Requests, maps: list[EdgeMap], generators: list[torch.Generator]) -> list[Tensor]:
        sizes, drawn = [self.drawing_size(*one.size) for one in maps], {}
        for size in set(sizes):
            places = [place for place, other in enumerate(sizes) if other == size]
            edges = torch.stack([resize_edges(maps[place].edges(), *size) for place in places])
            own, prompts = [generators[place] for place in places], self.texts[requests.labels[places]]
            scales = self.config.guidance, self.config.control_strength
            images = self.model.draw(edges, prompts, self.texts[-1:], own, self.steps, *scales)
            drawn |= zip(places, to_uint8(images).cpu())
        return [drawn[place] for place in range(len(maps))]

    # ------------------------------------------------------------------ keeping

    def carried(self) -> list[Carried]:
        """Name the maps, and beside them the frozen networks, if they are needed."""
        nbytes = weight_bytes(self.model) if self._draws else 0
        return [*super().carried(), Carried("frozen", nbytes=nbytes, frozen=True)]

    def fingerprint(self) -> str:
        """Hash the frozen weights and the words for every class by SHA-256; maps name themselves in every copy."""
        return hashlib.sha256(json.dumps([self.model.fingerprint(), self.prompts, self.negative]).encode()).hexdigest()

    def describe(self) -> str:
        """Say whose networks draw, whether they are here, and in how many steps."""
        sampling = f"DDIM of {self.steps} steps, guidance {self.config.guidance:g}"
        return f"{self.config.base} with ControlNet, {weights_place(self)}; {super().describe()}; {sampling}"
