"""What the engine asks of a diffusion model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtta_fast.calibration import Calibration
from dtta_fast.process import NoiseProcess
from dtta_fast.runtime.constants import kept

ENCODED_PIXELS = 4 * 512**2  # that a VAE encodes at once


class Denoiser(nn.Module, ABC):
    """A diffusion model with a differentiable condition. Its parameters are what may adapt; its forward is the prediction."""

    process: NoiseProcess
    calibration: Calibration | None = None  # statistics of the images that it was trained on
    takes_maps = False  # whether a condition is a map [E, h, w], as ConcatUNet's, and not the embedding of a class
    can_checkpoint = False  # whether forward makes its activations again in the backward where `checkpointing` is set
    checkpointing = False
    keep_in_float32: tuple[str, ...] = ()  # parameters that mixed precision leaves as they are

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], any size, to x0 [B, C, h, w] in float32 (float64 for a float64 denoiser); no gradient."""

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """C, h, w of x0."""

    @abstractmethod
    def class_embeddings(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The table [K, ...] whose mixtures are conditions; read from `parameters` where they hold it, with gradient."""

    @abstractmethod
    def null_embedding(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The condition [...] without a class; read from `parameters` where they hold it, with gradient."""

    def depth_map(self, depth: Tensor) -> Tensor:
        """Depth [B, 1, h, w] to the map [B, 1, h, w] that conditions this denoiser, differentiable.

        Raises:
            ValueError: its conditions are no maps of depth.
        """
        raise ValueError(f"denoiser is a {type(self).__name__}; depth takes one of maps of depth, such as a ConcatUNet")

    @abstractmethod
    def adaptable(self) -> list[str]:
        """Names of the parameters that move when the denoiser adapts."""

    def network_to_adapt(self) -> nn.Module:
        """The submodule whose weights are adaptable(): where adapters go."""
        return self

    def regions(self) -> list[nn.Module]:
        """Submodules to compile one by one, of equal structure where that saves compilations; the whole denoiser by default."""
        return [self]

    @property
    def dtype(self) -> torch.dtype:
        """That of its activations: of its first floating-point parameter that mixed precision converts."""
        converted = (p.dtype for name, p in self.named_parameters() if name not in self.keep_in_float32 and p.is_floating_point())
        return next(converted, torch.float32)

    @abstractmethod
    def forward(self, x_t: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """x_t [N, C, h, w], timesteps [N] (rows of `process`), condition [B, ...] -> prediction [N, C or 2C, h, w].

        N is B times the rows of an image, which follow one another: what of a condition is equal for them is computed once.
        """


def to_model_range(images: Tensor, size: int) -> Tensor:
    """Images in [0, 1] at size x size (bicubic, antialiased) and in [-1, 1]."""
    if images.shape[-2:] != (size, size):
        images = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    return images * 2 - 1


def at_latent_size(maps: Tensor, denoiser: Denoiser) -> Tensor:
    """Maps [B, E, h, w] at the size of the denoiser's latents, each value the mean of what it covers.

    By two matrix products: on CUDA the gradient of F.interpolate(antialias=True) adds up in no fixed order.
    """
    height, width = denoiser.latent_shape[1:]
    if maps.shape[-2:] == (height, width):
        return maps
    rows, columns = (_resizing(old, new, maps.device, maps.dtype) for old, new in zip(maps.shape[-2:], (height, width), strict=True))
    return rows @ maps @ columns.T


@kept
def _resizing(old: int, new: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The matrix [new, old] of bilinear interpolation with antialiasing."""
    unit = torch.eye(old, dtype=torch.float64, device=device)[None, None]
    return F.interpolate(unit, (new, old), mode="bilinear", antialias=True)[0, 0].to(dtype)


def to_latents(vae: Any, images: Tensor, size: int) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] to a diffusers AutoencoderKL's posterior mean, scaled as its diffusion model was trained."""
    at_once = max(1, ENCODED_PIXELS // size**2)  # the encoder's activations are far larger than a denoiser's
    parts = [vae.encode(to_model_range(part, size).to(vae.dtype)).latent_dist.mean for part in images.split(at_once)]
    return torch.cat(parts) * vae.config.scaling_factor


def image_size(vae: Any, latent_size: int) -> int:
    """Pixels of a side, of a latent's side."""
    size: int = latent_size * 2 ** (len(vae.config.block_out_channels) - 1)
    return size
