"""Diffusion models that are differentiable with respect to their condition."""

import importlib
from typing import TYPE_CHECKING, Any

from dtta_fast.denoisers.base import Denoiser
from dtta_fast.denoisers.dit import DiT

if TYPE_CHECKING:
    from dtta_fast.denoisers.class_unet import ClassUNet
    from dtta_fast.denoisers.concat_unet import ConcatUNet
    from dtta_fast.denoisers.controlnet import ControlNet
    from dtta_fast.denoisers.stable_diffusion import StableDiffusion
    from dtta_fast.denoisers.text_to_image import PixArt, PixArtSigma, Sana, StableDiffusion3, StableDiffusionXL

__all__ = [
    "ClassUNet",
    "ConcatUNet",
    "ControlNet",
    "Denoiser",
    "DiT",
    "PixArt",
    "PixArtSigma",
    "Sana",
    "StableDiffusion",
    "StableDiffusion3",
    "StableDiffusionXL",
]
# imported on first access, because their libraries take seconds to import
LATE = {
    "ClassUNet": "class_unet",
    "ConcatUNet": "concat_unet",
    "ControlNet": "controlnet",
    "PixArt": "text_to_image",
    "PixArtSigma": "text_to_image",
    "Sana": "text_to_image",
    "StableDiffusion": "stable_diffusion",
    "StableDiffusion3": "text_to_image",
    "StableDiffusionXL": "text_to_image",
}


def __getattr__(name: str) -> Any:
    if name in LATE:
        return getattr(importlib.import_module(f"{__name__}.{LATE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
