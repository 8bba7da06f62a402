"""Preprocessing from the models' own configs, split into geometry and normalisation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor, nn

from dtta_fast.runtime.constants import numbers

Transform = Callable[[Tensor], Tensor]


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
    """Returns the transforms of a transformers image processor; if it does not normalise, the second is the identity."""

    def crop(images: Tensor) -> Tensor:
        found: Tensor = processor(images=images, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
        return found.to(images.device).clamp(0, 1)  # bicubic overshoots

    if not getattr(processor, "do_normalize", False) or getattr(processor, "image_mean", None) is None:
        return crop, unchanged
    return crop, normalising(processor.image_mean, processor.image_std)


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
