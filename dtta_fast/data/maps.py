"""Images with ground-truth maps: ADE20K, NYUv2, and any folder of pairs."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dtta_fast.data.base import NO_LABEL, Maps, chosen_corruptions
from dtta_fast.data.folder import SUFFIXES, read_lines
from dtta_fast.runtime.pictures import MOST_BYTES, check_size, open_image, read_image
from dtta_fast.runtime.warn import warn

ADE20K_CLASSES = 150
LOOKED_AT = 16  # maps that are looked at when a folder is opened
ORIENTATION, FIRST_SIDEWAYS = 0x0112, 5  # the EXIF tag, and the first of its values that exchange height and width
TURNS = {  # as in PIL's ImageOps.exif_transpose
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def checked_labels(labels: Tensor, classes: int, name: str) -> Tensor:
    """Converts labels to int64 and checks their range.

    Raises:
        ValueError: a label is neither in 0 .. classes - 1 nor 255.
    """
    labels = labels.long()
    wrong = labels[(labels != NO_LABEL) & ((labels < 0) | (labels >= classes))].unique().tolist()
    if wrong:
        raise ValueError(f"{name} has labels {wrong[:5]}; there are 0 .. {classes - 1}, and {NO_LABEL} for none")
    return labels


def checked_depth(depth: Tensor, name: str) -> Tensor:
    """Converts depth in metres to float32 and checks it.

    Raises:
        ValueError: a value is NaN or infinite, or none is above 0.
    """
    depth = depth.float()
    if not bool(depth.isfinite().all()):
        raise ValueError(f"{name} has depth that is NaN or infinite; fill it or leave the image out")
    if not bool((depth > 0).any()):
        raise ValueError(f"{name} has no depth above 0")
    return depth


class Ade20k(Maps):
    """ADEChallengeData2016 with 150 classes: images/SPLIT/*.jpg and annotations/SPLIT/*.png, in which 0 means no label.

    `classes` are the first names in objectInfo150.txt, if the folder has that file. `split` is "training" or "validation".

    Raises:
        ValueError: a folder or the annotation of an image is missing.
    """

    def __init__(self, folder: str | Path, split: str, size: int) -> None:
        folder = Path(folder)
        self.size, self.classes = size, _ade20k_names(folder)
        self._files = _pairs(folder / "images" / split, folder / "annotations" / split)
        self.names, self.groups = _names(self._files, folder), ["ade20k"] * len(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def pair(self, index: int) -> tuple[Tensor, Tensor, str]:
        image, annotation = self._files[index]
        labels = read_map(annotation).long() - 1
        labels[labels < 0] = NO_LABEL
        return read_image(image), checked_labels(labels, ADE20K_CLASSES, str(annotation)), str(annotation)


class Ade20kC(Ade20k):
    """ADE20K's corrupted validation images, CORRUPTION/SEVERITY/*.jpg, next to ADE20K's annotations/validation/*.png.

    Raises:
        ValueError: as for `Ade20k`, or a corruption or severity is missing; the message lists those that exist.
    """

    def __init__(self, folder: str | Path, corruptions: Sequence[str], severities: Sequence[int], size: int) -> None:
        folder = Path(folder)
        there: dict[str, set[int]] = {}
        for place in sorted(folder.glob("*/*") if os.path.isdir(folder) else ()):
            if place.is_dir() and place.name.isascii() and place.name.isdigit():
                there.setdefault(place.parent.name, set()).add(int(place.name))
        self.size, self.classes, self._files, self.groups = size, _ade20k_names(folder), [], []
        for corruption, severity in chosen_corruptions(there, corruptions, severities, folder):
            found = _pairs(folder / corruption / str(severity), folder / "annotations" / "validation")
            self._files += found
            self.groups += [f"{corruption}{severity}"] * len(found)
        self.names = _names(self._files, folder)


