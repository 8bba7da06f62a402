"""Images of a folder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import functional as T

from dtta_fast.data.images import Images

# what PIL opens here whatever a file's suffix says: it hands EPS, which it also knows, to Ghostscript, an interpreter
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def read_images(folder: str | Path, size: int, most: int) -> Tensor:
    """The first `most` images of a folder and its subfolders, by name, as [N, 3, size, size] in [0, 1]: short side resized, centre cropped.

    Raises:
        ValueError: no folder, a folder without images, a file that is no image, which the message names, or `most` below 1.
    """
    if most < 1:
        raise ValueError(f"most is {most}; give 1 and more")
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"images is {str(folder)!r}, which is no folder")
    files = sorted(folder / name for name in image_files(folder))[:most]
    if not files:
        raise ValueError(f"images is {str(folder)!r}, which holds no file ending in {', '.join(sorted(SUFFIXES))}")
    return torch.stack(
        [T.to_tensor(T.center_crop(T.resize(decode(path, str(path)), size, T.InterpolationMode.BICUBIC), [size, size])) for path in files]
    )


def read_image(path: str | Path) -> Tensor:
    """A file as [3, H, W] in [0, 1], of its own size.

    Raises:
        ValueError: it is no image; the message names it.
    """
    found: Tensor = T.to_tensor(decode(Path(path), str(path)))
    return found


def read_pixels(source: Path | BinaryIO, name: str) -> Tensor:
    """A file as uint8 [3, H, W], of its own size.

    Raises:
        ValueError: as `decode`.
    """
    found: Tensor = T.pil_to_tensor(decode(source, name))
    return found


def decode(source: Path | BinaryIO, name: str) -> Image.Image:
    """A file in RGB, turned as its EXIF says.

    Raises:
        ValueError: it is missing, truncated, no image, or has more pixels than PIL's limit; the message has `name`.
    """
    try:
        with Image.open(source, formats=FORMATS) as image:
            check_pixels(image.width * image.height)
            return _rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # a damaged file makes PIL's decoders raise many kinds
        raise ValueError(f"{name} is no image that can be read: {error}") from error


def check_pixels(pixels: int) -> None:
    """Raises ValueError where an image has more than PIL's limit: PIL itself only warns up to its double."""
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and pixels > most:
        raise ValueError(f"it has {pixels} pixels, more than PIL.Image.MAX_IMAGE_PIXELS, {most}")


def read_lines(path: Path) -> list[str]:
    """A list's lines, as they are.

    Raises:
        ValueError: the file is missing or no text; the message names it.
    """
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no list that can be read: {error}; write it as UTF-8 text") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its pixels are floats, of no known range; save it with 8 bits a channel")
    if image.mode.startswith("I"):  # 16 bits, which PIL would cut off at 255
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if "transparency" in image.info and image.mode == "P":
        image = image.convert("RGBA")  # PIL warns of the direct way
    return image.convert("RGB")


class ImageFiles(Images):
    """Image files below a root; names are their paths from it. `border` pixels are cut off on each side."""

    def __init__(
        self,
        root: Path,
        names: Sequence[str],
        groups: Sequence[str],
        labels: Sequence[int] | None = None,
        classes: Sequence[str] = (),
        outputs: Sequence[int] | None = None,
        border: int = 0,
    ) -> None:
        self._root, self._border = root, border
        self.names, self.groups, self.labels, self.classes = names, groups, labels, tuple(classes)
        self.outputs = None if outputs is None else tuple(outputs)

    def read(self, index: int) -> Tensor:
        path, cut = self._root / self.names[index], self._border
        image = read_pixels(path, str(path))
        if min(image.shape[1:]) <= 2 * cut:
            raise ValueError(f"{path} is {image.shape[2]}x{image.shape[1]} pixels, all of them its border of {cut}")
        return image[:, cut : image.shape[1] - cut, cut : image.shape[2] - cut]


def _leads_up(place: str) -> bool:
    """Whether it is a link to a folder above it: following that has no end."""
    return os.path.islink(place) and os.path.realpath(place) in set(map(os.path.realpath, map(str, Path(place).parents)))


def image_files(folder: Path) -> list[str]:
    """Paths, from the folder and with slashes, of its images and its subfolders', by name. Hidden files and folders are left out."""
    found = []
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not _leads_up(os.path.join(place, name)))
        inner = Path(place).relative_to(folder).as_posix()
        prefix = "" if inner == "." else f"{inner}/"
        for name in sorted(files):  # macOS leaves ._NAME.jpg files that hold no image
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES:
                found.append(prefix + name)
    return found


def subfolders(folder: Path) -> list[str]:
    """Their names, in order, without hidden ones.

    Raises:
        ValueError: the folder is missing.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is missing or no folder")
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def class_files(root: Path, folders: Iterable[tuple[str, int]]) -> tuple[list[str], list[int]]:
    """Names, from the root, and labels of the images in class folders.

    Args:
        folders: (path from the root, label) pairs.

    Raises:
        ValueError: a folder without an image.
    """
    names: list[str] = []
    labels: list[int] = []
    for folder, label in folders:
        files = image_files(root / folder)
        if not files:
            raise ValueError(f"{root / folder} holds no file ending in {', '.join(sorted(SUFFIXES))}: fill the class, or remove its folder")
        names += [f"{folder}/{name}" for name in files]
        labels += [label] * len(files)
    return names, labels


def open_folder(root: Path) -> ImageFiles:
    """Any folder: subfolders are classes, numbered in the order of their names as strings; without them the images have no labels.

    Raises:
        ValueError: no folder, no image, an empty class, or images beside class folders.
    """
    classes = subfolders(root)
    beside = [path.name for path in root.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file() and path.name[0] != "."]
    if classes and beside:
        raise ValueError(f"{root} has class folders and {sorted(beside)[0]} beside them: move the images into classes, or the folders away")
    if classes:
        names, labels = class_files(root, [(name, label) for label, name in enumerate(classes)])
        return ImageFiles(root, names, ["folder"] * len(names), labels, classes)
    if not beside:
        raise ValueError(f"{root} holds no class folder and no file ending in {', '.join(sorted(SUFFIXES))}")
    return ImageFiles(root, sorted(beside), ["folder"] * len(beside))
