"""The noise process of a diffusion model. It is defined in dtta_fast.denoisers.noise_process."""

from dtta_fast.denoisers.noise_process import NoiseProcess

__all__ = ["NoiseProcess"]
