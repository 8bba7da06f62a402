"""Street scenes with labels of Cityscapes' 19 classes: Cityscapes itself, and ACDC's adverse conditions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dtta_fast.data.base import NO_LABEL, Maps
from dtta_fast.data.maps import checked_labels, read_map
from dtta_fast.runtime.pictures import read_image

# the classes that are evaluated, in the order of their training ids: https://github.com/mcordts/cityscapesScripts
CLASSES = {
    "road": 7,
    "sidewalk": 8,
    "building": 11,
    "wall": 12,
    "fence": 13,
    "pole": 17,
    "traffic light": 19,
    "traffic sign": 20,
    "vegetation": 21,
    "terrain": 22,
    "sky": 23,
    "person": 24,
    "rider": 25,
    "car": 26,
    "truck": 27,
    "bus": 28,
    "train": 31,
    "motorcycle": 32,
    "bicycle": 33,
}
CONDITIONS = ("fog", "night", "rain", "snow")


class Driving(Maps):
    """Images with maps of Cityscapes' classes.

    Args:
        folder: of all files. files: (image, map) pairs; a map whose name ends in labelIds has Cityscapes' own ids, and one that ends in
            labelTrainIds has the 19 training ids. groups: of each image. size: side of the square that images and maps become.
    """

    def __init__(self, folder: Path, files: Sequence[tuple[Path, Path]], groups: Sequence[str], size: int) -> None:
        self.size, self.classes, self._files, self.groups = size, tuple(CLASSES), files, groups
        self.names = [image.relative_to(folder).as_posix() for image, _ in files]
        self._training_id = torch.full((256,), NO_LABEL, dtype=torch.int64, device="cpu")
        self._training_id[list(CLASSES.values())] = torch.arange(len(CLASSES), dtype=torch.int64, device="cpu")

    def __len__(self) -> int:
        return len(self._files)

    def pair(self, index: int) -> tuple[Tensor, Tensor, str]:
        image, path = self._files[index]
        labels = read_map(path).long()
        if path.stem.endswith("labelIds"):
            labels = self._training_id[labels.clamp(0, 255)]
        return read_image(image), checked_labels(labels, len(CLASSES), str(path)), str(path)


def open_cityscapes(root: Path, split: str, size: int) -> Driving:
    """Opens Cityscapes: leftImg8bit/SPLIT/CITY/*_leftImg8bit.png and gtFine/SPLIT/CITY/*_gtFine_labelIds.png or _labelTrainIds.png.

    Raises:
        ValueError: the folder or the map of an image is missing.
    """
    images = _images(root / "leftImg8bit" / split, "*/*_leftImg8bit.png")
    return _paired(root, images, "leftImg8bit", "gtFine", "_leftImg8bit.png", "_gtFine_", ["cityscapes"] * len(images), size)


def open_acdc(root: Path, conditions: Sequence[str], severities: Sequence[int], split: str, size: int) -> Driving:
    """Opens ACDC (Sakaridis et al. 2021, arXiv 2104.13395), each condition a group: rgb_anon/CONDITION/SPLIT/SEQUENCE/*_rgb_anon.png and
    gt/CONDITION/SPLIT/SEQUENCE/*_gt_labelTrainIds.png.

    Args:
        conditions: of fog, night, rain and snow; all by default. severities: none, because the conditions have none.

    Raises:
        ValueError: a condition is unknown, or the folder or the map of an image is missing.
    """
    wrong = [name for name in conditions if name not in CONDITIONS]
    if wrong:
        raise ValueError(f"corruptions has {wrong[0]!r}; ACDC's conditions are {', '.join(CONDITIONS)}")
    if severities:
        raise ValueError(f"severities is {list(severities)}, and ACDC's conditions have no severities: leave it out")
    images: list[Path] = []
    groups: list[str] = []
    for condition in conditions or CONDITIONS:
        found = _images(root / "rgb_anon" / condition / split, "*/*_rgb_anon.png")
        images += found
        groups += [condition] * len(found)
    return _paired(root, images, "rgb_anon", "gt", "_rgb_anon.png", "_gt_", groups, size)


def _images(folder: Path, pattern: str) -> list[Path]:
    found = sorted(folder.glob(pattern)) if os.path.isdir(folder) else []
    if not found:
        raise ValueError(f"{folder} holds no {pattern}; give the folder that the archives were unpacked in")
    return found


def _paired(
    root: Path, images: Sequence[Path], of_images: str, of_maps: str, end: str, kind: str, groups: Sequence[str], size: int
) -> Driving:
    """Pairs each image with its map, in the same place below another folder; training ids are preferred."""
    files = []
    for image in images:
        place = root / of_maps / image.parent.relative_to(root / of_images)
        choices = [place / f"{image.name.removesuffix(end)}{kind}{ids}.png" for ids in ("labelTrainIds", "labelIds")]
        there = next((path for path in choices if os.path.isfile(path)), None)
        if there is None:
            raise ValueError(f"{choices[0]} is missing, and so is {choices[1].name}: every image needs its map")
        files.append((image, there))
    return Driving(root, files, groups, size)
