"""The interface between the engine and a discriminative task."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from dtta_fast.config import AdaptConfig
from dtta_fast.denoisers.base import Denoiser
from dtta_fast.runtime.reads import Checks


class Task(Protocol):
    """Converts images to a model's input, and the model's outputs to a condition and to predictions."""

    @abstractmethod
    def bind(self, model: nn.Module, denoiser: Denoiser) -> tuple[nn.Module, Denoiser]:
        """Returns the model and the denoiser in the form that this task needs, sharing the caller's weights. Called once per session."""

    @abstractmethod
    def crop(self, model: nn.Module, images: Tensor) -> Tensor:
        """Crops images [B, 3, H, W] in [0, 1] to the part that both the model and the denoiser see, still in [0, 1]."""

    @abstractmethod
    def normalise(self, model: nn.Module, crop: Tensor) -> Tensor:
        """Normalises a crop to the model's input."""

    @abstractmethod
    def check(self, outputs: Tensor, denoiser: Denoiser, config: AdaptConfig, checks: Checks) -> None:
        """Raises ValueError if these outputs cannot condition this denoiser under this config. Checks that depend on tensor values go
        through checks.require()."""

    def choose(self, outputs: Tensor, config: AdaptConfig, image_ids: Tensor, step: Tensor) -> Tensor | None:
        """Returns the indices [B, M] of the classes used in a step if the config asks for a subset; None means all classes."""
        return None

    def class_count(self, denoiser: Denoiser) -> int:
        """Returns the number of classes used when no subset is chosen; 1 if the task has no classes."""
        return 1

    @abstractmethod
    def condition(
        self, outputs: Tensor, denoiser: Denoiser, moving: Mapping[str, Tensor], config: AdaptConfig, chosen: Tensor | None = None
    ) -> Tensor:
        """Converts outputs [B, ...] to conditions [B, ...]; differentiable. `moving` holds the denoiser's adapted weights."""

    @abstractmethod
    def decision(self, outputs: Tensor, denoiser: Denoiser) -> Tensor:
        """Returns the condition [B, ...] of the predicted class or map, without gradient."""

    @abstractmethod
    def predict(self, outputs: Tensor, size: tuple[int, int]) -> Tensor:
        """Returns the predictions: the class of each image, or a map at the crop's size (height, width)."""


class ClassTask(Task, Protocol):
    """A task whose outputs are the logits of classes."""

    @abstractmethod
    def class_conditions(
        self, outputs: Tensor, denoiser: Denoiser, moving: Mapping[str, Tensor], config: AdaptConfig, chosen: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Converts outputs [B, ...] to probabilities [B, M] and conditions [B, M, ...] of the M chosen classes; differentiable."""

    @abstractmethod
    def possible(self, outputs: Tensor) -> Tensor:
        """Returns a mask of the classes that may be predicted, of the shape of the outputs [B, K, ...]."""
