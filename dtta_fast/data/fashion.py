"""Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747) at 32x32, loaded by torchvision's reader."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor
from torchvision.datasets import FashionMNIST
from torchvision.datasets.utils import extract_archive

from dtta_fast.data.digits import Split
from dtta_fast.runtime.defaults import float32_on_cpu

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # where the package dataset-fashion-mnist installs it
SPLITS = {"train": (True, slice(0, 59_000)), "validation": (True, slice(59_000, 60_000)), "test": (False, slice(0, 10_000))}


def load_fashion(split: Split, folder: str | Path | None = None) -> tuple[Tensor, Tensor]:
    """Loads images [N, 3, 32, 32], float32 in [0, 1] (grey repeated in three channels, two pixels of border), and labels [N], int64.

    Args:
        split: "train" (59,000 images), "validation" (1,000 of torchvision's training images) or "test" (10,000).
        folder: torchvision's root, to which missing files are downloaded, or a folder with the four .gz files. None uses Debian's package
            dataset-fashion-mnist.

    Raises:
        ValueError: split is anything else. FileNotFoundError: Debian's package is not installed.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; choose one of {', '.join(SPLITS)}")
    folder = DEBIAN if folder is None else Path(folder)
    archives = sorted(folder.glob("*-ubyte.gz")) if os.path.isdir(folder) else []
    if folder == DEBIAN and not archives:
        raise FileNotFoundError(f"{folder} has no files: apt install dataset-fashion-mnist, or name a folder to download to")
    train, part = SPLITS[split]
    with tempfile.TemporaryDirectory() as root:
        raw = Path(root, "FashionMNIST", "raw")
        raw.mkdir(parents=True)
        for archive in archives:
            extract_archive(str(archive), str(raw))
        with float32_on_cpu():
            found = FashionMNIST(root if archives else folder, train=train, download=not archives)
        grey = F.pad(found.data[part].float() / 255, (2, 2, 2, 2))
        return grey[:, None].repeat(1, 3, 1, 1), found.targets[part].long()