class NyuV2(Maps):
    """NYUv2: nyu_depth_v2_labeled.mat with 1,449 images and their filled-in depth, and splits.mat with the official train and test indices.

    Args:
        file: path of nyu_depth_v2_labeled.mat, with splits.mat in the same folder, or of the folder that holds both.
        split: "train" or "test".

    Raises:
        ValueError: a file is missing or has unexpected contents. ImportError: h5py or scipy is missing (extra `data`).
    """

    def __init__(self, file: str | Path, split: str, size: int) -> None:
        try:
            import h5py  # noqa: F401 - to say so before the first image
            from scipy.io import whosmat
        except ImportError as error:
            raise ImportError("NYUv2 needs h5py and scipy: pip install 'dtta-fast[data]'") from error
        file = Path(file) / "nyu_depth_v2_labeled.mat" if os.path.isdir(file) else Path(file)
        splits = file.parent / "splits.mat"
        for path in (file, splits):
            if not os.path.isfile(path):
                raise ValueError(f"{path} is missing; NYUv2 is nyu_depth_v2_labeled.mat with splits.mat beside it")
        self.size, self._file = size, file
        self._data: Any = None
        self._process = 0
        try:
            count = _checked_arrays(self._opened())
            sizes = {name: math.prod(shape) for name, shape, _ in whosmat(splits)}
            if not 0 <= sizes[f"{split}Ndxs"] <= count:
                raise ValueError(f"{split}Ndxs has {sizes[f'{split}Ndxs']} numbers for {count} images")
            self._rows = _numbers(splits, f"{split}Ndxs")
        except Exception as error:  # scipy's and HDF5's readers raise many types for damaged files
            raise ValueError(f"{file} with {splits.name} is not NYUv2: {error}") from error
        if len(self._rows) == 0 or self._rows.min() < 0 or self._rows.max() >= count:
            raise ValueError(f"{splits} names images that {file} does not have: it has 1 .. {count}")
        self.names, self.groups = [f"{file.name}#{row + 1}" for row in self._rows], ["nyuv2"] * len(self._rows)

    def _opened(self) -> Any:
        """Returns the file, opened once per process, because a forked process must not share it."""
        if self._data is None or self._process != os.getpid():
            import h5py

            self._data, self._process = h5py.File(self._file, "r"), os.getpid()
        return self._data

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_data": None}

    def __len__(self) -> int:
        return len(self._rows)

    def pair(self, index: int) -> tuple[Tensor, Tensor, str]:
        row, name = int(self._rows[index]), f"{self._file}, image {int(self._rows[index]) + 1}"
        try:
            image = torch.from_numpy(np.asarray(self._opened()["images"][row])).mT  # MATLAB is column-major
            depth = torch.from_numpy(np.asarray(self._opened()["depths"][row])).mT
        except OSError as error:
            raise ValueError(f"{name} cannot be read: {error}; get the file again") from error
        return image.float() / 255, checked_depth(depth, name), name


def _checked_arrays(data: Any) -> int:
    """Checks the arrays of an open NYUv2 file and returns the number of images.

    Raises:
        ValueError: the arrays are not NYUv2's, or are stored in other files. HDF5 links could point to any file on this machine.
    """
    import h5py

    found = {}
    for name, axes in (("images", 4), ("depths", 3)):
        if not isinstance(data.get(name, getlink=True), h5py.HardLink) or not isinstance(data[name], h5py.Dataset):
            raise ValueError(f"{name} is missing, or a link")
        array = found[name] = data[name]
        if array.external or array.is_virtual:
            raise ValueError(f"{name} lies in another file")
        if array.ndim != axes or array.dtype.kind not in "uif" or (axes == 4 and (array.shape[1] != 3 or array.dtype != np.uint8)):
            raise ValueError(f"{name} is {array.dtype} of shape {list(array.shape)}")
        check_size(array.shape[-2], array.shape[-1], f"{name} ")
        if array.chunks and math.prod(array.chunks) * array.dtype.itemsize > MOST_BYTES:  # reading one image reads its whole chunk
            raise ValueError(f"{name} has chunks of {list(array.chunks)}, more than {MOST_BYTES} bytes")
    if len(found["images"]) != len(found["depths"]):
        raise ValueError(f"it has {len(found['images'])} images and {len(found['depths'])} depths")
    return len(found["images"])


def _numbers(splits: Path, name: str) -> Any:
    """Reads a split's row indices; MATLAB counts from 1."""
    from scipy.io import loadmat

    return loadmat(splits, variable_names=[name])[name].ravel().astype(int) - 1


