"""Draws the (timestep, noise) pairs of each image as functions of (seed, image_id, step, pair)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dtta_fast.config import TimestepDraw
from dtta_fast.kernels import draw_timesteps
from dtta_fast.kernels.philox import normal


def cumulative_density(proposal: Tensor, low: int, high: int) -> Tensor:
    """Cumulative distribution [T + 1] of a density [T] >= 0 restricted to low <= t < high, as int64 from 0 to 2^32.

    The values are integers so that every backend draws the same timesteps.

    Raises:
        ValueError: the density is 0 in the whole range.
    """
    inside = torch.zeros(len(proposal), dtype=torch.float64, device=proposal.device)
    inside[low:high] = proposal[low:high].double()
    if not inside.sum() > 0:
        raise ValueError(f"timestep_range is ({low}, {high}), where the calibrated density is 0; choose another, or None")
    cumulative = torch.cat([inside.new_zeros(1), inside.cumsum(0)])
    return (cumulative / cumulative[-1] * 2**32).round().long()


@dataclass(frozen=True)
class Draws:
    """P pairs per image and step, with timesteps low <= t < high.

    kind: "uniform" draws each pair independently; "stratified" draws pair i from the i-th of P equal parts of the range, so every step
    covers the whole range; "calibrated" stratifies under the density whose cumulative_density() is given. antithetic: pairs 2i and
    2i + 1 share a timestep and have opposite noise. share_noise: all pairs of an image and step share one noise (and its opposite).
    common: every step uses the pairs of the first step.
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
        """Draws timesteps [B, P], int64, for image_ids [B] and a 0-dim step, both int64."""
        pairs, cumulative = self.pairs // 2 if self.antithetic else self.pairs, self.cumulative
        given = (image_ids, self.step(step), cumulative, self.seed, pairs, self.low, self.high, self.kind != "uniform")
        drawn = draw_timesteps(*given)
        return drawn.repeat_interleave(2, dim=1) if self.antithetic else drawn

    def step(self, step: Tensor) -> Tensor:
        """The step index used for the draws: 0 if all steps share their pairs."""
        return torch.zeros_like(step) if self.common else step

    def noise(self, x0: Tensor, image_ids: Tensor, step: Tensor) -> Tensor | None:
        """Noise [B, P, C, h, w] if pairs share noise; None if each pair has its own, which the ops draw on the fly."""
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
