"""Class inversion of a small frozen model with random weights, on the toy data."""

from dataclasses import replace

import torch

from models.latent.small import SmallLDM, SmallLDMConfig
from synth.inversion.source import ClassInversion
from tests.support.sources import build
from tests.support.toy import toy_dataset
from utils.data.manager import DataManager, Split

TINY_MODEL = {
    "vae_channels": [8, 8], "block_out_channels": [8, 8], "attention_levels": [0], "num_heads": 2,
    "norm_num_groups": 2, "vector_size": 8, "num_tokens": 2, "prediction_type": "epsilon",
}  # fmt: skip
SHORT = {"samples_per_class": 12, "g_local_bs": 6, "sample_steps": 2, "guidance": 2.0}


def tiny_config(**changes) -> SmallLDMConfig:
    return SmallLDMConfig(**{**TINY_MODEL, **changes})


def tiny_model(seed: int = 0, **changes) -> SmallLDM:
    """Draws grey images of 8x8 pixels; its latents are (4, 4, 4)."""
    torch.manual_seed(seed)
    return SmallLDM((1, 8, 8), ["first", "second"], tiny_config(**changes)).freeze()


class TinyInversion(ClassInversion):
    """Reads words in so far as it notes the prompts that it is given."""

    def build_model(self):
        model = tiny_model()
        self.prompts: list[str] = []
        context = model.context
        model.context = lambda prompts, vectors=None: (
            self.prompts.extend(prompts) or context(prompts if vectors is not None else [""] * len(prompts), vectors)
        )
        return model


def make_inversion(folder, kind: type = TinyInversion, precision="fp32", class_names=None, **keys) -> ClassInversion:
    dataset = toy_dataset() if class_names is None else replace(toy_dataset(), class_names=class_names)
    return build(kind, {"name": "tiny", **SHORT, **keys}, folder, precision=precision, dataset=dataset)


def fitted(folder, kind: type = TinyInversion, tasks: int = 1, **keys) -> ClassInversion:
    """The same, which has learned the first tasks of the toy data."""
    source = make_inversion(folder, kind, **keys)
    for index in range(tasks):
        source.fit_before(*toy_task(index))
    return source


def toy_task(index: int = 0):
    """A task of the toy data and its images."""
    data = DataManager(toy_dataset(), Split(init_cls=2, increment=2, shuffle=False))
    task = data.task(index)
    data.advance(task)
    return task, data.train_images(task)
