"""draw_timesteps on the GPU: from Philox words to timesteps in one kernel, in the integer arithmetic of the reference."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dtta_fast.kernels.triton.philox import philox

BLOCK = 128  # pairs per program
VARYING = ["seed", "pairs", "low", "span", "rows"]  # their values do not trigger recompilation
READ = ["image_ids", "step", "cumulative", "timesteps"]  # neither does their alignment
RESERVED = tl.constexpr(0xFFFFFFFF)  # philox.TIMESTEP_PAIR


@triton.jit(
    do_not_specialize=["seed", "pairs", "low", "span", "rows"],
    do_not_specialize_on_alignment=["image_ids", "step", "cumulative", "timesteps"],
)
def draw_timesteps_kernel(
    image_ids, step, cumulative, timesteps, seed, pairs, low, span, rows, STRATIFIED: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Writes the timesteps of BLOCK pairs of an image. BITS: iterations of the search in cumulative [rows + 1]."""
    image = tl.program_id(0)
    pair = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seed = seed.to(tl.int64)
    key0, key1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    quad = (pair // 4).to(tl.uint32)
    zero = quad & 0
    drawn_for, at = tl.load(image_ids + image).to(tl.uint32), tl.load(step).to(tl.uint32)
    w0, w1, w2, w3 = philox(quad, zero + RESERVED, zero + drawn_for, zero + at, key0, key1)
    lane = pair % 4
    word = tl.where(lane == 0, w0, tl.where(lane == 1, w1, tl.where(lane == 2, w2, w3))).to(tl.int64)
    wide, inside = pair.to(tl.int64), pair < pairs
    if cumulative is not None:
        position = ((wide << 32) + word) // pairs
        found, end = tl.zeros_like(wide), tl.zeros_like(wide) + rows
        for _ in range(BITS):  # the number of entries of cumulative[1:] that are at most `position`
            searching = found < end
            middle = (found + end) // 2
            passed = searching & (tl.load(cumulative + 1 + middle, mask=searching & inside, other=0) <= position)
            end = tl.where(searching & ~passed, middle, end)
            found = tl.where(passed, middle + 1, found)
    else:
        found = (word * span) >> 32
        if STRATIFIED:
            found = (wide * span + found) // pairs
        found += low
    tl.store(timesteps + image * pairs + pair, found, mask=inside)


def draw_timesteps(
    image_ids: Tensor, step: Tensor, cumulative: Tensor | None, seed: int, pairs: int, low: int, high: int, stratified: bool
) -> Tensor:
    """Computes reference.draw_timesteps."""
    timesteps = torch.empty((len(image_ids), pairs), dtype=torch.int64, device=image_ids.device)
    rows = 0 if cumulative is None else len(cumulative) - 1
    given = None if cumulative is None else cumulative.contiguous()
    with torch.cuda.device_of(image_ids):
        draw_timesteps_kernel[(len(image_ids), triton.cdiv(pairs, BLOCK))](
            image_ids.contiguous(), step, given, timesteps, seed, pairs, low, high - low, rows, STRATIFIED=stratified,
            BITS=rows.bit_length(), BLOCK=BLOCK, num_warps=4
        )  # fmt: skip
    return timesteps
