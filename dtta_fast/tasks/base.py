"""What the engine asks of a discriminative task."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from dtta_fast.config import AdaptConfig
from dtta_fast.denoisers.base import Denoiser
from dtta_fast.inputs import Checks


class Task(Protocol):
    """The way from images to a model's input, and from its outputs to a condition and to an answer."""

    @abstractmethod
    def bind(self, model: nn.Module, denoiser: Denoiser) -> tuple[nn.Module, Denoiser]:
        """Model and denoiser as this task takes them, on the caller's own weights; once a session."""

    @abstractmethod
    def crop(self, model: nn.Module, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] to what the model and the denoiser both look at, still in [0, 1]."""

    @abstractmethod
    def normalise(self, model: nn.Module, crop: Tensor) -> Tensor:
        """A crop to the model's input."""

    @abstractmethod
    def check(self, outputs: Tensor, denoiser: Denoiser, config: AdaptConfig, checks: Checks) -> None:
        """Raises ValueError where these outputs cannot condition this denoiser under this config; what depends on values goes to
        checks.require()."""

    @abstractmethod
    def choose(self, outputs: Tensor, config: AdaptConfig, image_ids: Tensor, step: Tensor) -> Tensor | None:
        """The classes [B, M] that take part in a step, by number, where the config asks for fewer than all; None is all."""

    @abstractmethod
    def class_count(self, denoiser: Denoiser) -> int:
        """How many classes take part where none are chosen; 1 where a map is no class's."""

    @abstractmethod
    def condition(
        self, outputs: Tensor, denoiser: Denoiser, moving: Mapping[str, Tensor], config: AdaptConfig, chosen: Tensor | None = None
    ) -> Tensor:
        """Outputs [B, ...] to conditions [B, ...], differentiable; `moving` holds the denoiser's adapted weights."""

    @abstractmethod
    def class_conditions(
        self, outputs: Tensor, denoiser: Denoiser, moving: Mapping[str, Tensor], config: AdaptConfig, chosen: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Outputs [B, ...] to probabilities [B, M] and the conditions [B, M, ...] of the M chosen classes, differentiable."""

    @abstractmethod
    def decision(self, outputs: Tensor, denoiser: Denoiser) -> Tensor:
        """The condition of the prediction taken, [B, ...], without gradient."""

    @abstractmethod
    def predict(self, outputs: Tensor, size: tuple[int, int]) -> Tensor:
        """What the user wants: the class of each image, or a map at the crop's size (height, width)."""
