"""Code shared by segmentation and depth, whose models return a map."""

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
    """Wraps a model so that it returns a single tensor [B, K, h, w], whatever output type its library uses."""

    inner_prefix = "model."  # of the wrapped model's own names

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return as_map(self.model(images))


def as_map(answer: Any) -> Tensor:
    """Converts transformers outputs (logits, predicted_depth), torchvision dictionaries ("out") and plain tensors to [B, K, h, w].

    Raises:
        ValueError: the output contains no map.
    """
    for name in ("logits", "predicted_depth", "out"):
        if isinstance(answer, Mapping) and name in answer:
            answer = answer[name]
        elif hasattr(answer, name):
            answer = getattr(answer, name)
    if hasattr(answer, "class_queries_logits"):  # Mask2Former, MaskFormer, OneFormer
        raise ValueError(
            f"model returns a {type(answer).__name__}, whose masks belong to queries and not to classes; give a model with logits for "
            "every pixel, such as SegFormer or UperNet"
        )
    if isinstance(answer, (tuple, list)) and answer:
        answer = answer[0]
    if not isinstance(answer, Tensor) or not answer.is_floating_point() or answer.ndim not in (3, 4):
        found = f"shape {tuple(answer.shape)}" if isinstance(answer, Tensor) else f"a {type(answer).__name__}"
        raise ValueError(f"model returns {found}; give one that returns a floating-point map [B, K, h, w], or [B, h, w] for depth")
    return answer if answer.ndim == 4 else answer[:, None]


class DenseTask(Task):
    """Prepares the input of a model that returns maps.

    Size, crop and normalisation come from the model's image processor. Without a processor, the model gets the images unchanged, in
    [0, 1], unless transforms are given.

    Args:
        processor: a transformers image processor.
        crop: maps images [B, 3, H, W] in [0, 1] to the crop that the model and the denoiser see; overrides the processor's.
        normalise: maps a crop to the model's input; overrides the processor's.
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
    """Raises ValueError if the config uses a setting that does not apply to a map task.

    `unsupported` holds the task's own fields of this kind, each with the only value allowed.
    """
    if config.precheck == "answer":
        raise ValueError("precheck is 'answer', which compares class answers; for maps, use config=presets.DENSE, or precheck='off'")
    for field, allowed in {"method": "adapt", "drawn_classes": 0, "null_condition": False, **unsupported}.items():
        value = getattr(config, field)
        if value != allowed:
            raise ValueError(f"{field} is {value!r}, which {task} has no meaning for; leave it at {allowed!r}")


def resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes maps [B, K, h, w] to an image's size bilinearly, as the models' own libraries do."""
    return maps if tuple(maps.shape[-2:]) == tuple(size) else F.interpolate(maps, size, mode="bilinear", align_corners=False)
