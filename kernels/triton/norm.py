"""gated_norm on the GPU, forward and backward: what lies between the products of a DiT block, in one pass over the tokens each way.

A program holds the modulation of one row and works through some of its tokens, one after the other. The gradient of the modulation is
summed over the tokens of a program in registers, and over the programs in a fixed order by a second kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

THREAD = 8  # numbers per thread: 16 bytes of a 16-bit type
PROGRAMS = 512  # programs that fill a GPU: 4 on each of 128 multiprocessors. Only with more tokens than that does one take several
MOST = 16  # tokens per program
PARTS = 8  # partial sums that a program of the second kernel loads at once
WIDTH = 512  # numbers per program of the second kernel, 16 bytes per thread
SUM_WARPS = WIDTH // (THREAD * (64 if torch.version.hip else 32))


@triton.jit(do_not_specialize=["tokens", "group"])
def gated_norm_kernel(
    x, branch, modulation, total, normed, mean, rstd, tokens, group, numbers, stride, eps, BLOCK: tl.constexpr
):  # fmt: skip
    """Writes total = x + gate · branch and normed = LN(total) · (1 + scale) + shift of `group` tokens, and LN's statistics."""
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * group
    here = tl.arange(0, BLOCK)
    inside = here < numbers
    own = modulation + row * stride + here
    if branch is not None:
        gate = tl.load(own, mask=inside, other=0.0).to(tl.float32)
        own += numbers
    shift = tl.load(own, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 + tl.load(own + numbers, mask=inside, other=0.0).to(tl.float32)
    for token in range(first, tl.minimum(first + group, tokens)):
        at = (row * tokens + token) * numbers + here
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if branch is not None:
            value += gate * tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
            rounded = value.to(total.dtype.element_ty)
            tl.store(total + at, rounded, mask=inside)
            value = rounded.to(tl.float32)  # the backward reads it too
        middle = tl.sum(value) / numbers
        centred = tl.where(inside, value - middle, 0.0)
        inverse = tl.rsqrt(tl.sum(centred * centred) / numbers + eps)
        tl.store(normed + at, (centred * inverse * scale + shift).to(normed.dtype.element_ty), mask=inside)
        if mean is not None:
            tl.store(mean + row * tokens + token, middle)
            tl.store(rstd + row * tokens + token, inverse)


@triton.jit(do_not_specialize=["tokens", "group"])
def gated_norm_backward_kernel(
    to_total, to_normed, total, branch, modulation, mean, rstd, to_x, to_branch, partial, tokens, group, numbers, stride,
    BLOCK: tl.constexpr
):  # fmt: skip
    """Writes the gradients of x and the branch for `group` tokens, and their sums for the modulation to partial [rows, programs, ..]."""
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * group
    here = tl.arange(0, BLOCK)
    inside = here < numbers
    own = modulation + row * stride + here
    sums = partial + (row * tl.num_programs(1) + tl.program_id(1)) * (3 if branch is not None else 2) * numbers + here
    to_gate = tl.zeros((BLOCK,), tl.float32)
    to_shift = tl.zeros((BLOCK,), tl.float32)
    to_scale = tl.zeros((BLOCK,), tl.float32)
    if branch is not None:
        gate = tl.load(own, mask=inside, other=0.0).to(tl.float32)
        own += numbers
    scale = 1.0 + tl.load(own + numbers, mask=inside, other=0.0).to(tl.float32)
    for token in range(first, tl.minimum(first + group, tokens)):
        at = (row * tokens + token) * numbers + here
        inverse = tl.load(rstd + row * tokens + token)
        value = tl.load(total + at, mask=inside, other=0.0).to(tl.float32)
        slope = tl.load(to_normed + at, mask=inside, other=0.0).to(tl.float32)
        unit = tl.where(inside, (value - tl.load(mean + row * tokens + token)) * inverse, 0.0)
        to_shift += slope
        to_scale += slope * unit
        slope *= scale
        along, level = tl.sum(slope * unit) / numbers, tl.sum(slope) / numbers
        slope = (slope - level - unit * along) * inverse
        if to_total is not None:
            slope += tl.load(to_total + at, mask=inside, other=0.0).to(tl.float32)
        if to_x is not None:
            tl.store(to_x + at, slope.to(to_x.dtype.element_ty), mask=inside)
        if branch is not None:
            to_gate += slope * tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(to_branch + at, (slope * gate).to(to_branch.dtype.element_ty), mask=inside)
    if branch is not None:
        tl.store(sums, to_gate, mask=inside)
        sums += numbers
    tl.store(sums, to_shift, mask=inside)
    tl.store(sums + numbers, to_scale, mask=inside)


@triton.jit(do_not_specialize=["parts"])
def modulation_sum_kernel(partial, to_modulation, parts, numbers, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    """Second stage: to_modulation [rows, numbers] = Σ partial [rows, parts, numbers] over the parts, in a fixed order."""
    row = tl.program_id(0).to(tl.int64)
    here = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = here < numbers
    sums = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        at = (row * parts + part)[:, None] * numbers + here[None, :]
        sums += tl.sum(tl.load(partial + at, mask=(part < parts)[:, None] & inside[None, :], other=0.0), axis=0)
    tl.store(to_modulation + row * numbers + here, sums.to(to_modulation.dtype.element_ty), mask=inside)


def _split(rows: int, tokens: int) -> tuple[int, tuple[int, int]]:
    """Returns the tokens per program and the grid."""
    group = max(1, min(MOST, rows * tokens // PROGRAMS))
    return group, (rows, triton.cdiv(tokens, group))


def width(numbers: int) -> int:
    """Returns the BLOCK for tokens [numbers]."""
    return int(triton.next_power_of_2(numbers))


def threads(numbers: int) -> int:
    """Returns the threads of a program for tokens [numbers]."""
    return min(1024, max(32, width(numbers) // THREAD))


def _sizes(numbers: int) -> dict[str, int]:
    return {"BLOCK": width(numbers), "num_warps": max(1, threads(numbers) // (64 if torch.version.hip else 32))}


def gated_norm(
    x: Tensor, branch: Tensor | None, modulation: Tensor, eps: float, with_statistics: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Computes reference.gated_norm, and LN's mean and 1 / standard deviation [N, T], for tensors of one type of 32 or 16 bits.

    x and branch are contiguous; the modulation's rows may be a slice of longer ones.
    """
    rows, tokens, numbers = x.shape
    normed, total = torch.empty_like(x), x if branch is None else torch.empty_like(x)
    mean = torch.empty((rows, tokens), dtype=torch.float32, device=x.device) if with_statistics else None
    rstd = None if mean is None else torch.empty_like(mean)
    group, grid = _split(rows, tokens)
    with torch.cuda.device_of(x):
        gated_norm_kernel[grid](
            x, branch, modulation, None if branch is None else total, normed, mean, rstd, tokens, group, numbers, modulation.stride(0), eps,
            **_sizes(numbers)
        )  # fmt: skip
    return total, normed, mean, rstd


def gated_norm_backward(
    to_total: Tensor | None,
    to_normed: Tensor,
    total: Tensor,
    branch: Tensor | None,
    modulation: Tensor,
    mean: Tensor,
    rstd: Tensor,
    with_x: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Computes the gradients of reference.gated_norm for contiguous tensors of one type of 32 or 16 bits; without a branch, total is x."""
    rows, tokens, numbers = total.shape
    to_x, to_branch = torch.empty_like(total) if with_x else None, None if branch is None else torch.empty_like(total)
    group, grid = _split(rows, tokens)
    width = (2 if branch is None else 3) * numbers
    partial = torch.empty((rows, grid[1], width), dtype=torch.float32, device=total.device)
    to_modulation = torch.empty((rows, width), dtype=modulation.dtype, device=total.device)
    with torch.cuda.device_of(total):
        gated_norm_backward_kernel[grid](
            to_total, to_normed, total, branch, modulation, mean, rstd, to_x, to_branch, partial, tokens, group, numbers,
            modulation.stride(0), **_sizes(numbers)
        )  # fmt: skip
        modulation_sum_kernel[(rows, triton.cdiv(width, WIDTH))](
            partial, to_modulation, grid[1], width, PARTS=PARTS, WIDTH=WIDTH, num_warps=SUM_WARPS
        )
    return to_x, to_branch, to_modulation
