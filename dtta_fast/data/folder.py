"""Reads images from a folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms import functional as T

from dtta_fast.data.base import Images
from dtta_fast.runtime.files import read_text
from dtta_fast.runtime.pictures import FORMATS, check_size, decode, read_pixels, to_tensor
from dtta_fast.runtime.pictures import read_image as read_image  # public under this name
from dtta_fast.runtime.warn import warn

SPLITS = {"train", "training", "val", "valid", "validation", "test"}
SUFFIXES = {".apng", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo", ".png", ".tif", ".tiff", ".webp"}
SUFFIXES |= {".pbm", ".pgm", ".pnm", ".ppm"}  # of Netpbm
NOT_READ = {".cr2", ".dib", ".dng", ".eps", ".heic", ".heif", ".ico", ".jp2", ".jxl", ".nef", ".psd", ".raw", ".svg", ".tga"}
BEGINNINGS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*")  # of pictures in files without an extension
(SUFFIXES if "AVIF" in FORMATS else NOT_READ).add(".avif")
SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"}


def read_images(folder: str | Path, size: int, most: int) -> Tensor:
    """Reads up to `most` images of a folder and its subfolders, evenly spaced in the order of their names, as [N, 3, size, size] in [0, 1].

    The shorter side is resized to `size` and the centre is cropped.

    Raises:
        ValueError: the folder does not exist or has no images, a file is not an image (the message names it), or `most` is below 1.
    """
    if most < 1:
        raise ValueError(f"most is {most}; give 1 or more")
    folder = Path(folder)
    if not os.path.isdir(folder):  # Path.is_dir() raises for a name that is too long
        raise ValueError(f"images is {str(folder)!r}, which is not a folder")
    found = sorted(folder / name for name in image_files(folder))
    count = min(most, len(found))
    files = [found[i * len(found) // count] for i in range(count)]  # subfolders are often classes
    if not files:
        raise ValueError(f"images is {str(folder)!r}, which holds no file ending in {', '.join(sorted(SUFFIXES))}")
    cropped = (T.center_crop(T.resize(decode(path, str(path)), size, T.InterpolationMode.BICUBIC), [size, size]) for path in files)
    return torch.stack([to_tensor(image).float() / 255 for image in cropped])


def read_lines(path: Path) -> list[str]:
    """Reads the lines of a list file, unmodified.

    Raises:
        ValueError: the file is missing or is not text; the message names it.
    """
    try:
        return read_text(path).splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a list: {error}; write it as UTF-8 text") from error


class ImageFiles(Images):
    """Image files below a root; their names are paths relative to it. `border` pixels are cut off on each side."""

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
        image = image[:, cut : image.shape[1] - cut, cut : image.shape[2] - cut]
        check_size(image.shape[2], image.shape[1], f"{path} without its border ")
        return image


def _leads_up(place: str) -> bool:
    """Returns whether `place` is a link to one of its parent folders, which could be followed forever."""
    return os.path.islink(place) and os.path.realpath(place) in set(map(os.path.realpath, map(str, Path(place).parents)))


def image_files(folder: Path) -> list[str]:
    """Lists the images of a folder and its subfolders by name, as relative paths with slashes.

    Hidden files and folders, and those that systems and archives create, are skipped. A warning counts pictures in formats that are not
    read.
    """
    found: list[str] = []
    passed: list[str] = []
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if _counts(name) and not _leads_up(os.path.join(place, name)))
        inner = Path(place).relative_to(folder).as_posix()
        prefix = "" if inner == "." else f"{inner}/"
        for name in sorted(files):  # macOS creates ._NAME.jpg files that are not images
            suffix = os.path.splitext(name)[1].lower()
            if not name.startswith(".") and (suffix in SUFFIXES | NOT_READ or (not suffix and _is_picture(Path(place, name)))):
                (found if suffix in SUFFIXES else passed).append(prefix + name)
    if passed:
        some = f"{len(passed)} pictures are" if len(passed) > 1 else "1 picture is"
        remedy = "convert to PNG or JPEG, or add the extension"
        warn(f"{folder}: {some} in a format that is not read, or without an extension, such as {passed[0]}; {remedy}")
    return found


def _is_picture(path: Path) -> bool:
    """Returns whether a file begins as a picture does."""
    try:
        if not path.is_file():  # a pipe would wait for its writer
            return False
        with path.open("rb") as file:
            return file.read(4).startswith(BEGINNINGS)
    except OSError:
        return False


def _counts(name: str) -> bool:
    """Returns whether a folder of this name is the user's own, rather than hidden or made by a system."""
    return not name.startswith(".") and name not in SYSTEM_FOLDERS


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Returns a sort key that compares numbers in names by value and ignores case: 2, 10, apple, x2, x10, Zebra."""
    parts = re.findall(r"\d+|\D+", name.lower())
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def subfolders(folder: Path) -> list[str]:
    """Returns the sorted names of the subfolders, without hidden ones.

    Raises:
        ValueError: the folder is missing.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"{folder} does not exist, or is not a folder")
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and _counts(path.name))


def class_files(root: Path, folders: Iterable[tuple[str, int]]) -> tuple[list[str], list[int]]:
    """Returns the names, relative to the root, and the labels of the images in class folders.

    Args:
        folders: (path relative to the root, label) pairs.

    Raises:
        ValueError: a folder has no image.
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
    """Opens any folder of images. Subfolders are classes, numbered in string order; without subfolders, the images have no labels.

    Raises:
        ValueError: the folder does not exist, has no image or an empty class, has images next to class folders, or holds splits.
    """
    classes = subfolders(root)
    beside = [path.name for path in root.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file() and path.name[0] != "."]
    if classes and beside:
        raise ValueError(f"{root} has class folders and {sorted(beside)[0]} beside them: move the images into classes, or the folders away")
    if classes and {name.lower() for name in classes} <= SPLITS:
        raise ValueError(f"{root} holds the splits {', '.join(classes)}, not classes: give the folder of one split, {root / classes[0]}")
    if classes:
        names, labels = class_files(root, [(name, label) for label, name in enumerate(classes)])
        return ImageFiles(root, names, ["folder"] * len(names), labels, classes)
    names = image_files(root)
    if not names:
        raise ValueError(f"{root} holds no class folder and no file ending in {', '.join(sorted(SUFFIXES))}")
    return ImageFiles(root, names, ["folder"] * len(names))
