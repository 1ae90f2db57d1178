"""D4M's own files: a prompt per class in a text file, prototypes in JSON."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from utils.run.errors import ConfigError
from utils.run.files import atomic_write, read_json


def read_prompts(path: str, class_names: list[str]) -> dict[str, str]:
    """Read one prompt per line, up to the first tab; the number of the line is that of the class.

    Args:
        path: of the file; lines end as on any system.
        class_names: in the data set's own order.

    Returns:
        Class name -> prompt.

    Raises:
        ConfigError: if the file is absent, has too few, too many, empty or equal lines, or if a line holds the name of
            another class. A file in another order, such as D4M's of CIFAR-100, would attach nearly every prompt to the
            wrong images.
    """
    key = f"synth.label_file_path={path!r}"
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{key}: {error}; give a text file with one prompt per line") from error
    prompts = [line.split("\t")[0].strip() for line in lines]
    if len(prompts) != len(class_names):
        raise ConfigError(f"{key} has {len(prompts)} lines, but there are {len(class_names)} classes: one for each")
    if not all(prompts):
        empty = prompts.index("")
        raise ConfigError(f"{key}: line {empty + 1} is empty; write the prompt of {class_names[empty]!r}")
    if repeated := [prompt for prompt, count in Counter(prompts).items() if count > 1]:
        places = [place for place, prompt in enumerate(prompts, 1) if prompt == repeated[0]]
        raise ConfigError(f"{key}: lines {places} are all {repeated[0]!r}; two classes need two prompts")
    plain = [_letters(name) for name in class_names]
    swapped = [line for line, prompt in enumerate(prompts) if _letters(prompt) in {*plain} - {plain[line]}]
    if swapped:
        shown = "; ".join(f"line {line + 1} {prompts[line]!r} | class {class_names[line]!r}" for line in swapped[:5])
        remedy = "bring the lines into the data set's order, or leave the key out: the classes' names are the prompts"
        raise ConfigError(f"{key}: {len(swapped)} lines name another class: {shown}. Please {remedy}")
    return dict(zip(class_names, prompts))


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def write_prototypes(path: Path, prototypes: dict[str, Tensor]) -> None:
    """Write prototypes as D4M does, JSON of prompt -> nested lists (K, c, h, w), for whoever draws with its code."""
    atomic_write(path, json.dumps({prompt: centres.tolist() for prompt, centres in prototypes.items()}))


def read_prototypes(path: str, prompts: list[str], shape: tuple[int, int, int]) -> list[Tensor]:
    """Read D4M's JSON.

    Args:
        path: of the file.
        prompts: of the classes wanted.
        shape: (c, h, w) of a latent of the model that is to draw.

    Returns:
        float32 (K, c, h, w) for every prompt.

    Raises:
        ConfigError: if a prompt is missing, or the prototypes are of another autoencoder or not scaled.
    """
    key = f"synth.prototypes={path!r}"
    content = read_json(path, "name a file that D4M's gen_prototype.py or this source wrote", ConfigError)
    if missing := [prompt for prompt in prompts if prompt not in content]:
        there = ", ".join(map(repr, list(content)[:3]))
        remedy = "give the label file that it was made with"
        raise ConfigError(f"{key}: no prototypes of {missing[0]!r} ({len(missing)} missing), but of {there}: {remedy}")
    found = []
    for prompt in prompts:
        try:
            centres = torch.tensor(content[prompt], dtype=torch.float32)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{key}: {prompt!r} holds no numbers (K, c, h, w): {error}") from error
        if centres.shape[1:] != shape:
            why = f"shape {tuple(centres.shape[1:])}, latents of this model {shape}"
            raise ConfigError(f"{key}: prototypes of {prompt!r} have the {why}: of another autoencoder or image size")
        if not centres.std() <= 3:  # scaled latents spread by about 1, and their means by less
            remedy = "multiply them by the autoencoder's scaling factor (0.18215 of Stable Diffusion)"
            why = f"spread by {centres.std():.1f}, scaled latents by about 1"
            raise ConfigError(f"{key}: prototypes of {prompt!r} {why}: {remedy}")
        found.append(centres)
    return found
