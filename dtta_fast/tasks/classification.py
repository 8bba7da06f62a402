"""Image classification: softmax(logits) mixes the denoiser's class embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from dtta_fast.config import AdaptConfig
from dtta_fast.denoisers.base import Denoiser
from dtta_fast.kernels import mix_condition

Transform = Callable[[Tensor], Tensor]


class Classification:
    """For any module that maps images to logits [B, K].

    Size, crop and normalisation come from the model's own timm config. A module without one gets the images as they are,
    in [0, 1], unless transforms are given.

    Args:
        crop: images [B, 3, H, W] in [0, 1] to what model and denoiser look at. normalise: a crop to the model's input.
    """

    def __init__(self, *, crop: Transform | None = None, normalise: Transform | None = None) -> None:
        self._crop = crop
        self._normalise = normalise

    def crop(self, model: nn.Module, images: Tensor) -> Tensor:
        return (self._crop or _timm_transforms(model)[0])(images)

    def normalise(self, model: nn.Module, crop: Tensor) -> Tensor:
        return (self._normalise or _timm_transforms(model)[1])(crop)

    def check(self, outputs: Tensor, denoiser: Denoiser, config: AdaptConfig) -> None:
        """Raises ValueError where outputs are no logits [B, K], or K or top_k does not fit the denoiser's table."""
        if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
            raise ValueError(f"model returns a {type(outputs).__name__}; a classifier returns floating-point logits [B, K]")
        if outputs.ndim != 2:
            raise ValueError(f"model returns shape {tuple(outputs.shape)}; a classifier returns logits [B, K]")
        classes = len(denoiser.class_embeddings({}))
        if outputs.shape[1] != classes:
            raise ValueError(f"model has {outputs.shape[1]} classes and denoiser has embeddings for {classes}; both need the same classes")
        if config.top_k is not None and config.top_k > classes:
            raise ValueError(f"top_k is {config.top_k}, and there are {classes} classes")

    def condition(self, outputs: Tensor, denoiser: Denoiser, moving: Mapping[str, Tensor], config: AdaptConfig) -> Tensor:
        table = denoiser.class_embeddings(moving)
        # where the denoiser adapts with weights of its own for each image: a table an image
        per_image = table.ndim > denoiser.class_embeddings({}).ndim
        return mix_condition(outputs, table, config.top_k, config.logit_scale, per_image)

    def decision(self, outputs: Tensor, denoiser: Denoiser) -> Tensor:
        return denoiser.class_embeddings({})[self.predict(outputs)]

    def predict(self, outputs: Tensor) -> Tensor:
        return outputs.argmax(dim=1)


def _unchanged(images: Tensor) -> Tensor:
    return images


def _timm_transforms(model: nn.Module) -> tuple[Transform, Transform]:
    """timm's own evaluation transform for the model, cut in two: geometry, and normalisation."""
    if not getattr(model, "pretrained_cfg", None):
        return _unchanged, _unchanged
    from timm.data import create_transform, resolve_model_data_config

    config = resolve_model_data_config(model)
    *geometry, _to_tensor, normalise = create_transform(**config, is_training=False).transforms

    def crop(images: Tensor) -> Tensor:
        if images.shape[-2:] == tuple(config["input_size"][1:]):  # ImageNet-C is cropped already: resizing it again costs accuracy
            return images
        for transform in geometry:
            images = transform(images)
        return images.clamp(0, 1)  # bicubic overshoots

    return crop, normalise
