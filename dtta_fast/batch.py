"""The arguments of a call, and its images as they pass through the engine."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from dtta_fast.inputs import Checks


class Request(NamedTuple):
    """The arguments of a call, with floating-point images [B, 3, H, W].

    deadline: time in seconds on the clock of time.perf_counter(). checks: value checks that are still pending. The other fields are as in
    Adapter.adapt.
    """

    images: Tensor
    image_ids: Tensor
    latents: Tensor | None
    timesteps: Tensor | None
    noise: Tensor | None
    deadline: float | None
    checks: Checks


class Batch(NamedTuple):
    """A batch of B images, one per row of every tensor.

    original: the model's inputs for the unchanged images. matched: its inputs for the matched images; None if the model sees the unchanged
    images. crop: [B, 3, H, W] in [0, 1], the denoiser's view. image_ids: [B]. x0: latents [B, C, h, w], None until they are encoded.
    timesteps [B, steps, P] and noise [B, steps, P, C, h, w]: None if they are drawn. before, start: the source model's outputs [B, ...] for
    the unchanged images, and for the inputs used for adaptation; None if an online state replaces the source model.
    """

    original: Tensor
    matched: Tensor | None
    crop: Tensor
    image_ids: Tensor
    x0: Tensor | None
    timesteps: Tensor | None
    noise: Tensor | None
    before: Tensor | None
    start: Tensor | None

    @property
    def inputs(self) -> Tensor:
        """The model inputs used for adaptation."""
        return self.original if self.matched is None else self.matched

    @property
    def latents(self) -> Tensor:
        """x0, after it has been encoded."""
        assert self.x0 is not None
        return self.x0

    def of(self, rows: Tensor | slice) -> Batch:
        """Selects some of the images."""
        return Batch(*(None if tensor is None else tensor[rows] for tensor in self))  # type: ignore[arg-type]

    def draws(self, step: int) -> list[Tensor | None]:
        """The given timesteps [B, P] and noise [B, P, C, h, w] of a step; None for those that are drawn."""
        return [None if draw is None else draw[:, step] for draw in (self.timesteps, self.noise)]