class MapFolder(Maps):
    """Pairs of files with equal names in images/ and maps/.

    Maps are 8-bit PNG labels if `classes` is given, otherwise depth as 16-bit PNG in millimetres.

    Raises:
        ValueError: a folder or the map of an image is missing.
    """

    def __init__(self, folder: str | Path, size: int, classes: int | None = None) -> None:
        folder = Path(folder)
        self.size, self._classes, self._files = size, classes, _pairs(folder / "images", folder / "maps")
        self.names, self.groups = _names(self._files, folder), ["map-folder"] * len(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def pair(self, index: int) -> tuple[Tensor, Tensor, str]:
        image, path = self._files[index]
        truth, name = turned(read_map(path), path, image), str(path)
        found = checked_depth(truth.float() / 1000, name) if self._classes is None else checked_labels(truth, self._classes, name)
        return read_image(image), found, name


def open_map_folder(folder: Path, size: int) -> MapFolder:
    """Opens a map folder: with labels if it has a classes.txt (one class name per line), otherwise with depth.

    Raises:
        ValueError: as for `MapFolder`, or classes.txt has no names.
    """
    listed = folder / "classes.txt"
    if not os.path.isfile(listed):
        return MapFolder(folder, size)
    names = tuple(line.strip() for line in read_lines(listed) if line.strip())
    if not names:
        raise ValueError(f"{listed} has no name; write one class a line, or remove it where the maps are depth")
    data = MapFolder(folder, size, len(names))
    data.classes = names
    if len(names) > 1:
        _warn_of_white_foreground([path for _, path in data._files])
    return data


def _warn_of_white_foreground(files: Sequence[Path]) -> None:
    """Warns if maps hold 0 and 255 alone: masks of two colours, in which the foreground would count as no label."""
    found: set[int] = set()
    for path in files[:: max(1, len(files) // LOOKED_AT)][:LOOKED_AT]:
        try:
            found |= set(read_map(path).unique().tolist())
        except ValueError:  # said when it is read
            continue
    if found == {0, NO_LABEL}:
        warn(
            f"{files[0].parent} holds maps of 0 and {NO_LABEL} alone, and {NO_LABEL} means that a pixel has no label: if it is the "
            "foreground, save it as 1"
        )


def turned(truth: Tensor, path: Path, image: Path) -> Tensor:
    """Turns a map [H, W] by its own EXIF; if it has none, as its image's EXIF turns that, if the two are stored alike.

    Sizes that differ from the stored image's show that a map was drawn on the turned image. Where sizes cannot tell, the first such map
    of a folder brings a warning, and the map stays.
    """
    with open_image(path) as own:
        how = own.getexif().get(ORIENTATION, 1)
    if how in TURNS:
        return _transposed(truth, how)
    with open_image(image) as stored:
        how, size = stored.getexif().get(ORIENTATION, 1), (stored.height, stored.width)
    if how not in TURNS:
        return truth
    if size[0] != size[1] and how >= FIRST_SIDEWAYS:
        return _transposed(truth, how) if truth.shape == size else truth
    if str(path.parent) not in _TOLD:
        _TOLD.add(str(path.parent))
        warn(
            f"{image} is turned by its EXIF, and {path} has none; such maps are taken as ones of the turned image. If they are of the "
            "stored image, save the images without EXIF"
        )
    return truth


_TOLD: set[str] = set()  # folders of maps of which a warning was given


def _transposed(truth: Tensor, how: int) -> Tensor:
    return torch.from_numpy(np.asarray(Image.fromarray(truth.numpy()).transpose(TURNS[how])).copy())


def _ade20k_names(folder: Path) -> tuple[str, ...]:
    """Reads the first names from the column Name of objectInfo150.txt, a tab-separated table; returns () if there is no such file."""
    listed = folder / "objectInfo150.txt"
    if not os.path.isfile(listed):
        return ()
    lines = [line for line in read_lines(listed) if line.strip()]
    head, *rows = [[cell.strip() for cell in line.split("\t")] for line in lines or [""]]
    if "Name" not in head or len(rows) != ADE20K_CLASSES or any(len(row) != len(head) for row in rows):
        raise ValueError(f"{listed} is not ADE20K's: a heading with Name and {ADE20K_CLASSES} lines, with tabs between")
    return tuple(re.split("[,;]", row[head.index("Name")])[0] for row in rows)


def _names(files: Sequence[tuple[Path, Path]], folder: Path) -> list[str]:
    return [image.relative_to(folder).as_posix() for image, _ in files]


def _pairs(images: Path, maps: Path) -> list[tuple[Path, Path]]:
    for folder in (images, maps):
        if not os.path.isdir(folder):
            raise ValueError(f"{folder} is missing: give the folder that holds it")
    files = sorted(path for path in images.iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != ".")
    if not files:
        raise ValueError(f"{images} holds no file ending in {', '.join(sorted(SUFFIXES))}")
    lacking = [path.name for path in files if not os.path.isfile(maps / f"{path.stem}.png")]
    if lacking:
        raise ValueError(f"{maps} has no map for {', '.join(lacking[:3])}{' and others' if len(lacking) > 3 else ''}")
    return [(path, maps / f"{path.stem}.png") for path in files]


def read_map(path: Path) -> Tensor:
    """Reads a map of one channel as int32 [H, W].

    Raises:
        ValueError: the file is missing or damaged, or has several channels.
    """
    try:
        with open_image(path) as image:
            values = np.asarray(image)
    except Exception as error:  # PIL's decoders raise many types for damaged files
        raise ValueError(f"{path} cannot be read as a map: {error}") from error
    if values.ndim != 2:
        raise ValueError(f"{path} has {values.ndim} dimensions; a map is one channel of 8 or 16 bits")
    return torch.from_numpy(values.astype(np.int32))
