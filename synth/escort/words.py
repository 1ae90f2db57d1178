"""ESCORT's keys: flat in its files, inside `synth` here."""

from __future__ import annotations

from typing import Any

from utils.run.words import WORDS, Words

KEYS = ("augmentation_prob", "augmentations_per_image", "real_per_class", "syn_per_class")


def plain_learner(raw: dict[str, Any]) -> dict[str, Any]:
    """Read a file whose method is off: ``real_per_class``, not ``memory_per_class``, is how many images it keeps."""
    result, kept = {key: value for key, value in raw.items() if key not in KEYS}, raw.get("real_per_class")
    return result if kept is None else {**result, "memory_per_class": kept}


SWITCHES = ("augmentation_prob", "syn_per_class")
WORDS.append(Words("controlnet", dict(zip(KEYS, KEYS)), ("small_controlnet",), SWITCHES, off=plain_learner))
