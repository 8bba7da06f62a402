"""Interfaces of the readers of data sets, and the selection of corruptions that they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

NO_LABEL = 255


class Images(Dataset[Tensor], ABC):
    """A data set whose items are images, uint8 [3, H, W], each in its own size.

    Readers can be pickled without open files, for DataLoader workers.

    Attributes:
        names: unique name of each image: its path relative to the root, with slashes, or file#number, or shard/key.
        groups: group of each image: corruption and severity, such as "gaussian_noise5", or else one name for all.
        labels: class index of each image, an index into `classes` if there are names; None if the images have no labels.
        classes: human-readable class names; () if there are none.
        outputs: for data sets with fewer classes than ImageNet's 1000, the index of each class among a model's 1000 outputs. None means
            that class k is output k.
        further: (output, class) pairs for additional outputs that also stand for a class. For example, ObjectNet's bicycle corresponds
            to two ImageNet classes.
    """

    names: Sequence[str]
    groups: Sequence[str]
    labels: Sequence[int] | None = None
    classes: tuple[str, ...] = ()
    outputs: tuple[int, ...] | None = None
    further: tuple[tuple[int, int], ...] = ()

    @abstractmethod
    def read(self, index: int) -> Tensor:
        """Reads image `index` as uint8 [3, H, W], rotated according to its EXIF. Grey, palette and CMYK become RGB; alpha is dropped.

        Raises:
            ValueError: the file is missing, truncated, not an image, or has too many pixels; the message names it.
        """

    def __getitem__(self, index: int) -> Tensor:
        return self.read(index)

    def __len__(self) -> int:
        return len(self.names)


class Maps(Dataset[tuple[Tensor, Tensor]], ABC):
    """A data set whose items are (image [3, size, size] in [0, 1], map [size, size]).

    The map holds int64 labels, 255 for unlabelled pixels, or depth in metres. The shorter side is resized to `size` (bicubic for images,
    nearest neighbour for maps) and the centre is cropped. An item with an invalid map raises a ValueError that names the file and the
    problem. names, groups and classes are the same as for `Images`.
    """

    size: int
    names: Sequence[str]
    groups: Sequence[str]
    classes: tuple[str, ...] = ()

    @abstractmethod
    def pair(self, index: int) -> tuple[Tensor, Tensor, str]:
        """Returns the image [3, H, W], the map [H, W] and the name of their source."""

    @abstractmethod
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, truth, name = self.pair(index)
        if image.shape[1:] != truth.shape:
            raise ValueError(f"{name}: the image is {tuple(image.shape[1:])} and its map {tuple(truth.shape)}; both have one size")
        from torchvision.transforms import functional as T  # importing it takes a second

        image = T.center_crop(T.resize(image, [self.size], T.InterpolationMode.BICUBIC, antialias=True), [self.size, self.size])
        near = T.center_crop(T.resize(truth[None], [self.size], T.InterpolationMode.NEAREST), [self.size, self.size])
        if not bool(((near != NO_LABEL) if near.dtype == torch.int64 else near > 0).any()):
            raise ValueError(f"{name}: what the crop shows of it has no label or depth")
        return image.clamp(0, 1), near[0]


def chosen_corruptions(
    there: dict[str, set[int]], corruptions: Sequence[str], severities: Sequence[int], where: Path
) -> list[tuple[str, int]]:
    """Returns the requested (corruption, severity) pairs, checked against those in `there`; all of them if none are requested.

    Raises:
        ValueError: there are no corruptions, or a requested one is missing.
    """
    if not there:
        raise ValueError(f"{where} holds no corruption, such as gaussian_noise; give the folder that does")
    pairs = []
    for corruption in corruptions or sorted(there):
        if corruption not in there:
            raise ValueError(f"corruptions has {corruption!r}, which is not in {where}; there are {', '.join(sorted(there))}")
        for severity in severities or sorted(there[corruption]):
            if severity not in there[corruption]:
                some = ", ".join(map(str, sorted(there[corruption])))
                raise ValueError(f"severities has {severity!r}, which {corruption} in {where} does not have; there are {some}")
            pairs.append((corruption, severity))
    return pairs
