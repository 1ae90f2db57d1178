"""What a text-to-image model is told about a class: training templates with a placeholder, and words of its name."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import suppress
from functools import cache

from models.latent.contract import PLACEHOLDER
from utils.run.errors import ConfigError
from utils.run.files import read_json

EMBEDDINGS = "class_embeddings.safetensors"  # of one float32 vector per class, where its words were searched for
_PICTURES = ("a photo", "an illustration", "a depiction")
_DETERMINERS = ("a", "a clean", "a dirty", "my", "the cool", "the", "one", "the clean", "a nice", "the nice",
                "the small", "the weird", "the large", "a cool", "a small")  # fmt: skip
_VIEWS = ("a rendering of a", "a cropped photo of the", "the photo of a", "a dark photo of the",
          "a close-up photo of a", "a bright photo of the", "a cropped photo of a", "a good photo of the",
          "a close-up photo of the", "a rendition of the", "a rendition of a", "a good photo of a")  # fmt: skip

# The list of Liang et al. (ECCV 2024, arXiv:2409.01128), from which a template is drawn uniformly: 45 pairs once and
# 12 views three times each.
_PAIRS = [f"{picture} of {determiner} {PLACEHOLDER}" for picture in _PICTURES for determiner in _DETERMINERS]
TRAIN_TEMPLATES = (*_PAIRS, *[f"{view} {PLACEHOLDER}" for view in _VIEWS] * 3)


def class_words(class_names: list[str], table: str | None, verbatim: bool = False) -> list[str]:
    """Find words for every class: of the table where it has the name, else those that the name stands for.

    Where ImageNet has two classes of one word, such as the crane that is a bird, WordNet's definition follows it.

    Args:
        class_names: as the data set's folders are called.
        table: path of a JSON object, folder name -> words; None: there is none.
        verbatim: take other names as they are, without blanks for underscores and words for ImageNet's WordNet ids.

    Raises:
        ConfigError: if the table is absent, is not such an object, or has none of the names.
    """
    words = {} if table is None else _read_table(table, class_names)
    found = [words.get(name, name if verbatim else _say(name)) for name in class_names]
    twice = {word for word, count in Counter(found).items() if count > 1}
    return [_say(name, True) if word in twice and name not in words else word for name, word in zip(class_names, found)]


def _say(name: str, defined: bool = False) -> str:
    if not re.fullmatch(r"n\d{8}", name):
        return name.replace("_", " ")
    with suppress(KeyError):
        return _wordnet().label_name_to_description(name, detailed=defined).replace(": ", ", ", 1)
    return name


@cache
def _wordnet():
    from timm.data import ImageNetInfo

    return ImageNetInfo("imagenet-1k")  # its table has all of ImageNet's ids, not those of the 1,000 classes alone


def _read_table(path: str, class_names: list[str]) -> dict[str, str]:
    remedy = "synth.class_prompts must be one JSON object, folder name -> words"
    words = read_json(path, remedy, ConfigError)
    if not all(isinstance(text, str) for text in words.values()):
        raise ConfigError(f"{path} is damaged (not all words are text): {remedy}")
    if not words.keys() & set(class_names):
        raise ConfigError(f"{path} has none of the classes' names, such as {', '.join(class_names[:3])}: {remedy}")
    return words
