"""The (timestep, noise) pairs of a batch, which the noising and loss ops take as one argument."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor


class Pairs(NamedTuple):
    """P pairs for each of B latents.

    x0: [B, C, H, W]. table: NoiseProcess.table [T, 5], float32. timesteps: [B, P] int64. image_ids: [B] int64. step: 0-dim int64.
    The noise of pair p is drawn from (seed, step, image_id, pair0 + p) unless `noise` [B, P, C, H, W] is given.
    """

    x0: Tensor
    table: Tensor
    timesteps: Tensor
    image_ids: Tensor
    seed: int
    step: Tensor
    pair0: int = 0
    noise: Tensor | None = None

    def images(self, which: slice) -> Pairs:
        """Selects the pairs of some images."""
        noise = None if self.noise is None else self.noise[which]
        return self._replace(x0=self.x0[which], timesteps=self.timesteps[which], image_ids=self.image_ids[which], noise=noise)

    def chunks(self, size: int) -> Iterator[Pairs]:
        """Splits the pairs into near-equal chunks of at most `size` pairs per image, each with the same noise as here."""
        pairs = self.timesteps.shape[1]
        width = -(-pairs // -(-pairs // size))
        for first in range(0, pairs, width):
            here = slice(first, first + width)
            noise = None if self.noise is None else self.noise[:, here]
            yield self._replace(timesteps=self.timesteps[:, here], noise=noise, pair0=self.pair0 + first)
