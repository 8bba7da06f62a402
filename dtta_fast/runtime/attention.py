"""Attention and group normalisation under torch.vmap, whose own rules lose the gradient, run one image at a time or raise."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from dtta_fast.runtime.compiling import is_tracing


def vmappable_attention() -> AbstractContextManager[Any]:
    """Makes attention differentiable under vmap in this thread for the duration of the block."""
    if torch.compiler.is_compiling():  # the compiler uses no inference kernel and cannot trace our mode
        return sdpa_kernel(SDPBackend.MATH)  # pragma: no cover (traced, not run)
    return _VmappableAttention()


class _VmappableAttention(TorchFunctionMode):
    """Replaces attention with a form that vmap can batch and differentiate.

    It affects only this thread, whereas torch's own switches affect the whole process. While a mode is active, nn.MultiheadAttention does
    not use its inference kernel, which has no derivative.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            if not is_tracing():
                return _attention(*args, **kwargs)
            if len(args) < 4 and kwargs.get("attn_mask") is None:
                return torch._scaled_dot_product_attention_math(*args, **kwargs)[0]
            with math_attention:
                return function(*args, **kwargs)
        if function is F.multi_head_attention_forward:  # it calls attention internally, hidden from modes
            with math_attention:
                return function(*args, **kwargs)
        if function is F.group_norm:
            return _group_norm(*args, **kwargs)
        return function(*args, **kwargs)


def _group_norm(input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Computes F.group_norm, which torch 2.11 on a CPU refuses for a batched tensor whose strides look like channels_last."""
    if input.is_cpu and torch._C._functorch.is_batchedtensor(input):
        images, channels = input.shape[:2]
        positions = input[0, 0].numel()
        return torch.native_group_norm(input.contiguous(), weight, bias, images, channels, positions, num_groups, eps)[0]
    return F.group_norm(input, num_groups, weight, bias, eps)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Computes F.scaled_dot_product_attention for tensors [..., heads, L, d] that vmap may have batched."""
    keywords: dict[str, Any] = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    tensors = [query, key, value, attn_mask]
    if not any(tensor is not None and torch._C._functorch.is_batchedtensor(tensor) for tensor in tensors):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, **keywords)
    found: Tensor = _Unbatched.apply(*tensors, keywords)
    return found


class _Unbatched(torch.autograd.Function):
    """Runs the attention of B batched calls as one call with a larger batch.

    Inside vmap no tensor requires a gradient, so torch would choose a kernel that saves nothing for the backward. Here the tensors are
    unwrapped first, so autograd records the plain call, and backward() below is never called.
    """

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, keywords: dict[str, Any]) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, mask, **keywords)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Saves nothing."""

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError("attention was differentiated outside of torch.vmap")

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, keywords: dict[str, Any]
    ) -> tuple[Tensor, int]:
        """Folds the vmap dimension into the batch dimension and unfolds it from the result."""

        batched = [int(dim is not None) for dim in in_dims[:4]]
        given: list[Any] = [query, key, value, mask]
        tensors = [tensor if dim is None else tensor.movedim(dim, 0) for tensor, dim in zip(given, in_dims, strict=False)]
        rank = query.ndim - batched[0]
        if rank == 2:  # a single head
            tensors = [
                tensor if tensor is None or tensor.ndim - own < 2 else tensor.unsqueeze(own)
                for tensor, own in zip(tensors, batched, strict=True)
            ]
        leading = tensors[0].shape[batched[0] : -3]

        def joined(tensor: Tensor, own: int) -> Tensor:  # [B, ..., heads, L, d] -> [B * ..., heads, L, d]
            return (tensor if own else tensor.expand(info.batch_size, *tensor.shape)).flatten(0, -4)

        q, k, v = (joined(tensor, own) for tensor, own in zip(tensors[:3], batched, strict=False))
        mask = tensors[3]
        if mask is not None:
            # the mask may omit leading dimensions, and have size 1 where it broadcasts
            own, sizes = mask.shape[: batched[3]], mask.shape[batched[3] :]
            mask = mask.reshape(*own, *(1,) * (len(leading) + 3 - len(sizes)), *sizes)
            mask = joined(mask.expand(*own, *leading, *mask.shape[-3:]), batched[3])
        found = F.scaled_dot_product_attention(q, k, v, mask, **keywords).unflatten(0, (info.batch_size, *leading))
        return (found.squeeze(-3) if rank == 2 else found), 0


class MathAttention:
    """Turns on torch's process-wide switch to attention with plain operators while any thread is inside, then restores it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._within: set[int] = set()
        self._switch = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._within:
                self._switch.enter_context(sdpa_kernel(SDPBackend.MATH))
            self._within.add(threading.get_ident())

    def __exit__(self, *_: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Removes this thread. Also called separately, since an interrupt may keep the block from doing so itself."""
        with self._lock:
            self._within.discard(threading.get_ident())
            if not self._within:
                self._switch.close()


math_attention = MathAttention()
