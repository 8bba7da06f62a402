"""The common base of denoisers that wrap a network of diffusers: a UNet or a transformer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dtta_fast.denoisers.base import Denoiser, check_vae, image_size, to_latents, to_model_range
from dtta_fast.denoisers.noise_process import NoiseProcess, check_process


class DiffusersDenoiser(Denoiser):
    """A network that can be adapted, in pixel space or in the latent space of an autoencoder, which is never adapted.

    Attributes:
        part: the network's submodule name, as in diffusers' pipelines.
    """

    can_checkpoint = True
    part = "unet"
    unet: Any
    vae: Any

    def __init__(self, network: Any, process: NoiseProcess, vae: Any = None) -> None:
        super().__init__()
        check_vae(vae)
        check_process(process)
        self.add_module(self.part, network)
        self.vae = vae
        self.process = process

    @property
    def network(self) -> Any:
        """The diffusers network."""
        return getattr(self, self.part)

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> DiffusersDenoiser:
        moved: DiffusersDenoiser = super()._apply(fn, *args, **kwargs)
        self.process = self.process.to(self.network.device)  # the table follows the device, not the dtype
        return moved

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encodes images [B, 3, H, W] in [0, 1] to x0: pixels in [-1, 1], or the posterior mean times the scaling factor."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        if self.vae is None:
            return to_model_range(images, self.image_size).to(dtype)
        return to_latents(self.vae, images, self.image_size).to(dtype)

    @property
    def image_size(self) -> int:
        """The side length, in pixels, of the images that the denoiser works on."""
        side: int = self.network.config.sample_size
        return side if self.vae is None else image_size(self.vae, side)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.network.config.sample_size
        return self.network.config.in_channels, side, side

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = self.network.dtype  # diffusers ignores quantised weights here
        return found

    def networks(self) -> dict[str, Any]:
        """Returns the diffusers networks that make a prediction, keyed by their submodule names."""
        return {self.part: self.network}

    @property
    def checkpointing(self) -> bool:
        found: bool = self.network.is_gradient_checkpointing
        return found

    @checkpointing.setter
    def checkpointing(self, wanted: bool) -> None:
        for network in self.networks().values():
            if wanted:
                network.enable_gradient_checkpointing()
            else:
                network.disable_gradient_checkpointing()

    def network_to_adapt(self) -> nn.Module:
        found: nn.Module = self.network
        return found

    def adaptable(self) -> list[str]:
        return [name for name, _ in self.named_parameters() if name.split(".")[0] in self.networks()]
