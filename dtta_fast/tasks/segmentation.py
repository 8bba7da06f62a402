"""Semantic segmentation: at every pixel, softmax(logits) mixes the denoiser's class embeddings."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dtta_fast.config import AdaptConfig
from dtta_fast.denoisers.base import Denoiser, at_latent_size
from dtta_fast.runtime.reads import Checks
from dtta_fast.tasks.base import ClassTask
from dtta_fast.tasks.classification import scaled
from dtta_fast.tasks.dense import DenseTask, check_maps, resized


class Segmentation(DenseTask, ClassTask):
    """Segmentation with modules that return logits [B, K, h, w] of any size, as in transformers (SegFormer), segmentation_models_pytorch
    and torchvision.

    A denoiser that takes maps (ConcatUNet) is conditioned on the map of mixed class embeddings. A denoiser that takes prompts (ControlNet)
    predicts once per class, and the predictions are mixed at every pixel: objective "noise_mix", with top_k classes per image.
    Predictions are labels [B, H, W] at the crop's size.
    """

    def check(self, outputs: Tensor, denoiser: Denoiser, config: AdaptConfig, checks: Checks) -> None:
        """Raises ValueError if outputs are not logits of the denoiser's classes, or if the config uses a setting that does not apply."""
        classes = len(denoiser.class_embeddings({}))
        if outputs.ndim != 4 or outputs.shape[1] != classes:
            raise ValueError(
                f"model returns shape {tuple(outputs.shape)} and denoiser has embeddings for {classes} classes; both need the same"
            )
        check_maps("segmentation", config, {} if denoiser.takes_maps else {"guard": 0})
        wanted = "embedding_mix" if denoiser.takes_maps else "noise_mix"
        if config.objective != wanted:
            kind = "maps" if denoiser.takes_maps else "prompts"
            raise ValueError(f"objective is {config.objective!r}, and the denoiser takes {kind}: use {wanted!r}")
        if denoiser.takes_maps and config.top_k is not None:
            raise ValueError(f"top_k is {config.top_k}; a map's embedding costs the same for all classes: leave it out")

    def choose(self, outputs: Tensor, config: AdaptConfig, image_ids: Tensor, step: Tensor) -> Tensor | None:
        """Returns the top_k classes that cover the most of each image."""
        if config.top_k is None:
            return None
        return outputs.detach().softmax(1).mean((2, 3)).topk(config.top_k, dim=1).indices

    def class_count(self, denoiser: Denoiser) -> int:
        return len(denoiser.class_embeddings({}))

    def condition(
        self, outputs: Tensor, denoiser: Denoiser, moving: Mapping[str, Tensor], config: AdaptConfig, chosen: Tensor | None = None
    ) -> Tensor:
        if not denoiser.takes_maps:  # for the memory plan; all prompts' conditions have the same size
            return denoiser.class_embeddings(moving)[outputs.mean((2, 3)).argmax(1)]
        return _mixed(scaled(outputs, config.logit_scale).softmax(1), denoiser, denoiser.class_embeddings(moving))

    def class_conditions(
        self, outputs: Tensor, denoiser: Denoiser, moving: Mapping[str, Tensor], config: AdaptConfig, chosen: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Returns probabilities [B, M, h, w] at the latent's size, and the classes' conditions."""
        table = denoiser.class_embeddings(moving)
        if chosen is None:
            chosen = torch.arange(outputs.shape[1], dtype=torch.int64, device=outputs.device).expand(len(outputs), -1)
        picked = chosen[:, :, None, None].expand(-1, -1, *outputs.shape[2:])
        shares = scaled(outputs, config.logit_scale).gather(1, picked).softmax(1)
        return at_latent_size(shares, denoiser), table[chosen]

    def possible(self, outputs: Tensor) -> Tensor:
        return torch.ones_like(outputs, dtype=torch.bool)

    def decision(self, outputs: Tensor, denoiser: Denoiser) -> Tensor:
        table = denoiser.class_embeddings({})
        one_hot = torch.zeros_like(outputs, dtype=table.dtype).scatter(1, outputs.argmax(1, keepdim=True), 1.0)  # F.one_hot reads values
        return _mixed(one_hot, denoiser, table)

    def predict(self, outputs: Tensor, size: tuple[int, int]) -> Tensor:
        return resized(outputs, size).argmax(1)


def _mixed(shares: Tensor, denoiser: Denoiser, table: Tensor) -> Tensor:
    """Mixes a table [K, E], or one table per image [B, K, E], by shares [B, K, h, w] to a map [B, E, h, w] at the latent's size."""
    maps = torch.einsum("bkhw,bke->behw" if table.ndim == 3 else "bkhw,ke->behw", shares.to(table.dtype), table)
    return at_latent_size(maps, denoiser)
