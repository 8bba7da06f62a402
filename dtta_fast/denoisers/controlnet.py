"""Stable Diffusion with a ControlNet as a denoiser: segmentation without training a diffusion model for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtta_fast.denoisers.noise_process import NoiseProcess
from dtta_fast.denoisers.reading import download, read_model
from dtta_fast.denoisers.stable_diffusion import StableDiffusion, share_condition
from dtta_fast.runtime.defaults import float32_on_cpu


class ControlNet(StableDiffusion):
    """Predicts from class prompts and an all-zero control image; the task mixes the predictions at every pixel (DUSA, NeurIPS 2024).

    Used for segmentation with objective "noise_mix". Every class costs one forward pass, so keep top_k small (the paper uses 20).

    Args:
        controlnet: a diffusers ControlNetModel, such as one trained on segmentation maps. The other arguments are those of
            StableDiffusion.
    """

    controlnet: Any

    def __init__(self, unet: Any, process: NoiseProcess, vae: Any, text_encoder: Any, tokenizer: Any, controlnet: Any) -> None:
        if controlnet.config.cross_attention_dim != unet.config.cross_attention_dim:
            found = (
                f"controlnet has prompts of {controlnet.config.cross_attention_dim} channels and unet of {unet.config.cross_attention_dim}"
            )
            raise ValueError(f"{found}; give a ControlNet made for this Stable Diffusion")
        super().__init__(unet, process, vae, text_encoder, tokenizer)
        self.controlnet = controlnet
        share_condition(controlnet, "controlnet")

    def networks(self) -> dict[str, Any]:
        return {**super().networks(), "controlnet": self.controlnet}

    def forward(self, x_t: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """Predicts under conditions that are prompts' hidden states [B, tokens, d]; the control image is all zeros."""
        time, prompts = self.process.model_time[timesteps], condition.to(x_t.dtype)
        zeros = x_t.new_zeros(1, self.controlnet.config.conditioning_channels, self.image_size, self.image_size)  # one for all rows
        down, middle = self.controlnet(x_t, time, prompts, zeros, return_dict=False)
        prediction: Tensor = self.unet(
            x_t, time, prompts, down_block_additional_residuals=down, mid_block_additional_residual=middle, return_dict=False
        )[0]
        return prediction

    @classmethod
    @float32_on_cpu()
    def from_pretrained(  # type: ignore[override]
        cls,
        path: str | Path,
        controlnet: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        **keywords: Any,
    ) -> ControlNet:
        """Loads a Stable Diffusion model as StableDiffusion.from_pretrained() does, and a ControlNet from a folder or a Hub model id.

        Args:
            dtype: dtype of both models. keywords: passed to StableDiffusion.from_pretrained().

        Raises:
            FileNotFoundError, ValueError: a part is missing or damaged, or the parts do not match; the message names it.
        """
        from diffusers import ControlNetModel

        plain = StableDiffusion.from_pretrained(path, dtype=dtype, **keywords)
        folder = Path(controlnet)
        if not os.path.isdir(folder):
            folder = download(str(controlnet), ["*.json", "*.safetensors"], argument="controlnet")
        own = read_model(ControlNetModel, folder, use_safetensors=True, torch_dtype=dtype)
        text_encoder, tokenizer = plain.text()
        denoiser = cls(plain.unet, plain.process, plain.vae, text_encoder, tokenizer, own)
        denoiser.calibration = plain.calibration
        return denoiser.eval()
