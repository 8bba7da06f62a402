"""The interface between the engine and a diffusion model."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtta_fast.denoisers.calibration import Calibration
from dtta_fast.denoisers.noise_process import NoiseProcess
from dtta_fast.runtime.constants import kept

AUTOENCODERS = {"AutoencoderDC", "AutoencoderKL", "AutoencoderTiny", "VQModel"}  # by name, since importing diffusers takes a second
ENCODED_PIXELS = 4 * 512**2  # the most pixels a VAE encodes at once


class Denoiser(nn.Module, ABC):
    """A diffusion model with a differentiable condition. Its parameters can be adapted; its forward returns the prediction."""

    process: NoiseProcess
    calibration: Calibration | None = None  # statistics of its training images
    takes_maps = False  # whether a condition is a map [E, h, w], as for ConcatUNet, rather than a class embedding
    can_checkpoint = False  # whether forward supports recomputing activations in the backward pass (set `checkpointing`)
    checkpointing = False
    keep_in_float32: tuple[str, ...] = ()  # parameters that mixed precision does not convert

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Encodes images [B, 3, H, W] in [0, 1], of any size, to x0 [B, C, h, w] in float32 (float64 for a float64 denoiser), without
        gradient."""

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """The shape (C, h, w) of x0."""

    @abstractmethod
    def class_embeddings(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Returns the class table [K, ...]; conditions are mixtures of its rows.

        If `parameters` contains the table, it is read from there, with gradient.
        """

    @abstractmethod
    def null_embedding(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Returns the unconditional condition [...]. If `parameters` contains it, it is read from there, with gradient."""

    def depth_map(self, depth: Tensor) -> Tensor:
        """Converts depth [B, 1, h, w] to the map [B, 1, h, w] that conditions this denoiser; differentiable.

        Raises:
            ValueError: the denoiser's conditions are not depth maps.
        """
        raise ValueError(f"denoiser is a {type(self).__name__}; depth takes one of maps of depth, such as a ConcatUNet")

    @abstractmethod
    def adaptable(self) -> list[str]:
        """Names of the parameters that are updated when the denoiser adapts."""

    def network_to_adapt(self) -> nn.Module:
        """Returns the submodule that holds the adaptable() weights; adapters are inserted here."""
        return self

    def regions(self) -> list[nn.Module]:
        """Submodules to compile separately; those with the same structure can share one compilation. Default: the whole denoiser."""
        return [self]

    def joinable(self) -> list[list[str]]:
        """Returns groups of parameters that one tensor may hold, as its rows: weights that multiply the same input, and their biases.

        The session stores frozen weights that it converts in this form, and passes the tensors, one for each group, to use_joined().
        """
        return []

    def use_joined(self, tensors: list[Tensor]) -> None:
        """Uses the joined tensors in forward(), so that one product replaces many."""
        raise NotImplementedError(f"{type(self).__name__} has joinable() weights and no use_joined()")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the activations: that of the first floating-point parameter that mixed precision converts."""
        converted = (p.dtype for name, p in self.named_parameters() if name not in self.keep_in_float32 and p.is_floating_point())
        return next(converted, torch.float32)

    @abstractmethod
    def forward(self, x_t: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """Predicts from x_t [N, C, h, w], timesteps [N] (rows of `process`) and condition [B, ...]: [N, C or 2C, h, w].

        N is B times the number of rows per image. The rows of an image are contiguous, so whatever depends only on the condition can be
        computed once per image.
        """


def to_model_range(images: Tensor, size: int) -> Tensor:
    """Resizes images in [0, 1] to size x size (bicubic, antialiased) and scales them to [-1, 1]."""
    if images.shape[-2:] != (size, size):
        images = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    return images * 2 - 1


def at_latent_size(maps: Tensor, denoiser: Denoiser) -> Tensor:
    """Resizes maps [B, E, h, w] to the size of the denoiser's latents; each value is the mean of the area that it covers.

    This uses two matrix products because the CUDA gradient of F.interpolate(antialias=True) sums in a nondeterministic order.
    """
    height, width = denoiser.latent_shape[1:]
    if maps.shape[-2:] == (height, width):
        return maps
    rows, columns = (_resizing(old, new, maps.device, maps.dtype) for old, new in zip(maps.shape[-2:], (height, width), strict=True))
    return rows @ maps @ columns.T


@kept
def _resizing(old: int, new: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The matrix [new, old] for bilinear interpolation with antialiasing."""
    unit = torch.eye(old, dtype=torch.float64, device=device)[None, None]
    return F.interpolate(unit, (new, old), mode="bilinear", antialias=True)[0, 0].to(dtype)


def check_vae(vae: Any) -> None:
    """Checks that to_latents() knows how to encode with an autoencoder; None is allowed, for pixel models.

    Raises:
        ValueError: it is of another class than AUTOENCODERS.
    """
    own = getattr(vae, "_orig_mod", vae)  # of a compiled module
    if vae is not None and not {base.__name__ for base in type(own).__mro__} & AUTOENCODERS:
        raise ValueError(f"vae is a {type(vae).__name__}; give one of diffusers': {', '.join(sorted(AUTOENCODERS))}")


def to_latents(vae: Any, images: Tensor, size: int) -> Tensor:
    """Encodes images [B, 3, H, W] in [0, 1] with a diffusers autoencoder, shifted and scaled as for its diffusion model's training.

    An AutoencoderKL gives its posterior's mean. The result is (z - shift_factor) * scaling_factor, as in the pipelines of SD 3 and Flux;
    a config with per-channel statistics gives (z - latents_mean) / latents_std * scaling_factor, as in that of SDXL.
    """
    config, at_once = vae.config, max(1, ENCODED_PIXELS // size**2)  # the encoder's activations are far larger than a denoiser's
    dtype = vae.dtype
    if dtype == torch.float16 and config.get("force_upcast"):  # as SDXL's, which overflows in half precision
        vae = copy.deepcopy(vae).float()
    found = [vae.encode(to_model_range(part, size).to(vae.dtype)) for part in images.split(at_once)]
    latents = torch.cat([_latents(part) for part in found])
    statistics = [config.get(name) for name in ("latents_mean", "latents_std")]
    if None not in statistics:  # the pipelines use them only together
        mean, deviation = (torch.tensor(own, dtype=latents.dtype, device=latents.device).view(1, -1, 1, 1) for own in statistics)
        latents = (latents - mean) / deviation
    return (latents - (config.get("shift_factor") or 0.0)) * config["scaling_factor"]


def _latents(encoded: Any) -> Tensor:
    """Returns the latents that an autoencoder's encode() gave; the libraries' outputs name them differently."""
    if hasattr(encoded, "latent_dist"):
        mean: Tensor = encoded.latent_dist.mean
        return mean
    latents: Tensor = encoded.latents if hasattr(encoded, "latents") else encoded.latent
    return latents


def _widths(vae: Any) -> Any:
    """Returns the encoder's channels by resolution; AutoencoderTiny and AutoencoderDC have another name for them."""
    return vae.config.get("block_out_channels") or vae.config.get("encoder_block_out_channels")


def image_size(vae: Any, latent_size: int) -> int:
    """The image's side length in pixels for a latent of the given side length."""
    size: int = latent_size * 2 ** (len(_widths(vae)) - 1)
    return size
