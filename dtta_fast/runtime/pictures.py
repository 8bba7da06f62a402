"""Decodes images with PIL: files as people have them, whatever their mode, orientation and depth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, features
from torch import Tensor

from dtta_fast.runtime.files import open_plain

# the only formats that PIL may open here, whatever a file's suffix: for EPS, PIL would run Ghostscript, an interpreter
FORMATS = ["BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"]
if "avif" in features.modules and features.check("avif"):  # Pillow 11.3 and newer
    FORMATS.append("AVIF")
BITS_PER_SAMPLE = 258  # the TIFF tag
PHOTOMETRIC = 262  # the TIFF tag that says whether 0 is black
MOST_BYTES = 2**29  # the largest image file; PIL's maximum number of pixels, uncompressed at 8 bits per channel, is 340 MiB
MOST_PROPORTION = 64  # the largest ratio of the longer to the shorter side; a resize scales the shorter one to a model's size


def read_image(path: str | Path) -> Tensor:
    """Reads an image file as [3, H, W] in [0, 1], in its own size.

    Raises:
        ValueError: the file is not an image; the message names it.
    """
    return read_pixels(Path(path), str(path)).float() / 255


def read_pixels(source: Path | BinaryIO, name: str) -> Tensor:
    """Reads an image file as uint8 [3, H, W], in its own size.

    Raises:
        ValueError: as for `decode`.
    """
    return to_tensor(decode(source, name))


def to_pixels(image: Image.Image) -> Tensor:
    """Converts a PIL image to uint8 [3, H, W] in RGB, rotated according to its EXIF.

    Raises:
        ValueError: its pixels have no known range.
    """
    return to_tensor(_rgb(ImageOps.exif_transpose(image), _bits(image), _white_is_zero(image)))


def to_tensor(image: Image.Image) -> Tensor:
    """Converts to uint8 [3, H, W]. Not done by torchvision, whose conversions depend on torch's default dtype and device."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def decode(source: Path | BinaryIO, name: str) -> Image.Image:
    """Decodes an image file to RGB, rotated according to its EXIF.

    Raises:
        ValueError: the file is missing, truncated, not an image, not a regular file, or too large (see open_image()); the message contains
            `name`.
    """
    try:
        with open_image(source) as image:
            return _rgb(ImageOps.exif_transpose(image), _bits(image), _white_is_zero(image))
    except Exception as error:  # PIL's decoders raise many types for damaged files
        raise ValueError(f"{name} cannot be read as an image: {error}") from error


@contextmanager
def open_image(source: Path | BinaryIO) -> Iterator[Image.Image]:
    """Opens an image with PIL, without decoding its pixels yet.

    Raises:
        ValueError: the file is not a regular file or has more than 2^29 bytes, or as for check_size(). PIL raises many other types.
    """
    with open_plain(source, MOST_BYTES) if isinstance(source, Path) else source as file, Image.open(file, formats=FORMATS) as image:
        check_size(image.width, image.height)
        yield image


def check_size(width: int, height: int, what: str = "it ") -> None:
    """Checks an image's size before memory is allocated for it. The error message begins with `what`.

    Raises:
        ValueError: the image has more pixels than PIL's limit (PIL itself only warns, up to twice the limit), or one side is more than 64
            times the other. Resizing the shorter side to a model's size scales both.
    """
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and width * height > most:
        raise ValueError(f"{what}has {width * height} pixels, more than PIL.Image.MAX_IMAGE_PIXELS, {most}")
    if not 0 < max(width, height) <= MOST_PROPORTION * min(width, height):
        raise ValueError(f"{what}is {width}x{height} pixels; crop it, so that no side is more than {MOST_PROPORTION} times the other")


def _rgb(image: Image.Image, bits: int | None, white_is_zero: bool) -> Image.Image:
    """Converts to RGB. bits: per channel, as the file says. white_is_zero: whether integers count from white, and PIL left them so."""
    if image.mode == "F":
        raise ValueError("its pixels are floats, of no known range; save it with 8 bits a channel")
    if image.mode.startswith("I"):
        if bits != 16:
            found = f"{bits}-bit integers" if bits else "integers"
            raise ValueError(f"its pixels are {found}, of no known range; save it with 8 or 16 bits a channel")
        values = (np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)  # PIL would clip at 255
        image = Image.fromarray(255 - values if white_is_zero else values)
    if image.mode == "La":
        image = image.convert("LA")
    if "transparency" in image.info and image.mode == "P":
        image = image.convert("RGBA")  # PIL warns about converting directly
    return image.convert("RGB")


def _white_is_zero(image: Image.Image) -> bool:
    return image.mode.startswith("I") and getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0  # PIL inverts images of 8 bits only


def _bits(image: Image.Image) -> int | None:
    """Returns the bits per channel of an opened file of integers; None if the file does not tell."""
    if image.mode.startswith("I;16") or image.format in ("PNG", "PPM"):  # neither format has more than 16
        return 16
    found = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE)
    return int(found[0]) if found else None
