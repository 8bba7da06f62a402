"""Which timesteps an image is noised at: a function of (seed, image_id, step, pair), like the noise itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dtta_fast.kernels.philox import timestep_words

TimestepDraw = Literal["uniform", "stratified"]


@dataclass(frozen=True)
class Draws:
    """P timesteps an image and step, low <= t < high.

    uniform: each pair on its own. stratified: pair i falls into the i-th of P equal parts of the range, so the whole range is
    covered in every step.
    """

    seed: int
    pairs: int
    kind: TimestepDraw
    low: int
    high: int

    def timesteps(self, image_ids: Tensor, step: Tensor) -> Tensor:
        """image_ids [B] and 0-dim step, int64 both -> timesteps [B, P], int64."""
        words = timestep_words(self.pairs, image_ids, self.seed, step)
        span = self.high - self.low
        if self.kind == "uniform":
            return self.low + ((words * span) >> 32)
        # floor(span · (pair + word / 2³²) / P) in whole numbers, so that every backend agrees
        pair = torch.arange(self.pairs, device=words.device)
        return self.low + (pair * span + ((words * span) >> 32)) // self.pairs
