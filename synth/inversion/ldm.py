"""Class inversion with a published text-to-image model."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from models.files.compvis_yaml import flatten, load_yaml
from models.latent.contract import LatentDiffusion
from models.latent.text_to_image import Placement, check_text_to_image, load_text_to_image
from synth import SOURCES
from synth.base import weights_place
from synth.inversion.source import ClassInversion
from utils.run.command import promised_offline
from utils.run.config import Place, Side
from utils.run.log import log


@SOURCES.register("ldm")
class LDM(ClassInversion):
    """LDM text2img-large, or Stable Diffusion 1.x or 2.x, frozen, and one inverted vector per class (DDDR).

    Liang et al., ECCV 2024, arXiv:2409.01128. The first model is DDDR's; to draw with Stable Diffusion, its hub id
    or folder is the value of ldm_ckpt, and a guidance of 7.5 is customary.
    """

    class Config(ClassInversion.Config):
        ldm_ckpt: Place = Field("CompVis/ldm-text2im-large-256", description="hub id, diffusers folder or CompVis file")
        yaml: Place | None = Field(None, description="CompVis YAML of a checkpoint file; other models need none")
        tokenizer: Place = Field("bert-base-uncased", description="folder or hub id, for a checkpoint file")
        image_size: Side | None = Field(None, ge=8, description="side of its images in pixels; null: the model's own")
        model_precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="of the weights; auto: the run's")

    def __init__(self, config, run, num_classes, class_names, dataset):
        super().__init__(config, run, num_classes, class_names, dataset)
        for said in [] if config.yaml is None else unread(config.yaml, config):
            log.warning("%s says %s, which is not read here", config.yaml, said)

    @classmethod
    def check_weights(cls, config, offline: bool) -> None:
        check_text_to_image(config.ldm_ckpt, config.yaml, config.tokenizer, offline, "ldm_ckpt")

    def build_model(self) -> LatentDiffusion:
        config = self.config
        return load_text_to_image(
            config.ldm_ckpt, config.yaml, config.tokenizer, image_size=config.image_size, key="ldm_ckpt",
            placement=Placement.of(self.run.runtime, config.model_precision), offline=promised_offline())  # fmt: skip

    def describe(self) -> str:
        """Say whose model it is, whether it is here, and how long the search and the sampling are."""
        return f"{self.config.ldm_ckpt}, {weights_place(self)}; {super().describe()}"


def unread(path: str, config: LDM.Config) -> list[str]:
    """Return what DDDR reads from its YAML beside the model, where it differs from the keys that count here."""
    yaml, inversion = flatten(load_yaml(path)), "model.params.personalization_config.params."
    if not any(key.startswith(inversion) for key in yaml):
        return []
    rate, batch_size = yaml.get("model.base_learning_rate"), yaml.get("data.params.batch_size", 1)
    words, vectors = yaml.get(f"{inversion}initializer_words"), yaml.get(f"{inversion}num_vectors_per_token", 1)
    numbers, said = [value for value in (rate, batch_size) if isinstance(value, (int, float))], []
    if rate is not None and (len(numbers) < 2 or abs(math.prod(numbers) - config.inversion_lr) > 1e-9):
        said.append(f"a learning rate of {rate} * {batch_size}: synth.inversion_lr={config.inversion_lr}")
    if words is not None and config.initializer not in (words if isinstance(words, list) else [words]):
        said.append(f"initializer_words {words}: synth.initializer={config.initializer!r}")
    if vectors != 1:
        said.append(f"num_vectors_per_token {vectors}: a class is one vector")
    return said
