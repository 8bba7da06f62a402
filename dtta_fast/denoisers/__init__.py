"""Diffusion models whose condition can be differentiated."""

from dtta_fast.denoisers.base import Denoiser
from dtta_fast.denoisers.dit import DiT

__all__ = ["Denoiser", "DiT"]
