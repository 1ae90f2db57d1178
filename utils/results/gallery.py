"""The pictures of the report: real beside generated images of every class."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from utils.data.images import decode_image

LOSSLESS_UP_TO = 64  # px; as in the bank, larger images are stored as jpg


class GalleryRow(NamedTuple):
    """Pictures of one class: uint8 (C, H, W) tensors or image files, the real ones and the generated ones."""

    class_index: int
    class_name: str
    task: int
    real: Sequence[Tensor | str | Path]
    synthetic: Sequence[Tensor | str | Path]


def thumbnail(image: Tensor | str | Path, longest: int) -> str:
    """Return one picture as a data URI: a small one exactly, as png; a large one reduced, as jpg.

    Args:
        image: uint8 (C, H, W), C = 1 or 3, or an image file.
        longest: side of a reduced picture in pixels; twice what is shown serves dense screens.

    Raises:
        DataError: if the file cannot be read.
    """
    picture = to_pil_image(image if isinstance(image, Tensor) else decode_image(image))
    kind = "PNG" if max(picture.size) <= LOSSLESS_UP_TO else "JPEG"
    if kind == "JPEG":
        picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, kind, quality=90)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
