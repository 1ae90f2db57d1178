"""What a text-to-image model is told about a class: training templates with a placeholder, and words of its name."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

from models.latent.contract import PLACEHOLDER
from utils.run.errors import ConfigError

_PICTURES = ("a photo", "an illustration", "a depiction")
_DETERMINERS = (
    "a", "a clean", "a dirty", "my", "the cool", "the", "one", "the clean", "a nice", "the nice", "the small",
    "the weird", "the large", "a cool", "a small",
)  # fmt: skip
_VIEWS = (
    "a rendering of a", "a cropped photo of the", "the photo of a", "a dark photo of the", "a close-up photo of a",
    "a bright photo of the", "a cropped photo of a", "a good photo of the", "a close-up photo of the",
    "a rendition of the", "a rendition of a", "a good photo of a",
)  # fmt: skip

# The list of Liang et al. (ECCV 2024, arXiv:2409.01128), from which a template is drawn uniformly: 45 pairs once and
# 12 views three times each.
TRAIN_TEMPLATES = tuple(
    [f"{picture} of {determiner} {PLACEHOLDER}" for picture in _PICTURES for determiner in _DETERMINERS]
    + [f"{view} {PLACEHOLDER}" for view in _VIEWS] * 3
)


def class_words(class_names: list[str], table: str | None, verbatim: bool = False) -> list[str]:
    """Words for every class: of the table where it has the name, else those that the name stands for.

    Args:
        class_names: as the data set's folders are called.
        table: path of a JSON object, folder name -> words; None: there is none.
        verbatim: take other names as they are, without blanks for underscores and words for ImageNet's WordNet ids.

    Raises:
        ConfigError: if the table is absent, is not such an object, or has none of the names.
    """
    words = {} if table is None else _read_table(Path(table), class_names)
    return [words.get(name, name if verbatim else _say(name)) for name in class_names]


def _say(name: str) -> str:
    if not re.fullmatch(r"n\d{8}", name):
        return name.replace("_", " ")
    try:
        return _wordnet().label_name_to_description(name)
    except KeyError:
        return name


@cache
def _wordnet():
    from timm.data import ImageNetInfo

    return ImageNetInfo("imagenet-1k")  # its table has all of ImageNet's ids, not those of the 1,000 classes alone


def _read_table(path: Path, class_names: list[str]) -> dict[str, str]:
    try:
        words = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"synth.class_prompts={str(path)!r}: cannot be read ({error})") from error
    if not isinstance(words, dict) or not all(isinstance(text, str) for text in words.values()):
        raise ConfigError(f"synth.class_prompts={str(path)!r}: must be one JSON object, folder name -> words")
    if not words.keys() & set(class_names):
        names = ", ".join(class_names[:3])
        raise ConfigError(f"synth.class_prompts={str(path)!r}: has none of the classes' names, such as {names}")
    return words
