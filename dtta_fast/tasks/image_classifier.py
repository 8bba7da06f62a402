"""Classifiers of transformers and torchvision as models that map images to logits, with their own preprocessing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dtta_fast.tasks.transforms import Transform, preset_transforms, processor_transforms, unchanged


class ImageClassifier(nn.Module):
    """Wraps a classifier so that it returns logits [B, K], whatever output type its library uses.

    Attributes:
        transforms: its geometry, and its normalisation.
        pretrained_cfg: the names of its classes, as timm has them; empty if they are not known.
    """

    inner_prefix = "model."  # of the wrapped model's own names
    transforms: tuple[Transform, Transform]
    pretrained_cfg: dict[str, Any]

    def __init__(self, model: nn.Module, processor: Any = None) -> None:
        """processor: a transformers image processor, or the transforms of torchvision's weights. None leaves images as they are."""
        super().__init__()
        self.model = model
        if processor is None:
            self.transforms = unchanged, unchanged
        else:
            self.transforms = preset_transforms(processor) if is_preset(processor) else processor_transforms(processor)
        names = getattr(getattr(model, "config", None), "id2label", None) or {}
        order = sorted(names, key=int if all(str(k).isdecimal() for k in names) else None)  # a config may have them as text
        self.pretrained_cfg = {"label_names": [str(names[k]) for k in order]} if names else {}
        self._named = {"return_dict": True} if is_of_transformers(model) else {}  # whatever its config says
        self.training = model.training

    def get_classifier(self) -> Any:
        """Returns the last layers, as timm's models do; else the last linear layer or convolution."""
        own: Any = self.model
        if hasattr(own, "get_classifier"):
            return own.get_classifier()
        return tuple([part for part in self.model.modules() if isinstance(part, (nn.Linear, nn.Conv2d))][-1:])

    def forward(self, images: Tensor) -> Tensor:
        answer = self.model(images, **self._named)
        if isinstance(answer, Mapping) and "logits" in answer:  # transformers' outputs are mappings
            answer = answer["logits"]
        found: Tensor = answer
        return found


def is_preset(processor: Any) -> bool:
    """Returns whether this is what torchvision's weights.transforms() gives."""
    return all(hasattr(processor, name) for name in ("crop_size", "resize_size", "interpolation", "mean", "std"))


def is_of_transformers(model: nn.Module) -> bool:
    """Returns whether a model is one of transformers', without importing that library."""
    return any(base.__name__ == "PreTrainedModel" and base.__module__.startswith("transformers.") for base in type(model).__mro__)
