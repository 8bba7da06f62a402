"""scikit-learn's handwritten digits (Alpaydin & Kaynak 1998), rendered at 32x32 with fixed splits."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")  # class names
Split = Literal["train", "validation", "test"]
# 1,797 images in total, in one seeded permutation. Never change it: the zoo's weights depend on it.
SPLITS: dict[str, slice] = {"test": slice(0, 500), "validation": slice(500, 800), "train": slice(800, 1797)}


def load_digits(split: Split) -> tuple[Tensor, Tensor]:
    """Loads images [N, 3, 32, 32], float32 in [0, 1] (grey repeated in three channels), and labels [N], int64.

    Args:
        split: "train" (997 images), "validation" (300) or "test" (500).

    Raises:
        ValueError: split is anything else. ImportError: scikit-learn is missing (extra `demo`).
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; choose one of {', '.join(SPLITS)}")
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError("the digits need scikit-learn: pip install 'dtta-fast[demo]'") from error
    digits = datasets.load_digits()
    rows = np.random.default_rng(0).permutation(len(digits.images))[SPLITS[split]]
    images = np.stack([_render(digits.images[row]) for row in rows])
    grey = torch.from_numpy(images).float().div_(255)
    return grey[:, None].repeat(1, 3, 1, 1), torch.from_numpy(digits.target[rows]).long()


def _render(digit: np.ndarray) -> np.ndarray:
    """Renders an 8x8 digit with values 0..16 as a 32x32 uint8 image."""
    small = Image.fromarray(np.round(digit * (255 / 16)).astype(np.uint8))
    return np.asarray(small.resize((32, 32), Image.Resampling.BICUBIC))
