"""Images with ground-truth maps: ADE20K, NYUv2, and any folder of pairs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import functional as T

from dtta_fast.data.folder import SUFFIXES, read_image

NO_LABEL = 255
ADE20K_CLASSES = 150


class Maps(Dataset[tuple[Tensor, Tensor]], ABC):
    """Items are (image [3, size, size] in [0, 1], map [size, size]): int64 labels, 255 where there is none, or depth in metres.

    Short sides are resized to `size` (images bicubic, maps by the nearest pixel) and the centre is cropped. An item whose map does not
    fit raises ValueError, which names the file and what is wrong.
    """

    size: int

    @abstractmethod
    def pair(self, index: int) -> tuple[Tensor, Tensor, str]:
        """Image [3, H, W], map [H, W] and the name of where they come from."""

    @abstractmethod
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, truth, name = self.pair(index)
        if image.shape[1:] != truth.shape:
            raise ValueError(f"{name}: the image is {tuple(image.shape[1:])} and its map {tuple(truth.shape)}; both have one size")
        image = T.center_crop(T.resize(image, [self.size], T.InterpolationMode.BICUBIC, antialias=True), [self.size, self.size])
        near = T.center_crop(T.resize(truth[None], [self.size], T.InterpolationMode.NEAREST), [self.size, self.size])
        return image.clamp(0, 1), near[0]


def checked_labels(labels: Tensor, classes: int, name: str) -> Tensor:
    """Labels as int64.

    Raises:
        ValueError: labels beside 0 .. classes - 1 and 255.
    """
    labels = labels.long()
    wrong = labels[(labels != NO_LABEL) & ((labels < 0) | (labels >= classes))].unique().tolist()
    if wrong:
        raise ValueError(f"{name} has labels {wrong[:5]}; there are 0 .. {classes - 1}, and {NO_LABEL} for none")
    return labels


def checked_depth(depth: Tensor, name: str) -> Tensor:
    """Depth in metres as float32.

    Raises:
        ValueError: NaN, infinity, or nothing above 0.
    """
    depth = depth.float()
    if not bool(depth.isfinite().all()):
        raise ValueError(f"{name} has depth that is NaN or infinite; fill it or leave the image out")
    if not bool((depth > 0).any()):
        raise ValueError(f"{name} has no depth above 0")
    return depth


class Ade20k(Maps):
    """The 150 classes of ADEChallengeData2016: images/SPLIT/*.jpg beside annotations/SPLIT/*.png, whose 0 is no label.

    Raises:
        ValueError: a folder, or the annotation of an image, is missing.
    """

    def __init__(self, folder: str | Path, split: Literal["training", "validation"], size: int) -> None:
        images, annotations = (Path(folder) / kind / split for kind in ("images", "annotations"))
        self.size, self._files = size, _pairs(images, annotations)

    def __len__(self) -> int:
        return len(self._files)

    def pair(self, index: int) -> tuple[Tensor, Tensor, str]:
        image, annotation = self._files[index]
        labels = _read_map(annotation).long() - 1
        labels[labels < 0] = NO_LABEL
        return read_image(image), checked_labels(labels, ADE20K_CLASSES, str(annotation)), str(annotation)


class NyuV2(Maps):
    """nyu_depth_v2_labeled.mat, 1,449 images with their filled depth; splits.mat beside it holds the official train and test numbers.

    Raises:
        ValueError: a file is missing, or holds something else. ImportError: h5py or scipy is missing (extra `data`).
    """

    def __init__(self, file: str | Path, split: Literal["train", "test"], size: int) -> None:
        try:
            import h5py
            from scipy.io import loadmat
        except ImportError as error:
            raise ImportError("NYUv2 needs h5py and scipy: pip install 'dtta-fast[data]'") from error
        file = Path(file)
        splits = file.parent / "splits.mat"
        for path in (file, splits):
            if not path.is_file():
                raise ValueError(f"{path} is missing; NYUv2 is nyu_depth_v2_labeled.mat with splits.mat beside it")
        self.size, self._file = size, file
        try:
            self._data: Any = h5py.File(file, "r")
            self._images, self._depths = self._data["images"], self._data["depths"]
            self._rows = loadmat(splits)[f"{split}Ndxs"].ravel().astype(int) - 1  # MATLAB counts from 1
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(f"{file} with {splits.name} is no NYUv2: {error}") from error
        if len(self._rows) == 0 or self._rows.min() < 0 or self._rows.max() >= len(self._images):
            raise ValueError(f"{splits} names images that {file} does not have: it has 1 .. {len(self._images)}")

    def __len__(self) -> int:
        return len(self._rows)

    def pair(self, index: int) -> tuple[Tensor, Tensor, str]:
        row, name = int(self._rows[index]), f"{self._file}, image {int(self._rows[index]) + 1}"
        image = torch.from_numpy(np.asarray(self._images[row])).mT  # MATLAB's columns come first
        depth = torch.from_numpy(np.asarray(self._depths[row])).mT
        return image.float() / 255, checked_depth(depth, name), name


class MapFolder(Maps):
    """Pairs of equal names in images/ and maps/: 8-bit PNG labels where `classes` is given, else depth, 16-bit PNG in millimetres.

    Raises:
        ValueError: a folder, or an image's map, is missing.
    """

    def __init__(self, folder: str | Path, size: int, classes: int | None = None) -> None:
        self.size, self._classes, self._files = size, classes, _pairs(Path(folder) / "images", Path(folder) / "maps")

    def __len__(self) -> int:
        return len(self._files)

    def pair(self, index: int) -> tuple[Tensor, Tensor, str]:
        image, path = self._files[index]
        truth, name = _read_map(path), str(path)
        found = checked_depth(truth / 1000, name) if self._classes is None else checked_labels(truth, self._classes, name)
        return read_image(image), found, name


def _pairs(images: Path, maps: Path) -> list[tuple[Path, Path]]:
    for folder in (images, maps):
        if not folder.is_dir():
            raise ValueError(f"{folder} is missing: give the folder that holds it")
    files = sorted(path for path in images.iterdir() if path.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"{images} holds no file ending in {', '.join(sorted(SUFFIXES))}")
    lacking = [path.name for path in files if not (maps / f"{path.stem}.png").is_file()]
    if lacking:
        raise ValueError(f"{maps} has no map for {', '.join(lacking[:3])}{' and others' if len(lacking) > 3 else ''}")
    return [(path, maps / f"{path.stem}.png") for path in files]


def _read_map(path: Path) -> Tensor:
    try:
        with Image.open(path) as image:
            values = np.asarray(image)
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is no map that can be read: {error}") from error
    if values.ndim != 2:
        raise ValueError(f"{path} has {values.ndim} dimensions; a map is one channel of 8 or 16 bits")
    return torch.from_numpy(values.astype(np.int32))
