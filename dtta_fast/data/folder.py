"""Images of a folder."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import functional as T

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def read_images(folder: str | Path, size: int, most: int) -> Tensor:
    """The first `most` images of a folder and its subfolders, by name, as [N, 3, size, size] in [0, 1]: short side resized, centre cropped.

    Raises:
        ValueError: no folder, a folder without images, or a file that is no image; the message names it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"images is {str(folder)!r}, which is no folder")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())[:most]
    if not files:
        raise ValueError(f"images is {str(folder)!r}, which holds no file ending in {', '.join(sorted(SUFFIXES))}")
    return torch.stack(
        [T.to_tensor(T.center_crop(T.resize(_read(path), size, T.InterpolationMode.BICUBIC), [size, size])) for path in files]
    )


def read_image(path: str | Path) -> Tensor:
    """A file as [3, H, W] in [0, 1], of its own size.

    Raises:
        ValueError: it is no image; the message names it.
    """
    found: Tensor = T.to_tensor(_read(Path(path)))
    return found


def _read(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is no image that can be read: {error}") from error
