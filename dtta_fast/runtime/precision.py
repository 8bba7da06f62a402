"""Mixed precision: which tensors are held in half precision, and how a gradient is kept from underflowing in float16."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import nn

from dtta_fast.config import Precision
from dtta_fast.denoisers.base import Denoiser
from dtta_fast.runtime.private import PrivateCopy

DTYPES: dict[Precision | None, torch.dtype | None] = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def private_denoiser(denoiser: Denoiser, precision: Precision | None) -> PrivateCopy:
    """The denoiser with all its floating-point tensors in the precision, but those that it keeps in float32."""
    tensors = (*denoiser.named_parameters(), *denoiser.named_buffers())
    names = {name for name, tensor in tensors if tensor.is_floating_point()} - set(denoiser.keep_in_float32)
    return PrivateCopy(denoiser, DTYPES[precision], names)


def private_model(model: nn.Module, moving: Collection[str], precision: Precision | None) -> PrivateCopy:
    """The model with its frozen matrices in the precision, for autocast to find them there.

    Weights that move stay in float32, and so do vectors and buffers: normalisation works in float32.
    """
    names = {name for name, p in model.named_parameters() if p.is_floating_point() and p.ndim > 1 and name not in moving}
    return PrivateCopy(model, DTYPES[precision], names)


def gradient_scale(dtype: torch.dtype, elements: int, divisor: int) -> float:
    """The loss scale of float16: a power of two near 1 / (weight of one element in the loss), so that gradients are of the residual's
    size, far from float16's 6e-8 and 65504; 1 for other dtypes.

    The loss is a mean over `elements` of a latent and `divisor` pairs.
    """
    return 2.0 ** round(math.log2(elements * divisor)) if dtype == torch.float16 else 1.0
