"""Preprocessing from the models' own configs, split into geometry and normalisation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dtta_fast.runtime.constants import numbers

Transform = Callable[[Tensor], Tensor]
PROBE = 32  # side length of the images that show what a processor does


def unchanged(images: Tensor) -> Tensor:
    return images


def normalising(mean: Any, std: Any) -> Transform:
    """Returns a transform (images - mean) / std with one number per channel.

    torchvision's version reads the values of std, which fails in an export.
    """
    # mean and std may be lists, arrays or tensors
    channels = [tuple(float(value) for value in np.asarray(values).ravel()) for values in (mean, std)]

    def normalise(images: Tensor) -> Tensor:
        shift, scale = (numbers(values, images.device, images.dtype).view(-1, 1, 1) for values in channels)
        return (images - shift) / scale

    return normalise


def timm_transforms(model: nn.Module) -> tuple[Transform, Transform]:
    """Returns timm's evaluation transform for the model, or the identity if the model has no timm config."""
    if not getattr(model, "pretrained_cfg", None):
        return unchanged, unchanged
    from timm.data import resolve_model_data_config

    config = resolve_model_data_config(model)
    return _timm_transforms(tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in sorted(config.items())))


@functools.lru_cache(maxsize=32)
def _timm_transforms(settings: tuple[tuple[str, Any], ...]) -> tuple[Transform, Transform]:
    from timm.data import create_transform

    config: dict[str, Any] = dict(settings)
    *geometry, _to_tensor, normalise = create_transform(**config, is_training=False).transforms

    def crop(images: Tensor) -> Tensor:
        if images.shape[-2:] == tuple(config["input_size"][1:]):  # ImageNet-C is already cropped; resizing costs accuracy
            return images
        for transform in geometry:
            images = transform(images)
        return images.clamp(0, 1)  # bicubic overshoots

    return crop, normalising(normalise.mean, normalise.std)


def processor_transforms(processor: Any) -> tuple[Transform, Transform]:
    """Returns the transforms of a transformers image processor: its geometry, and what it does to the values of pixels.

    The second is found by running the processor on images of one colour: scale, offset, normalisation and channel order all show in the
    result. The crop is in RGB, as the denoiser needs it.

    Raises:
        ValueError: the processor fails, or changes pixel values in a way that is not linear.
    """
    # the steps that are not geometry; some processors have only the first two
    off = dict.fromkeys(("do_rescale", "do_normalize"), False)
    off |= {name: False for name in ("do_flip_channel_order", "include_top") if hasattr(processor, name)}

    def crop(images: Tensor) -> Tensor:
        found: Tensor = processor(images=images, **off, return_tensors="pt")["pixel_values"]
        return found.to(images.device).clamp(0, 1)  # bicubic overshoots

    return crop, _values_transform(processor)


def preset_transforms(preset: Any) -> tuple[Transform, Transform]:
    """Returns the transforms of torchvision's weights.transforms() for a classifier."""
    from torchvision.transforms.v2 import functional as F

    def crop(images: Tensor) -> Tensor:
        if list(images.shape[-2:]) == [int(preset.crop_size[0])] * 2:  # ImageNet-C is already cropped; resizing costs accuracy
            return images
        resized = F.resize(images, list(preset.resize_size), interpolation=preset.interpolation, antialias=preset.antialias)
        return F.center_crop(resized, list(preset.crop_size)).clamp(0, 1)  # bicubic overshoots

    return crop, normalising(preset.mean, preset.std)


def processed_size(processor: Any) -> tuple[int, int]:
    """Returns the size (height, width) of what a transformers image processor makes of a square image.

    Raises:
        ValueError: the size depends on the image's.
    """
    sizes = {tuple(_processed(processor, (0, 0, 0), side).shape[-2:]) for side in (PROBE, 3 * PROBE)}
    if len(sizes) > 1:
        raise ValueError("it gives images of different sizes different sizes; it needs do_resize and a size")
    height, width = sizes.pop()
    return height, width


def _processed(processor: Any, colour: tuple[int, int, int], side: int = PROBE) -> Tensor:
    """Returns what a processor makes of an image of one colour, [3, h, w].

    Raises:
        ValueError: the processor fails, such as one whose size is None.
    """
    image = torch.tensor(colour, dtype=torch.uint8, device="cpu").view(3, 1, 1).repeat(1, side, side)
    try:
        found: Tensor = processor(images=image, return_tensors="pt")["pixel_values"][0]
    except (TypeError, ValueError, IndexError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"processor, a {type(processor).__name__}, fails on an image of one colour ({error}); complete its settings, or give crop= and "
            "normalise= in its place"
        ) from error
    return found


def _values_transform(processor: Any) -> Transform:
    def values(*colour: int) -> Tensor:
        found = _processed(processor, colour)  # type: ignore[arg-type]
        return found[:, found.shape[-2] // 2, found.shape[-1] // 2].double()  # the centre, since the border may be padding

    shift = values(0, 0, 0)
    matrix = torch.stack([values(255, 0, 0), values(0, 255, 0), values(0, 0, 255)], dim=1) - shift[:, None]
    for colour in ((255, 255, 255), (200, 30, 120)):
        expected = matrix @ torch.tensor(colour, dtype=torch.float64, device="cpu") / 255 + shift
        if not torch.allclose(values(*colour), expected, rtol=1e-3, atol=1e-3 * float(matrix.abs().max())):
            raise ValueError(
                f"processor, a {type(processor).__name__}, changes pixel values in a way that is not linear; give crop= and normalise= "
                "in its place"
            )
    if torch.allclose(matrix, torch.eye(3, dtype=torch.float64, device="cpu"), atol=1e-5) and float(shift.abs().max()) < 1e-5:
        return unchanged
    scale = matrix.diagonal()
    if torch.equal(matrix, scale.diag()) and bool((scale > 0).all()):
        mean, std = -shift / scale, 1 / scale
        known = [getattr(processor, name, None) for name in ("image_mean", "image_std")]
        for i, (own, found) in enumerate(zip(known, (mean, std), strict=True)):  # the processor's own numbers are not rounded
            if own is None or not np.allclose(np.broadcast_to(own, 3), found, atol=1e-5):
                known[i] = found
        return normalising(*known)
    weights, offsets = [tuple(row) for row in matrix.tolist()], tuple(shift.tolist())

    def change(images: Tensor) -> Tensor:
        rows = [sum(weight * images[:, k] for k, weight in enumerate(row)) + offset for row, offset in zip(weights, offsets, strict=True)]
        return torch.stack(rows, dim=1)

    return change


def open_clip_transforms(clip: Any) -> tuple[Transform, Transform]:
    """Returns open_clip's evaluation transform for the model."""
    from open_clip import get_model_preprocess_cfg, image_transform
    from torchvision import transforms

    wanted = get_model_preprocess_cfg(clip)
    kept = {name: wanted[name] for name in ("mean", "std", "interpolation", "resize_mode", "fill_color") if name in wanted}
    steps = image_transform(wanted["size"], is_train=False, **kept).transforms
    geometry = [
        step for step in steps if isinstance(step, (transforms.Resize, transforms.CenterCrop)) or "open_clip" in type(step).__module__
    ]

    def crop(images: Tensor) -> Tensor:
        for step in geometry:
            images = step(images)
        return images.clamp(0, 1)

    normalise = next(step for step in steps if isinstance(step, transforms.Normalize))
    return crop, normalising(normalise.mean, normalise.std)
