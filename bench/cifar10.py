"""Reads CIFAR-10 (Krizhevsky 2009) for training and evaluation, from torchvision's folder or from JPEG images in .npz files."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TRAINING = 45_000  # training images; the last 5,000 of the 50,000 are for validation

Split = Literal["train", "validation", "test"]


def load(root: Path, split: Split) -> tuple[Tensor, Tensor]:
    """Loads images [N, 3, 32, 32], uint8, and labels [N]: 45,000 for training, 5,000 for validation or 10,000 for testing.

    root: a folder with torchvision's cifar-10-batches-py, or with test.npz and train0.npz, train1.npz, .. Each .npz file holds `jpeg` (the
        concatenated JPEG files), `offsets` [N + 1] into it, and `labels` [N]. The validation split is the last 5,000 of the 50,000 images
        that CIFAR-10 has for training.

    Raises:
        FileNotFoundError: the folder has neither.
    """
    name = "test" if split == "test" else "train"
    parts = [root / "test.npz"] if split == "test" else sorted(root.glob("train*.npz"))
    if (root / "cifar-10-batches-py").is_dir():
        from torchvision.datasets import CIFAR10

        found = CIFAR10(str(root), train=name == "train", download=False)
        images, labels = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(found.targets)
    elif parts and all(part.is_file() for part in parts):
        arrays = [dict(np.load(part)) for part in parts]
        images = torch.stack([image for part in arrays for image in _decoded(part["jpeg"], part["offsets"])])
        labels = torch.cat([torch.from_numpy(part["labels"].astype(np.int64)) for part in arrays])
    else:
        raise FileNotFoundError(f"{root} holds neither cifar-10-batches-py nor {name}*.npz; give the folder that does as --root")
    if split == "test":
        return images, labels
    here = slice(TRAINING, None) if split == "validation" else slice(TRAINING)
    return images[here], labels[here]


def _decoded(jpeg: np.ndarray, offsets: np.ndarray) -> Iterator[Tensor]:
    def image(ends: tuple[int, int]) -> Tensor:
        found = Image.open(io.BytesIO(jpeg[slice(*ends)].tobytes())).convert("RGB")
        return torch.from_numpy(np.array(found)).permute(2, 0, 1)

    with ThreadPoolExecutor() as pool:
        yield from pool.map(image, itertools.pairwise(offsets.tolist()), chunksize=256)
