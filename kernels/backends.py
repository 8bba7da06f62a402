"""Selects the implementation of the ops on a device and explains the choice."""

from __future__ import annotations

import os
import platform
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from dtta_fast.kernels import native, reference

KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)


@lru_cache(maxsize=8)
def serving(device_type: str) -> tuple[str, str]:
    """Returns the backend for a device type ("native", "triton" or "torch") for float32, bfloat16 and float16, and the reason."""
    if device_type == "cpu":
        if native.library() is None:
            return "torch", native.missing()
        if native.instruction_set() == "portable" and platform.machine().lower() in ("x86_64", "amd64", "i386", "i686"):
            return "torch", "without AVX2 and FMA the native kernels are slower than plain torch"
        return "native", f"C++, {native.instruction_set()}, {native.thread_pool()}"
    if device_type == "cuda":
        try:
            import triton  # check the module, because the ROCm and Windows builds use other distribution names
        except ImportError:
            return "torch", "Triton is not installed: pip install triton"
        return "triton", f"Triton {triton.__version__}"
    return "torch", f"there are no kernels for {device_type} devices"


def drawing(device_type: str) -> ModuleType:
    """Returns the module that draws timesteps on a device: Triton's on a GPU where it is installed, plain torch elsewhere."""
    if serving(device_type)[0] != "triton":
        return reference
    from dtta_fast.kernels.triton import launchers

    return launchers


def choose(dtype: torch.dtype, *tensors: Tensor | None) -> ModuleType:
    """Returns the module that computes an op on these tensors with results in `dtype`.

    float64 and every other type than float32, bfloat16 and float16 use plain torch on all devices. (The native backend delegates mixtures
    that are a single matrix product to torch.)

    Raises:
        RuntimeError: DTTA_FAST_STRICT=1 is set and the kernels for the device are missing.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    if dtype not in KERNEL_TYPES or any(tensor.dtype not in KERNEL_TYPES for tensor in given):
        return reference
    device_type = given[0].device.type
    backend, reason = serving(device_type)
    if backend == "native":
        return native
    if backend == "triton":
        from dtta_fast.kernels.triton import launchers

        return launchers
    if os.environ.get("DTTA_FAST_STRICT") == "1":
        raise RuntimeError(f"DTTA_FAST_STRICT=1, and plain torch would serve the ops on {device_type}: {reason}")
    return reference
