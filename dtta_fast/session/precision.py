"""Mixed precision: which denoiser tensors are stored in half precision, and how gradients are kept from underflowing in float16."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from dtta_fast.config import Precision
from dtta_fast.denoisers.base import Denoiser
from dtta_fast.runtime.float32 import float32_products
from dtta_fast.runtime.private import PrivateCopy

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def denoiser_dtype(precision: Precision, own: torch.dtype, device: torch.device) -> torch.dtype:
    """Returns the dtype in which a denoiser of dtype `own` runs on this device.

    "auto" turns float32 into bfloat16 on a GPU, or into float16 on a GPU without bfloat16, and leaves everything else unchanged.
    """
    if precision != "auto":
        return DTYPES[precision]
    if device.type != "cuda" or own != torch.float32:
        return own
    return torch.bfloat16 if has_bfloat16(device) else torch.float16


def has_bfloat16(device: torch.device) -> bool:
    """Returns whether the GPU supports bfloat16 in hardware."""
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def products(precision: Precision, device: torch.device) -> AbstractContextManager[None]:
    """Sets how CUDA computes float32 products during a call: in full precision for "fp32", in TF32 otherwise. No effect on a CPU."""
    return float32_products.within(device, tf32=precision != "fp32")


def private_denoiser(denoiser: Denoiser, precision: Precision, device: torch.device, frozen: bool) -> PrivateCopy:
    """Makes a private copy with all floating-point tensors in the given precision, except those that the denoiser keeps in float32.

    frozen: whether no call adapts the denoiser's weights. Then those that it can join are joined.
    torch.autocast is not used, since it casts frozen weights again in every forward.
    """
    dtype = denoiser_dtype(precision, denoiser.dtype, device)
    if precision == "auto" and dtype == denoiser.dtype:
        return PrivateCopy(denoiser)
    tensors = (*denoiser.named_parameters(), *denoiser.named_buffers())
    names = {name for name, tensor in tensors if tensor.is_floating_point()} - set(denoiser.keep_in_float32)
    copy = PrivateCopy(denoiser, dtype, names, denoiser.joinable() if frozen else ())
    if copy.joined:
        own: Any = copy.module
        own.use_joined(copy.joined)
    return copy
