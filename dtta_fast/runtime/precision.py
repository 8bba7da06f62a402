"""Mixed precision: which of the denoiser's tensors are held in half precision, and how a gradient is kept from underflowing in float16."""

from __future__ import annotations

import math

import torch

from dtta_fast.config import Precision
from dtta_fast.denoisers.base import Denoiser
from dtta_fast.runtime.private import PrivateCopy

DTYPES: dict[Precision | None, torch.dtype | None] = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def private_denoiser(denoiser: Denoiser, precision: Precision | None) -> PrivateCopy:
    """A private copy with all floating-point tensors in the precision, but those that the denoiser keeps in float32.

    Not by torch.autocast, which casts frozen weights anew in every forward.
    """
    tensors = (*denoiser.named_parameters(), *denoiser.named_buffers())
    names = {name for name, tensor in tensors if tensor.is_floating_point()} - set(denoiser.keep_in_float32)
    return PrivateCopy(denoiser, DTYPES[precision], names)


def gradient_scale(dtype: torch.dtype, elements: int, divisor: int) -> float:
    """The loss scale of float16: a power of two near 1 / (weight of one element in the loss), so that gradients are of the residual's
    size, far from float16's 6e-8 and 65504; 1 for other dtypes.

    The loss is a mean over `elements` of a latent and `divisor` pairs.
    """
    return 2.0 ** round(math.log2(elements * divisor)) if dtype == torch.float16 else 1.0
