"""Diffusion models whose condition can be differentiated."""

from typing import TYPE_CHECKING, Any

from dtta_fast.denoisers.base import Denoiser
from dtta_fast.denoisers.dit import DiT

if TYPE_CHECKING:
    from dtta_fast.denoisers.stable_diffusion import StableDiffusion

__all__ = ["Denoiser", "DiT", "StableDiffusion"]


def __getattr__(name: str) -> Any:
    if name == "StableDiffusion":  # whose library takes seconds to import
        from dtta_fast.denoisers.stable_diffusion import StableDiffusion

        return StableDiffusion
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
