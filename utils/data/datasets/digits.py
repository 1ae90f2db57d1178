"""Handwritten digits that come with scikit-learn: 1,797 real images of 8x8 pixels, nothing to download."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from utils.data.datasets import DATASETS
from utils.data.datasets.base import DatasetRecipe, LoadedData, Provider
from utils.data.subsets import split_validation

TEST_SHARE = 0.25


def read_digits(folder: Path, offline: bool) -> LoadedData:
    """Read UCI's optical recognition of handwritten digits (Alpaydin and Kaynak, 1998) from ``sklearn.datasets``."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * 255 / 16).astype(np.uint8)  # 0..16 -> 0..255
    images, labels = torch.from_numpy(pixels).unsqueeze(1), torch.from_numpy(digits.target).long()
    # The key is no run's seed: all runs share one test set.
    splits = [(images[part], labels[part]) for part in split_validation(labels, TEST_SHARE, "digits")]
    return LoadedData(splits, [str(digit) for digit in range(10)], 1)


DIGITS = Provider(read_digits, "scikit-learn's handwritten digits, which come with the package")
# Mean and deviation of all pixels / 255. A mirrored digit is another sign, and a crop of 8 pixels loses strokes.
DATASETS.register("digits")(DatasetRecipe("none", (0.305,) * 3, (0.376,) * 3, provider=DIGITS))
