"""Which (timestep, noise) pairs an image meets: functions of (seed, image_id, step, pair)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dtta_fast.kernels.philox import MASK, normal, philox, timestep_words

TimestepDraw = Literal["uniform", "stratified", "calibrated"]
CLASS_PAIR = MASK - 1  # the stream of the drawn classes; MASK itself is the timesteps', and neither is a pair of noise


def cumulative_density(proposal: Tensor, low: int, high: int) -> Tensor:
    """Of a density [T] of 0 and more, cut to low <= t < high: [T + 1] int64, 0 .. 2^32, whole so that every backend draws the same.

    Raises:
        ValueError: the density is 0 in all of the range.
    """
    inside = torch.zeros(len(proposal), dtype=torch.float64, device=proposal.device)
    inside[low:high] = proposal[low:high].double()
    if not inside.sum() > 0:
        raise ValueError(f"timestep_range is ({low}, {high}), where the calibrated density is 0; choose another, or None")
    cumulative = torch.cat([inside.new_zeros(1), inside.cumsum(0)])
    return (cumulative / cumulative[-1] * 2**32).round().long()


@dataclass(frozen=True)
class Draws:
    """P pairs an image and step, with timesteps low <= t < high.

    kind: uniform, each pair on its own; stratified, pair i falls into the i-th of P equal parts of the range, so the whole range is
    covered in every step; calibrated, stratified under the density whose cumulative_density() is given. antithetic: pairs 2i and
    2i + 1 share a timestep and have opposite noise. share_noise: an image and step has one noise (and its opposite). common: every
    step has the first one's pairs.
    """

    seed: int
    pairs: int
    kind: TimestepDraw
    low: int
    high: int
    cumulative: Tensor | None = None
    antithetic: bool = False
    share_noise: bool = False
    common: bool = False

    def timesteps(self, image_ids: Tensor, step: Tensor) -> Tensor:
        """image_ids [B] and 0-dim step, int64 both -> timesteps [B, P], int64."""
        drawn = self._timesteps(self.pairs // 2 if self.antithetic else self.pairs, image_ids, self.step(step))
        return drawn.repeat_interleave(2, dim=1) if self.antithetic else drawn

    def _timesteps(self, pairs: int, image_ids: Tensor, step: Tensor) -> Tensor:
        words = timestep_words(pairs, image_ids, self.seed, step)
        pair = torch.arange(pairs, dtype=torch.int64, device=words.device)
        if self.cumulative is not None:
            position = ((pair << 32) + words) // pairs
            return torch.searchsorted(self.cumulative[1:], position, right=True)
        span = self.high - self.low
        if self.kind == "uniform":
            return self.low + ((words * span) >> 32)
        # floor(span · (pair + word / 2³²) / P) in whole numbers, so that every backend agrees
        return self.low + (pair * span + ((words * span) >> 32)) // pairs

    def step(self, step: Tensor) -> Tensor:
        """The step whose noise is drawn."""
        return torch.zeros_like(step) if self.common else step

    def noise(self, x0: Tensor, image_ids: Tensor, step: Tensor) -> Tensor | None:
        """[B, P, C, h, w] where pairs share noise, and None where each has its own, which the ops draw as they go."""
        if not (self.antithetic or self.share_noise):
            return None
        pair = torch.arange(self.pairs, dtype=torch.int64, device=x0.device) // (2 if self.antithetic else 1)
        own = normal(
            x0[0].numel(),
            pair[:1] if self.share_noise else pair,
            image_ids,
            self.seed,
            self.step(step),
            torch.promote_types(x0.dtype, torch.float32),
        )
        signs = 1 - 2 * (torch.arange(self.pairs, dtype=torch.int64, device=x0.device) % 2) if self.antithetic else torch.ones_like(pair)
        return (own * signs[:, None]).unflatten(2, x0.shape[1:])


def class_uniforms(classes: int, image_ids: Tensor, seed: int, step: Tensor) -> Tensor:
    """One number in (0, 1) for each class, [B, K] float64, on a stream of its own."""
    quads = torch.arange((classes + 3) // 4, dtype=torch.int64, device=image_ids.device)
    words = torch.broadcast_tensors(*philox((quads, torch.full_like(quads, CLASS_PAIR), image_ids[:, None], step), seed))
    return (torch.stack(words, dim=-1).flatten(-2)[:, :classes].double() + 0.5) * 2.0**-32
