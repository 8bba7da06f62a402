"""Counts the FLOPs and the memory traffic of operators per phase."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from dtta_fast.runtime.phases import Listener

aten = torch.ops.aten
ALLOCATIONS = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten.resize_}
OVERWRITES = {aten.copy_, aten.fill_, aten.zero_, aten._foreach_copy_, aten._foreach_zero_}  # their target is written, not read
# of their first tensor these touch only the indexed elements: as many as they return or are given to write
INDEXED = {
    *(aten.index, aten.index_select, aten.gather, aten.embedding),
    *(aten.index_put_, aten._index_put_impl_, aten.index_copy_, aten.index_add_, aten.scatter_, aten.scatter_add_),
}


@dataclass
class Count:
    """Totals over operator calls: FLOPs (a multiply-add counts as two) and bytes."""

    calls: int = 0
    flops: int = 0
    bytes: int = 0

    def add(self, other: Count) -> None:
        self.calls += other.calls
        self.flops += other.flops
        self.bytes += other.bytes


class Counter(TorchDispatchMode, Listener):
    """Counts everything that runs inside it by (phase, operator), in `counts`.

    FLOPs cover matrix products, convolutions and attention, using torch's formulas; other operators count as zero. Bytes cover each input
    and output of an operator once; repeated reads and a kernel's internal buffers are not seen. Views move no bytes.
    """

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        Listener.__init__(self)
        self.counts: dict[tuple[str, str], Count] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        moved = bytes_moved(func, args, kwargs, out)
        if moved is not None:
            count = Count(1, flops_of(func.overloadpacket, args, kwargs, out), moved)
            self.counts.setdefault((self.current, func.name().partition(".")[0]), Count()).add(count)
        return out


def flops_of(packet: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int:
    """Returns the FLOPs of one call."""
    if packet in OWN_FORMULAS:
        return OWN_FORMULAS[packet](*args)
    return int(flop_registry[packet](*args, **kwargs, out_val=out)) if packet in flop_registry else 0


def bytes_moved(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int | None:
    """Returns the minimum number of bytes that one call reads and writes; None for a view or an allocation, which does no work."""
    packet = func.overloadpacket
    given = [*zip(func._schema.arguments, args, strict=False)]
    given += [(argument, kwargs[argument.name]) for argument in func._schema.arguments if argument.name in kwargs]
    inputs = [(tensor, _written(argument)) for argument, value in given for tensor in tree_leaves(value) if isinstance(tensor, Tensor)]
    storages = {tensor.untyped_storage()._cdata for tensor, _ in inputs}
    outputs = [tensor for tensor in tree_leaves(out) if isinstance(tensor, Tensor)]
    fresh = [tensor for tensor in outputs if tensor.untyped_storage()._cdata not in storages]
    written = [tensor for tensor, is_written in inputs if is_written]
    if packet in ALLOCATIONS or (inputs and outputs and not fresh and not written):
        return None
    returned = sum(map(touched, fresh))
    if packet in INDEXED and inputs:
        others = [touched(tensor) for tensor, _ in inputs[1:]]
        return sum(others) + (2 * returned if fresh else max(others, default=0))
    read = sum(touched(tensor) for tensor, is_written in inputs if not (is_written and packet in OVERWRITES))
    return read + sum(map(touched, written)) + returned


def touched(tensor: Tensor) -> int:
    """Returns the bytes of memory that the tensor's elements occupy; an expanded dimension counts once."""
    return math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride) * tensor.itemsize


def _written(argument: Any) -> bool:
    # a fused optimizer's schema allows it to unscale the gradients in place; ours have no scale
    return argument.alias_info is not None and argument.alias_info.is_write and argument.name != "grads"


def _convolution_backward(gradient: Tensor, x: Tensor, weight: Tensor, *others: Any) -> int:
    """Counts a convolution's FLOPs for each wanted gradient (input, weight); torch's own formula ignores groups."""
    transposed, wanted = others[4], others[7]
    forward = conv_flop_count(list(x.shape), list(weight.shape), list(gradient.shape), transposed)
    return int(wanted[0] + wanted[1]) * forward


OWN_FORMULAS: dict[Any, Callable[..., int]] = {
    aten.convolution_backward: _convolution_backward,
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_: sdpa_flop_count(q.shape, k.shape, v.shape),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda gradient, q, k, v, *_: sdpa_backward_flop_count(
        gradient.shape, q.shape, k.shape, v.shape
    ),
}
