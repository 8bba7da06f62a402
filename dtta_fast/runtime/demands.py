"""Requirements of torch's CUDA kernels on their arguments; torch's CPU kernels accept anything.

| kernel | requirement | source in torch 2.11 |
|---|---|---|
| fused SGD, Adam, AdamW | lr is a float32 tensor of one element on the device | native/cuda/FusedAdamKernel.cu, FusedSgdKernel.cu |
| fused Adam, AdamW | steps are float32 tensors of one element on the device | native/cuda/fused_adam_utils.cuh |
| fused SGD, Adam, AdamW | a parameter, its gradient and its slots share dtype, device and strides, and are dense | can_use_fast_route |
| attention (flash, efficient, cuDNN) | the last dimension of queries, keys and values is contiguous | transformers/cuda/sdp_utils_cpp.h |
| attention (flash, efficient, cuDNN) | a head has at most 256 elements, else plain operators run | transformers/cuda/sdp_utils.cpp |
| efficient attention | its backward needs the logsumexp, omitted if no input requires a gradient | transformers/cuda/attention.cu |

The first three are asserted where the kernels are called, on CUDA and with DTTA_FAST_STRICT=1. If attention's inputs do not meet the
requirements, torch uses plain operators. The last row is why attention under vmap has its own rule (runtime/attention.py): inside vmap no
tensor requires a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LARGEST_HEAD = 256


def _demand(met: bool, message: str) -> None:
    if not met:
        raise AssertionError(message)


def fused_optimizer(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], slots: Sequence[Sequence[Tensor]], steps: Sequence[Tensor], lr: Tensor
) -> None:
    """Asserts the requirements of the fused optimizers."""
    if parameters[0].device.type != "cuda":
        return
    for name, values in (("lr", [lr]), ("step", steps)):
        for value in values:
            fits = value.dtype == torch.float32 and value.numel() == 1 and value.device == parameters[0].device
            _demand(
                fits, f"{name} is {value.dtype} {tuple(value.shape)} on {value.device}; CUDA reads one float32 on the parameters' device"
            )
    for i, parameter in enumerate(parameters):
        for other in (gradients[i], *(tensors[i] for tensors in slots)):
            same = (other.dtype, other.device, other.stride()) == (parameter.dtype, parameter.device, parameter.stride())
            _demand(same, f"parameter {i} and its gradient or slot differ in dtype, device or strides")
        _demand(
            _dense(parameter), f"parameter {i} has strides {parameter.stride()}, with gaps or overlaps; CUDA's kernel takes dense tensors"
        )


def attention(*tensors: Tensor) -> None:
    """Asserts the requirements of CUDA's attention kernels on queries, keys and values."""
    if tensors[0].device.type != "cuda":
        return
    for tensor in tensors:
        _demand(tensor.stride(-1) == 1, f"attention's input has strides {tensor.stride()}; the last dimension has to be contiguous")
        _demand(tensor.shape[-1] <= LARGEST_HEAD, f"a head has {tensor.shape[-1]} numbers; CUDA's kernels take up to {LARGEST_HEAD}")


def _dense(tensor: Tensor) -> bool:
    """Returns whether the tensor's elements fill their memory without gaps or overlaps."""
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda dimension: dimension[1]):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
