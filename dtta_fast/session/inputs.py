"""Converts the images that a call may be given, such as PIL images, arrays, paths and lists of them, to a tensor."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from dtta_fast.runtime.reads import Checks
from dtta_fast.session.checks import checked_images

Images: TypeAlias = Any  # a Tensor [B, 3, H, W], a PIL image, an array [H, W, 3] or [B, H, W, 3], a path, or a sequence of such images


def to_batch(images: Images, device: torch.device, crop: Callable[[Tensor], Tensor]) -> tuple[Tensor, bool]:
    """Converts images to one tensor, and tells whether they were cropped for it.

    A tensor is returned as it is. Everything else is moved to the device; images of different sizes are cropped one by one.

    Raises:
        TypeError: a type is not understood. ValueError: an array has another shape or dtype, or a file is not an image.
    """
    if isinstance(images, Tensor):
        return images, False
    if isinstance(images, np.ndarray) and images.ndim == 4:
        return _from_array(images).to(device), False
    parts = [_one(image) for image in (images if isinstance(images, Sequence) and not isinstance(images, str) else [images])]
    if not parts:
        raise ValueError("images is an empty list; give at least one image")
    parts = [part.to(device) for part in parts]
    if len({(part.shape, part.dtype) for part in parts}) == 1:
        return torch.stack(parts), False
    checks = Checks()
    crops = [crop(checked_images(part[None], device, checks).clone())[0] for part in parts]  # a crop may write to its input
    checks.settle()
    sizes = sorted({tuple(part.shape[-2:]) for part in crops})
    if len(sizes) > 1:
        found = ", ".join(f"{height}x{width}" for height, width in sizes[:3])
        raise ValueError(f"images have sizes {found}, and the model has no config to crop them by: resize them, or give one at a time")
    return torch.stack([part.to(crops[0].dtype) for part in crops]), True


def to_ids(image_ids: Any, device: torch.device) -> Any:
    """Converts a sequence of whole numbers, or an array of them, to a tensor; returns what is neither unchanged.

    Raises:
        ValueError: a number is out of range. TypeError: a list holds anything but whole numbers.
    """
    if isinstance(image_ids, np.ndarray) and image_ids.ndim == 1:
        image_ids = list(image_ids)
    if isinstance(image_ids, Sequence) and all(isinstance(i, (int, np.integer)) and not isinstance(i, bool) for i in image_ids):
        if any(not 0 <= i < 2**32 for i in image_ids):
            raise ValueError(f"image_ids lies in {min(image_ids)} .. {max(image_ids)}; give 0 .. 2^32 - 1")
        return torch.tensor([int(i) for i in image_ids], dtype=torch.int64, device=device)
    if isinstance(image_ids, Sequence):
        found = type(image_ids[0]).__name__ if len(image_ids) else "nothing"
        raise TypeError(f"image_ids holds {found}; give whole numbers, one per image")
    return image_ids


def _one(image: Any) -> Tensor:
    """Converts one image to [3, H, W]."""
    if isinstance(image, Tensor):
        if image.ndim != 3:
            raise ValueError(f"images holds a tensor of shape {tuple(image.shape)}; in a list, give [3, H, W]")
        return image
    if isinstance(image, np.ndarray):
        if image.ndim == 2:  # of grey values
            image = np.repeat(image[:, :, None], 3, axis=2)
        if image.ndim != 3:
            raise ValueError(f"images contains an array of shape {image.shape}; give [H, W, 3] or [H, W], or a batch [B, H, W, 3] alone")
        return _from_array(image)
    if isinstance(image, (str, os.PathLike)):
        from dtta_fast.runtime.pictures import read_image

        return read_image(os.fspath(image))
    if "PIL.Image" in sys.modules and isinstance(image, sys.modules["PIL.Image"].Image):
        from dtta_fast.runtime.pictures import to_pixels

        return to_pixels(image)
    raise TypeError(
        f"images is, or contains, an object of type {type(image).__name__}; give a tensor [B, 3, H, W], a PIL image, an array "
        "[H, W, 3], a path, or a list of images"
    )


def _from_array(array: np.ndarray[Any, Any]) -> Tensor:
    """Converts an array [..., H, W, 3], uint8 or floating point, to a tensor [..., 3, H, W]."""
    array = array.astype(array.dtype.newbyteorder("="), copy=False)  # torch takes the machine's byte order only
    if array.shape[-1] != 3 or array.dtype not in (np.uint8, np.float16, np.float32, np.float64):
        found = f"images contains an array of {array.dtype} with shape {array.shape}"
        raise ValueError(f"{found}; give uint8, or floating point in [0, 1], with the channels last: [H, W, 3]")
    return torch.from_numpy(np.array(array, order="C")).movedim(-1, -3).contiguous()
