"""The request that a call makes, and its images on their way through the engine."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from dtta_fast.inputs import Checks


class Request(NamedTuple):
    """The arguments of a call, its images [B, 3, H, W] in floating point.

    deadline: in seconds of time.perf_counter(). checks: checks of values that are still to be made. The other fields are Adapter.adapt's.
    """

    images: Tensor
    image_ids: Tensor
    latents: Tensor | None
    timesteps: Tensor | None
    noise: Tensor | None
    deadline: float | None
    checks: Checks


class Batch(NamedTuple):
    """B images, one in each row of every tensor.

    original: the model's inputs for the images as they are. matched: its inputs for the matched images; None where it sees the images as
    they are. crop: [B, 3, H, W] in [0, 1], what the denoiser looks at. image_ids: [B]. x0: latents [B, C, h, w], None until they are
    encoded. timesteps [B, steps, P] and noise [B, steps, P, C, h, w]: None where they are drawn. before, start: the source model's outputs
    [B, ...] for the images as they are, and for the inputs that are adapted to; None where an online state takes its place.
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
        """The model's inputs that are adapted to."""
        return self.original if self.matched is None else self.matched

    @property
    def latents(self) -> Tensor:
        """x0, once it is encoded."""
        assert self.x0 is not None
        return self.x0

    def of(self, rows: Tensor | slice) -> Batch:
        """Selects some of the images."""
        return Batch(*(None if tensor is None else tensor[rows] for tensor in self))  # type: ignore[arg-type]

    def draws(self, step: int) -> list[Tensor | None]:
        """The given timesteps [B, P] and noise [B, P, C, h, w] of a step."""
        return [None if draw is None else draw[:, step] for draw in (self.timesteps, self.noise)]
