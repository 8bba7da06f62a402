"""Attention under torch.vmap, whose own rules lose the gradient or run image by image."""

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
    """Makes attention differentiable under vmap, in this thread, for as long as the block lasts."""
    if torch.compiler.is_compiling():  # it takes no inference kernel, and cannot trace a mode of ours
        return sdpa_kernel(SDPBackend.MATH)  # pragma: no cover (traced, not run)
    return _VmappableAttention()


class _VmappableAttention(TorchFunctionMode):
    """Replaces attention by a form that vmap can batch and differentiate.

    It works for this thread alone, where torch's own switches are the process's. Where a mode is on, nn.MultiheadAttention leaves its
    inference kernel, which has no derivative, aside.
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
        if function is F.multi_head_attention_forward:  # it calls attention where no mode sees it
            with math_attention:
                return function(*args, **kwargs)
        return function(*args, **kwargs)


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
    """F.scaled_dot_product_attention, [..., heads, L, d] each, for tensors that vmap may have batched."""
    keywords: dict[str, Any] = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    tensors = [query, key, value, attn_mask]
    if not any(tensor is not None and torch._C._functorch.is_batchedtensor(tensor) for tensor in tensors):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, **keywords)
    found: Tensor = _Unbatched.apply(*tensors, keywords)
    return found


class _Unbatched(torch.autograd.Function):
    """Attention of B batched calls as one call with a longer batch.

    Inside vmap no tensor requires a gradient, so torch would choose a kernel that keeps nothing for the backward. Here the tensors are
    unwrapped first. Autograd records the plain call, and backward() below is never asked.
    """

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, keywords: dict[str, Any]) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, mask, **keywords)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keeps nothing."""

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError("attention was differentiated outside of torch.vmap")

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, keywords: dict[str, Any]
    ) -> tuple[Tensor, int]:
        """Moves the batched dimension into the batch, and back out of the result."""

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
            # it may leave out leading dimensions, and have 1 where it is the same for all
            own, sizes = mask.shape[: batched[3]], mask.shape[batched[3] :]
            mask = mask.reshape(*own, *(1,) * (len(leading) + 3 - len(sizes)), *sizes)
            mask = joined(mask.expand(*own, *leading, *mask.shape[-3:]), batched[3])
        found = F.scaled_dot_product_attention(q, k, v, mask, **keywords).unflatten(0, (info.batch_size, *leading))
        return (found.squeeze(-3) if rank == 2 else found), 0


class MathAttention:
    """torch's switch to attention by plain operators, which is the process's: on while any thread is within, then as it was."""

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
        """Takes this thread out. An interrupt may have come before the block could do so itself."""
        with self._lock:
            self._within.discard(threading.get_ident())
            if not self._within:
                self._switch.close()


math_attention = MathAttention()
