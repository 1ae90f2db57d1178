"""What a text-to-image model is told about a class: training templates with a placeholder, and words of its name."""

from __future__ import annotations

import json
from pathlib import Path

from models.latent_diffusion import PLACEHOLDER
from utils.errors import ConfigError

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

# DDDR's list, from which a template is drawn uniformly: 45 pairs once and 12 views three times each.
TRAIN_TEMPLATES = tuple(
    [f"{picture} of {determiner} {PLACEHOLDER}" for picture in _PICTURES for determiner in _DETERMINERS]
    + [f"{view} {PLACEHOLDER}" for view in _VIEWS] * 3
)


def class_words(class_names: list[str], table: str | None, blanks: bool = True) -> list[str]:
    """Words for every class: of the table where it has the name, else the name itself.

    Args:
        class_names: as the data set's folders are called.
        table: path of a JSON object, folder name -> words; None: there is none.
        blanks: for underscores in names.

    Raises:
        ConfigError: if the table is absent or is not such an object.
    """
    words = {} if table is None else _read_table(Path(table))
    return [words.get(name, name.replace("_", " ") if blanks else name) for name in class_names]


def _read_table(path: Path) -> dict[str, str]:
    try:
        words = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"synth.class_prompts={str(path)!r}: cannot be read ({error})") from error
    if not isinstance(words, dict) or not all(isinstance(text, str) for text in words.values()):
        raise ConfigError(f"synth.class_prompts={str(path)!r}: must be one JSON object, folder name -> words")
    return words
