"""What segmentation and depth have in common: a model that answers with a map."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dtta_fast.config import AdaptConfig
from dtta_fast.denoisers.base import Denoiser
from dtta_fast.tasks.base import Task
from dtta_fast.tasks.transforms import Transform, processor_transforms, unchanged


class MapModel(nn.Module):
    """A model whose answer is one tensor [B, K, h, w], whatever its library wraps it in."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return as_map(self.model(images))


def as_map(answer: Any) -> Tensor:
    """transformers' outputs (logits, predicted_depth), torchvision's dictionaries ("out") and plain tensors, as [B, K, h, w].

    Raises:
        ValueError: there is no map in it.
    """
    for name in ("logits", "predicted_depth", "out"):
        if isinstance(answer, Mapping) and name in answer:
            answer = answer[name]
        elif hasattr(answer, name):
            answer = getattr(answer, name)
    if isinstance(answer, (tuple, list)) and answer:
        answer = answer[0]
    if not isinstance(answer, Tensor) or not answer.is_floating_point() or answer.ndim not in (3, 4):
        found = f"shape {tuple(answer.shape)}" if isinstance(answer, Tensor) else f"a {type(answer).__name__}"
        raise ValueError(f"model returns {found}; give one that returns a floating-point map [B, K, h, w], or [B, h, w] for depth")
    return answer if answer.ndim == 4 else answer[:, None]


class DenseTask(Task):
    """The input's way to a model of maps.

    Size, crop and normalisation come from the model's image processor. Without one a model gets the images as they are, in [0, 1], unless
    transforms are given.

    Args:
        processor: a transformers image processor.
        crop: images [B, 3, H, W] in [0, 1] to what model and denoiser look at;
        normalise: a crop to the model's input; either takes the place of the processor's.
    """

    def __init__(self, processor: Any = None, *, crop: Transform | None = None, normalise: Transform | None = None) -> None:
        own = (unchanged, unchanged) if processor is None else processor_transforms(processor)
        self._crop, self._normalise = crop or own[0], normalise or own[1]

    def bind(self, model: nn.Module, denoiser: Denoiser) -> tuple[nn.Module, Denoiser]:
        return model if isinstance(model, MapModel) else MapModel(model), denoiser

    def crop(self, model: nn.Module, images: Tensor) -> Tensor:
        return self._crop(images)

    def normalise(self, model: nn.Module, crop: Tensor) -> Tensor:
        return self._normalise(crop)


def check_maps(task: str, config: AdaptConfig, unsupported: Mapping[str, Any]) -> None:
    """Raises ValueError where the config asks for what a task of maps does not have; unsupported: fields with the values that it has."""
    if config.precheck == "answer":
        raise ValueError("precheck is 'answer', and hardly two maps are the same: use 'statistics', or 'off'")
    for field, allowed in {"method": "adapt", "drawn_classes": 0, "null_condition": False, **unsupported}.items():
        value = getattr(config, field)
        if value != allowed:
            raise ValueError(f"{field} is {value!r}, which {task} has no meaning for; leave it at {allowed!r}")


def resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps [B, K, h, w] at an image's size, as the models' own libraries resize theirs: bilinear."""
    return maps if tuple(maps.shape[-2:]) == tuple(size) else F.interpolate(maps, size, mode="bilinear", align_corners=False)
