"""Monocular depth: the depth map is the condition."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dtta_fast.config import AdaptConfig
from dtta_fast.denoisers.base import Denoiser, at_latent_size
from dtta_fast.runtime.reads import Checks
from dtta_fast.tasks.dense import DenseTask, check_maps, resized


class Depth(DenseTask):
    """Depth with modules that return [B, h, w] or [B, 1, h, w]: transformers' depth estimators, or a Unet with one output channel.

    The map is normalised as in the denoiser's training: the logarithm of metres, or, for relative depth, mean 0 and standard deviation 1
    per image. Predictions are depth [B, H, W] at the crop's size, in the model's unit.
    """

    def check(self, outputs: Tensor, denoiser: Denoiser, config: AdaptConfig, checks: Checks) -> None:
        """Raises ValueError if outputs are not depth or not finite, or if the config uses a setting that does not apply to depth."""
        if outputs.ndim != 4 or outputs.shape[1] != 1:
            raise ValueError(f"model returns shape {tuple(outputs.shape)}; a depth model returns [B, h, w] or [B, 1, h, w]")
        check_maps("depth", config, {"objective": "embedding_mix", "top_k": None, "logit_scale": None})
        checks.require(outputs.isfinite().all(), lambda: "model returns depth that holds NaN or infinity")
        denoiser.depth_map(outputs[:1])

    def condition(
        self, outputs: Tensor, denoiser: Denoiser, moving: Mapping[str, Tensor], config: AdaptConfig, chosen: Tensor | None = None
    ) -> Tensor:
        return self.decision(outputs, denoiser)

    def decision(self, outputs: Tensor, denoiser: Denoiser) -> Tensor:
        maps = denoiser.depth_map(outputs.to(torch.promote_types(outputs.dtype, torch.float32)))
        return at_latent_size(maps, denoiser)

    def predict(self, outputs: Tensor, size: tuple[int, int]) -> Tensor:
        return resized(outputs, size)[:, 0]
