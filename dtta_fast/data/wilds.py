"""Image data sets of WILDS (Koh et al. 2021, arXiv 2012.07421), read by its own package."""

from __future__ import annotations

import io
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from dtta_fast.data.base import Images

SPLITS = ("test", "val", "id_test", "id_val", "train")


class Wilds(Images):
    """A split of a WILDS data set. Its classes have numbers instead of names, which the package does not know.

    Args:
        subset: as returned by get_subset() of the package's data set. name: of the data set. split: of the subset.
    """

    def __init__(self, subset: Any, name: str, split: str) -> None:
        self._subset = subset
        self.names = [f"{split}#{int(i)}" for i in subset.indices]
        self.groups = [name] * len(self.names)
        self.labels = [int(label) for label in subset.y_array]
        self.classes = tuple(f"class {k}" for k in range(int(subset.n_classes)))

    def read(self, index: int) -> Tensor:
        try:
            image = self._subset.dataset.get_input(int(self._subset.indices[index]))
        except (OSError, ValueError, SyntaxError) as error:
            raise ValueError(f"{self.names[index]} cannot be read: {error}") from error
        return pil_to_tensor(image.convert("RGB"))


@contextmanager
def _without(name: str) -> Iterator[None]:
    """Makes a module seem not to be installed."""
    there = sys.modules.get(name)
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
        if there is not None:
            sys.modules[name] = there


def open_wilds(root: Path, split: str) -> Wilds:
    """Opens a data set of WILDS, such as waterbirds_v1.0, camelyon17_v1.0 or iwildcam_v2.0. Nothing is downloaded.

    Args:
        root: the data set's folder, as the package unpacks it. split: "test", "val", "id_test", "id_val" or "train", if the set has it.

    Raises:
        ValueError: the folder is none of WILDS, or is incomplete; or the set has no such split, or holds no images with one label each.
        ImportError: the package wilds is missing (extra `data`).
    """
    found = re.fullmatch(r"([a-z0-9]+)_v([0-9.]+)", root.name)
    if found is None or not root.is_dir():
        raise ValueError(f"root is {str(root)!r}; give the folder of a data set of WILDS, such as data/waterbirds_v1.0")
    try:
        with _without("outdated"):  # by which the package would look for a newer version of itself on the network
            from wilds import get_dataset
    except ModuleNotFoundError as error:
        raise ImportError("wilds needs its own package: pip install 'dtta-fast[data]'") from error
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it makes a tensor of a read-only array
            data = get_dataset(dataset=found[1], version=found[2], root_dir=str(root.parent), download=False)
            subset = data.get_subset(split)
    except Exception as error:  # its readers raise many types for missing and damaged files
        raise ValueError(f"{root} cannot be read by wilds: {type(error).__name__}: {error}") from error
    labels = subset.y_array
    if not len(subset):
        raise ValueError(f"{root} has no image in split {split!r}; it has {', '.join(data.split_dict)}")
    if labels.ndim != 1 or labels.is_floating_point() or not isinstance(data.get_input(int(subset.indices[0])), Image.Image):
        raise ValueError(f"{root} holds no images with one class each: adaptation needs them")
    return Wilds(subset, found[1], split)
