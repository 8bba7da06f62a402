"""add_noise and denoising_loss on the GPU: kernels generate the noise and regenerate it whenever it is needed again.

Each program processes WIDTH elements of one (image, pair) row, or for the loss of a small latent all of them. A timestep outside the table
yields NaN and never an out-of-bounds read, because a check on the host would have to wait for the GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dtta_fast.kernels.pairs import Pairs
from dtta_fast.kernels.triton.philox import normals

WIDTH = 1024
THREADS = 128  # per program: 8 elements per thread, which is 16 bytes of a 16-bit type
WHOLE = 4096  # elements of a latent, 4x32x32, whose loss one program computes: another kernel would take longer than it
WARPS = THREADS // (64 if torch.version.hip else 32)
VARYING = ["table_rows", "pairs", "seed", "pair0"]  # their values do not trigger recompilation, except when they grow from 32 to 64 bits
SLICED = ["timesteps", "image_ids", "step", "upstream"]  # read one by one: their alignment does not trigger recompilation either


@triton.jit
def _coefficient(table, timestep, table_rows, column: tl.constexpr):
    known = (timestep >= 0) & (timestep < table_rows)
    return tl.load(table + tl.where(known, timestep, 0) * 5 + column, mask=known, other=float("nan"))


@triton.jit
def _draw(row, first, here, inside, image_ids, step, noise, pairs, elements, seed, pair0, WIDTH: tl.constexpr, VECTOR: tl.constexpr):
    """Returns the noise [WIDTH] of a row: read from `noise` if given, otherwise generated."""
    if noise is None:
        pair, image = pair0 + row % pairs, tl.load(image_ids + row // pairs)
        drawn = normals(first, pair, image, tl.load(step), seed.to(tl.int64), WIDTH, VECTOR)
    else:
        drawn = tl.load(noise + row * elements + here, mask=inside, other=0.0).to(tl.float32)
    return drawn


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=SLICED[:3])
def add_noise_kernel(
    x0, table, timesteps, image_ids, step, noise, x_t, table_rows, pairs, elements, seed, pair0, WIDTH: tl.constexpr, VECTOR: tl.constexpr
):  # fmt: skip
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDTH
    here = first + tl.arange(0, WIDTH)
    inside = here < elements
    timestep = tl.load(timesteps + row)
    a, s = _coefficient(table, timestep, table_rows, 0), _coefficient(table, timestep, table_rows, 1)
    clean = tl.load(x0 + (row // pairs) * elements + here, mask=inside, other=0.0).to(tl.float32)
    drawn = _draw(row, first, here, inside, image_ids, step, noise, pairs, elements, seed, pair0, WIDTH, VECTOR)
    tl.store(x_t + row * elements + here, (a * clean + s * drawn).to(x_t.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=SLICED)
def denoising_loss_kernel(
    prediction, x0, table, timesteps, image_ids, step, noise, upstream, loss, partial, gradient, table_rows, pairs, elements, row_stride,
    seed, pair0, L1: tl.constexpr, WIDTH: tl.constexpr, VECTOR: tl.constexpr
):  # fmt: skip
    """Writes the loss of a row, or if `partial` [rows, blocks] is given, the error sum of each block; and if `gradient` is given,
    upstream · ∂loss/∂prediction."""
    row = tl.program_id(0).to(tl.int64)
    timestep = tl.load(timesteps + row)
    u, v = _coefficient(table, timestep, table_rows, 2), _coefficient(table, timestep, table_rows, 3)
    if partial is None or gradient is not None:
        weight = _coefficient(table, timestep, table_rows, 4)
    if gradient is not None:
        factor = tl.load(upstream + row) * weight / elements
    begin, end = tl.program_id(1) * WIDTH, elements
    if partial is not None:
        end = begin + WIDTH
    total = tl.zeros((WIDTH,), tl.float32)
    for first in range(begin, end, WIDTH):
        here = first + tl.arange(0, WIDTH)
        inside = here < elements
        predicted = tl.load(prediction + row * row_stride + here, mask=inside, other=0.0).to(tl.float32)
        clean = tl.load(x0 + (row // pairs) * elements + here, mask=inside, other=0.0).to(tl.float32)
        drawn = _draw(row, first, here, inside, image_ids, step, noise, pairs, elements, seed, pair0, WIDTH, VECTOR)
        difference = tl.where(inside, predicted - (u * clean + v * drawn), 0.0)
        total += tl.abs(difference) if L1 else difference * difference
        if gradient is not None:
            if L1:
                slope = tl.where(difference > 0, factor, tl.where(difference < 0, -factor, difference * factor))  # 0 at 0, NaN at NaN
            else:
                slope = difference * (2 * factor)
            tl.store(gradient + row * row_stride + here, slope.to(gradient.dtype.element_ty), mask=inside)
            if row_stride > elements:  # the loss ignores the learned variance
                tl.store(gradient + row * row_stride + elements + here, tl.zeros_like(slope).to(gradient.dtype.element_ty), mask=inside)
    if partial is not None:
        tl.store(partial + row * tl.num_programs(1) + tl.program_id(1), tl.sum(total))
    else:
        tl.store(loss + row, weight * (tl.sum(total) / elements))


@triton.jit(do_not_specialize=["table_rows", "blocks"])
def loss_sum_kernel(partial, table, timesteps, loss, table_rows, blocks, elements, BLOCK: tl.constexpr):
    """Second stage, for large latents: computes loss [rows] = w · mean from the block sums in a fixed order."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, blocks, BLOCK):
        here = start + tl.arange(0, BLOCK)
        total += tl.load(partial + row * blocks + here, mask=here < blocks, other=0.0)
    weight = _coefficient(table, tl.load(timesteps + row), table_rows, 4)
    tl.store(loss + row, weight * (tl.sum(total) / elements))


