"""Philox4x32-10 (Salmon et al., SC 2011) and normals derived from it, in plain torch: noise as a function of its coordinates.

The counter is (element // 4, pair, image_id, step) and the key is the 64-bit seed. Every backend generates bit-identical words. The pair
index 2³² − 1 is reserved for the timesteps, so they never share words with the noise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF
CLASS_PAIR = MASK - 1  # random stream of the drawn classes; MASK is that of the timesteps, and neither is used as a noise pair
TIMESTEP_PAIR = MASK


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Generates four 32-bit words for each counter.

    Args:
        counter: four broadcastable int64 tensors of 32-bit words. seed: the 64-bit key, split with its low word first.

    Returns:
        Four int64 tensors with values 0 .. 2³² − 1.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & MASK, seed >> 32
    for _ in range(ROUNDS):
        # int64 products wrap, but all 64 bits are kept, so mask after the shift.
        p0, p1 = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = ((p1 >> 32) & MASK) ^ c1 ^ k0, p1 & MASK, ((p0 >> 32) & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def normal(elements: int, pairs: Tensor, image_ids: Tensor, seed: int, step: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Generates standard normals [B, P, elements], float32 or float64, for pairs [P], image_ids [B] and a 0-dim step (all int64).

    Applies Box-Muller to the uniforms (w + ½) / 2³² of words (0, 1) and (2, 3); element e is lane e % 4 of counter e // 4.
    """
    quads = torch.arange((elements + 3) // 4, dtype=torch.int64, device=pairs.device)
    words = torch.broadcast_tensors(*philox((quads, pairs[:, None], image_ids[:, None, None], step), seed))
    u0, u1, u2, u3 = (word.to(dtype) * 2.0**-32 + 2.0**-33 for word in words)
    lanes = []
    for radius_word, angle_word in ((u0, u1), (u2, u3)):
        radius, angle = (-2 * radius_word.log()).sqrt(), (2 * math.pi) * angle_word
        lanes += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(lanes, dim=-1).flatten(-2)[..., :elements]


def timestep_words(pairs: int, image_ids: Tensor, seed: int, step: Tensor) -> Tensor:
    """Generates one word per pair, [B, P], from the stream reserved for timesteps."""
    quads = torch.arange((pairs + 3) // 4, dtype=torch.int64, device=image_ids.device)
    reserved = torch.full_like(quads, TIMESTEP_PAIR)
    words = torch.broadcast_tensors(*philox((quads, reserved, image_ids[:, None], step), seed))
    return torch.stack(words, dim=-1).flatten(-2)[:, :pairs]


def class_uniforms(classes: int, image_ids: Tensor, seed: int, step: Tensor) -> Tensor:
    """Draws one uniform number in (0, 1) per class, [B, K] float64, from a separate random stream."""
    quads = torch.arange((classes + 3) // 4, dtype=torch.int64, device=image_ids.device)
    words = torch.broadcast_tensors(*philox((quads, torch.full_like(quads, CLASS_PAIR), image_ids[:, None], step), seed))
    return (torch.stack(words, dim=-1).flatten(-2)[:, :classes].double() + 0.5) * 2.0**-32
