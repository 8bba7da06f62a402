"""mix_condition on the GPU, forward and backward: softmax weights and the weighted sum of the chosen embeddings in one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CLASSES, NUMBERS = 32, 128  # classes and embedding values per block
ROW = 1024  # classes per block when only logits are read
VARYING = ["classes", "count"]


@triton.jit
def _norm(logits, row, classes, ROW: tl.constexpr):
    """Computes max(‖logits of the row‖₂, 1e-12)."""
    squares = tl.zeros((ROW,), tl.float32)
    for start in range(0, classes, ROW):
        here = start + tl.arange(0, ROW)
        z = tl.load(logits + row * classes + here, mask=here < classes, other=0.0).to(tl.float32)
        squares += z * z
    return tl.maximum(tl.sqrt(tl.sum(squares)), 1e-12)


@triton.jit
def _chosen(chosen, row, here, count):
    """Returns the class indices at positions `here` of the selected classes."""
    if chosen is None:
        return here.to(tl.int64)
    else:
        return tl.load(chosen + row * count + here, mask=here < count, other=0)


@triton.jit(do_not_specialize=VARYING)
def mix_kernel(
    logits, embeddings, chosen, weights, mixed, classes, numbers, count, logit_scale, PER_IMAGE: tl.constexpr, ROW: tl.constexpr,
    CLASSES: tl.constexpr, NUMBERS: tl.constexpr
):  # fmt: skip
    """Computes mixed [B, D] and the softmax weights [B, K]; each program handles NUMBERS of the D values of an image."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    scale = 1.0
    if logit_scale is not None:
        scale = logit_scale / _norm(logits, row, classes, ROW)
    top = tl.full((ROW,), -float("inf"), tl.float32)
    for start in range(0, count, ROW):
        here = start + tl.arange(0, ROW)
        z = tl.load(logits + row * classes + _chosen(chosen, row, here, count), mask=here < count, other=-float("inf")).to(tl.float32)
        top = tl.maximum(top, tl.where(here < count, z * scale, -float("inf")))  # with a scale of 0, padding would become NaN
    highest = tl.max(top)
    exponentials = tl.zeros((ROW,), tl.float32)
    for start in range(0, count, ROW):
        here = start + tl.arange(0, ROW)
        z = tl.load(logits + row * classes + _chosen(chosen, row, here, count), mask=here < count, other=-float("inf")).to(tl.float32)
        exponentials += tl.where(here < count, tl.exp(z * scale - highest), 0.0)
    total = tl.sum(exponentials)
    number = block * NUMBERS + tl.arange(0, NUMBERS)
    table = embeddings + row * classes * numbers if PER_IMAGE else embeddings
    sums = tl.zeros((NUMBERS,), tl.float32)
    for start in range(0, count, CLASSES):
        here = start + tl.arange(0, CLASSES)
        known, which = here < count, _chosen(chosen, row, here, count)
        z = tl.load(logits + row * classes + which, mask=known, other=-float("inf")).to(tl.float32)
        weight = tl.where(known, tl.exp(z * scale - highest) / total, 0.0)
        tl.store(weights + row * classes + which, weight, mask=known & (block == 0))
        inside = known[:, None] & (number < numbers)[None, :]
        rows = tl.load(table + which[:, None] * numbers + number[None, :], mask=inside, other=0.0).to(tl.float32)
        sums += tl.sum(weight[:, None] * rows, axis=0)
    tl.store(mixed + row * numbers + number, sums.to(mixed.dtype.element_ty), mask=number < numbers)


@triton.jit(do_not_specialize=VARYING)
def to_weights_kernel(
    upstream, embeddings, chosen, to_weights, classes, numbers, count, PER_IMAGE: tl.constexpr, CLASSES: tl.constexpr,
    NUMBERS: tl.constexpr
):  # fmt: skip
    """Computes to_weights [B, K] = upstream · embedding; each program handles CLASSES of the selected classes."""
    row = tl.program_id(0).to(tl.int64)
    here = tl.program_id(1) * CLASSES + tl.arange(0, CLASSES)
    known, which = here < count, _chosen(chosen, row, here, count)
    table = embeddings + row * classes * numbers if PER_IMAGE else embeddings
    sums = tl.zeros((CLASSES,), tl.float32)
    for start in range(0, numbers, NUMBERS):
        number = start + tl.arange(0, NUMBERS)
        inside = known[:, None] & (number < numbers)[None, :]
        rows = tl.load(table + which[:, None] * numbers + number[None, :], mask=inside, other=0.0).to(tl.float32)
        slope = tl.load(upstream + row * numbers + number, mask=number < numbers, other=0.0).to(tl.float32)
        sums += tl.sum(rows * slope[None, :], axis=1)
    tl.store(to_weights + row * classes + which, sums, mask=known)