def _vector(*streams: Tensor) -> int:
    """Returns how many elements of the narrowest tensor fit in 16 bytes."""
    return 4 if min(stream.element_size() for stream in streams) == 4 else 8


def add_noise(pairs: Pairs, dtype: torch.dtype) -> Tensor:
    """Computes reference.add_noise for contiguous float32, bfloat16 and float16 tensors."""
    x0, table, timesteps, image_ids, seed, step, pair0, noise = pairs
    rows, elements = timesteps.numel(), x0[0].numel()
    x_t = torch.empty((rows, *x0.shape[1:]), dtype=dtype, device=x0.device)
    grid = (rows, triton.cdiv(elements, WIDTH))
    sizes = (len(table), timesteps.shape[1], elements, seed, pair0)
    with torch.cuda.device_of(x0):
        add_noise_kernel[grid](x0, table, timesteps, image_ids, step, noise, x_t, *sizes, WIDTH=WIDTH, VECTOR=_vector(x_t), num_warps=WARPS)
    return x_t


def denoising_loss(prediction: Tensor, pairs: Pairs, l1: bool, upstream: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Computes reference.denoising_loss for contiguous float32, bfloat16 and float16 tensors."""
    x0, table, timesteps, image_ids, seed, step, pair0, noise = pairs
    rows, elements = timesteps.numel(), x0[0].numel()
    blocks = 1 if elements <= WHOLE else triton.cdiv(elements, WIDTH)
    partial = torch.empty((rows, blocks), dtype=torch.float32, device=x0.device) if blocks > 1 else None
    loss = torch.empty(timesteps.shape, dtype=torch.float32, device=x0.device)
    gradient = None if upstream is None else torch.empty_like(prediction)
    sizes = (len(table), timesteps.shape[1], elements, prediction[0].numel(), seed, pair0)
    with torch.cuda.device_of(x0):
        denoising_loss_kernel[(rows, blocks)](
            prediction, x0, table, timesteps, image_ids, step, noise, upstream, None if blocks > 1 else loss, partial, gradient, *sizes,
            L1=l1, WIDTH=WIDTH, VECTOR=_vector(prediction), num_warps=WARPS
        )  # fmt: skip
        if partial is not None:
            loss_sum_kernel[(rows,)](partial, table, timesteps, loss, len(table), blocks, elements, BLOCK=128, num_warps=1)
    return loss, gradient
