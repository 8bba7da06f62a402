"""CUDA tensors without a GPU: torch's FakeTensorMode on device cuda, forward and backward.

Fake tensors have shapes, dtypes, strides and devices, and no values. An operator whose tensors are on two devices raises, and so does a
read of a value. Two things are added here. Autograd is told that fake CUDA tensors are meta tensors, since its engine asks a CUDA driver
otherwise. And attention chooses its kernel as torch does on CUDA: flash in half precision, efficient in float32, and efficient attention
keeps its logsumexp only where an input requires a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._pytree import tree_map_only

from dtta_fast.runtime import private, trial
from dtta_fast.session import precision

MEMORY = 80 * 2**30
aten = torch.ops.aten
FUSED = {aten._fused_sgd_, aten._fused_adam_, aten._fused_adamw_}
_attention = F.scaled_dot_product_attention


class FakeCudaMode(FakeTensorMode):
    """Turns the meta device that C++ code was told into CUDA again, and refuses what a CUDA kernel could not compute.

    waits: shapes of the tensors that were copied between the host and the device so that the host waits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[tuple[int, ...]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> FakeCudaMode:
        return self  # a copied tensor stays in its mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta":
            kwargs["device"] = torch.device("cuda:0")
        args = tree_map_only(FakeTensor, _moved, args)
        if func is aten._scaled_dot_product_efficient_attention_backward.default:
            assert args[6].numel() > 0, "efficient attention ran without a logsumexp, and its backward reads it"
        if func is aten._to_copy.default and not kwargs.get("non_blocking") and _crosses(args[0], kwargs.get("device")):
            self.waits.append(tuple(args[0].shape))
        if func.overloadpacket in FUSED:  # it writes in place, and torch has no fake form of it; demands.py holds its arguments
            return None
        return super().__torch_dispatch__(func, types, args, kwargs)


def _crosses(tensor: Tensor, device: torch.device | str | None) -> bool:
    return device is not None and torch.device(device).type != tensor.device.type


def _moved(tensor: FakeTensor) -> FakeTensor:
    """Moves a tensor that C++ code made on the meta device, such as a number in a derivative's formula, to CUDA."""
    if tensor.fake_device.type == "meta":
        tensor.fake_device = torch.device("cuda:0")
    return tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """F.scaled_dot_product_attention with the kernels that it chooses on CUDA."""
    tensors = (query, key, value, attn_mask)
    if has_torch_function(tensors):
        keywords = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        return handle_torch_function(attention, tensors, query, key, value, **keywords)
    fused = torch.backends.cuda.mem_efficient_sdp_enabled() and query.ndim == 4
    if query.device.type == "cpu" or enable_gqa or not fused:
        return _attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if query.dtype.itemsize == 2 and attn_mask is None:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    kept = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    return aten._scaled_dot_product_efficient_attention(query, key, value, attn_mask, kept, dropout_p, is_causal, scale=scale)[0]


@contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """Makes `device="cuda"` work, with fake tensors. Tensors from outside are refused, unless to_cuda() brings them in."""
    dispatch, handlers = FakeTensor.__torch_dispatch__.__func__, fake_tensor._DISPATCH_META_HANDLERS
    device_of = torch.ops.prim.device.default

    def told(tensor: Any) -> torch.device:
        return torch.device("meta") if tensor.fake_device.type == "cuda" else tensor.fake_device

    def patched(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return told(args[0]) if func is device_of else dispatch(cls, func, types, args, kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeTensor, "__torch_dispatch__", classmethod(patched))
        patch.setitem(handlers, device_of, lambda args: told(args[0]))
        patch.setattr(F, "scaled_dot_product_attention", attention)
        patch.setattr(torch.cuda, "mem_get_info", lambda device=None: (MEMORY, MEMORY))
        patch.setattr(torch.cuda, "memory_reserved", lambda device=None: 0)
        patch.setattr(torch.cuda, "memory_allocated", lambda device=None: 0)
        patch.setattr(precision, "has_bfloat16", lambda device: True)
        patch.setenv("DTTA_FAST_STRICT", "1")  # the optimizers' arguments are held to what CUDA takes
        patch.setattr(trial, "_random_states", lambda _: [])  # a generator's state is a real tensor
        patch.setattr(private, "is_plain", lambda parameter: type(parameter) in (nn.Parameter, FakeTensor))
        with FakeCudaMode() as mode:
            yield mode


def to_cuda(mode: FakeTensorMode, value: Any) -> Any:
    """A module on the meta device or the CPU, or a tensor, as fake CUDA tensors."""
    mode.allow_non_fake_inputs = True
    try:
        if isinstance(value, nn.Module):
            return value.to_empty(device="cuda").requires_grad_(False)
        return mode.from_tensor(value).to("cuda")
    finally:
        mode.allow_non_fake_inputs = False