@triton.jit(do_not_specialize=VARYING)
def to_logits_kernel(logits, weights, to_weights, to_logits, classes, logit_scale, ROW: tl.constexpr):
    """Backpropagates through softmax and normalisation to to_logits [B, K]. Classes that were not selected have weight 0."""
    row = tl.program_id(0).to(tl.int64)
    inner = tl.zeros((ROW,), tl.float32)
    for start in range(0, classes, ROW):
        here = start + tl.arange(0, ROW)
        at = row * classes + here
        inner += tl.load(weights + at, mask=here < classes, other=0.0) * tl.load(to_weights + at, mask=here < classes, other=0.0)
    mean = tl.sum(inner)
    scale, norm, along = 1.0, 1.0, 0.0
    if logit_scale is not None:
        norm = _norm(logits, row, classes, ROW)
        scale = logit_scale / norm
        products = tl.zeros((ROW,), tl.float32)
        for start in range(0, classes, ROW):
            here = start + tl.arange(0, ROW)
            inside, at = here < classes, row * classes + here
            z = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
            weight, slope = tl.load(weights + at, mask=inside, other=0.0), tl.load(to_weights + at, mask=inside, other=0.0)
            products += (z / norm) * (weight * (slope - mean))
        along = tl.sum(products)
    for start in range(0, classes, ROW):
        here = start + tl.arange(0, ROW)
        inside, at = here < classes, row * classes + here
        slope = tl.load(weights + at, mask=inside, other=0.0) * (tl.load(to_weights + at, mask=inside, other=0.0) - mean)
        if logit_scale is not None:
            z = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
            slope = (slope - (z / norm) * along) * scale
        tl.store(to_logits + at, slope.to(to_logits.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=[*VARYING, "images"])
def to_embeddings_kernel(weights, upstream, to_embeddings, images, classes, numbers, PER_IMAGE: tl.constexpr, NUMBERS: tl.constexpr):
    """Computes to_embeddings [K, D] = Σ over images, in order, of weight · upstream; with PER_IMAGE, [B, K, D] without the sum."""
    row = tl.program_id(0).to(tl.int64)
    number = tl.program_id(1) * NUMBERS + tl.arange(0, NUMBERS)
    first = row // classes
    end = first + 1 if PER_IMAGE else images
    sums = tl.zeros((NUMBERS,), tl.float32)
    for image in range(first, end):
        slope = tl.load(upstream + image * numbers + number, mask=number < numbers, other=0.0).to(tl.float32)
        sums += tl.load(weights + image * classes + row % classes) * slope
    tl.store(to_embeddings + row * numbers + number, sums.to(to_embeddings.dtype.element_ty), mask=number < numbers)


def mix_condition(
    logits: Tensor, embeddings: Tensor, chosen: Tensor | None, logit_scale: float | None, per_image: bool
) -> tuple[Tensor, Tensor]:
    """Computes reference.mix_condition for contiguous float32, bfloat16 and float16 tensors."""
    images, classes = logits.shape
    mixed = embeddings.new_empty((images, *embeddings.shape[1 + per_image :]))
    weights = torch.zeros((images, classes), dtype=torch.float32, device=logits.device)
    numbers, count = mixed[0].numel(), classes if chosen is None else chosen.shape[1]
    with torch.cuda.device_of(logits):
        mix_kernel[(images, triton.cdiv(numbers, NUMBERS))](
            logits, embeddings, chosen, weights, mixed, classes, numbers, count, logit_scale, PER_IMAGE=per_image,
            ROW=min(ROW, triton.next_power_of_2(classes)), CLASSES=CLASSES, NUMBERS=NUMBERS
        )  # fmt: skip
    return mixed, weights


def mix_condition_backward(
    upstream: Tensor,
    logits: Tensor,
    embeddings: Tensor,
    chosen: Tensor | None,
    weights: Tensor,
    logit_scale: float | None,
    per_image: bool,
    with_embeddings: bool,
) -> tuple[Tensor, Tensor | None]:
    """Computes reference.mix_condition_backward for contiguous float32, bfloat16 and float16 tensors."""
    images, classes = logits.shape
    numbers, count = upstream[0].numel(), classes if chosen is None else chosen.shape[1]
    to_weights = torch.zeros_like(weights)
    to_logits = torch.empty_like(logits)
    to_embeddings = torch.empty_like(embeddings) if with_embeddings else None
    row = min(ROW, triton.next_power_of_2(classes))
    with torch.cuda.device_of(logits):
        to_weights_kernel[(images, triton.cdiv(count, CLASSES))](
            upstream, embeddings, chosen, to_weights, classes, numbers, count, PER_IMAGE=per_image, CLASSES=CLASSES, NUMBERS=NUMBERS
        )
        to_logits_kernel[(images,)](logits, weights, to_weights, to_logits, classes, logit_scale, ROW=row)
        if to_embeddings is not None:
            rows = images * classes if per_image else classes
            to_embeddings_kernel[(rows, triton.cdiv(numbers, NUMBERS))](
                weights, upstream, to_embeddings, images, classes, numbers, PER_IMAGE=per_image, NUMBERS=NUMBERS
            )
    return to_logits, to_embeddings
