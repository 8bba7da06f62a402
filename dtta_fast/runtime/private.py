"""The engine's own copies of the caller's modules: whatever is swapped, converted or compiled never shows in the originals."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn


class PrivateCopy:
    """A module's structure in eval mode, its weights constants that share the original's memory.

    Where `dtype` is given, the tensors named in `converted` are held in it. Converted tensors and buffers are the copy's own;
    refresh() brings them up to date.

    Raises:
        TypeError: the module cannot be copied.
    """

    def __init__(self, source: nn.Module, dtype: torch.dtype | None = None, converted: Collection[str] = ()) -> None:
        self._source = source
        self._identity = _identity(source)
        self._own: list[tuple[Tensor, Tensor]] = []  # of the source, of the copy: those that share no memory
        memo: dict[int, Any] = {}
        for name, p in source.named_parameters():
            constant = p.detach()
            if dtype is not None and name in converted and p.dtype != dtype:
                constant = constant.to(dtype)
                self._own.append((p, constant))
            # a tensor class of its own (quantised weights) is shared as it is
            memo[id(p)] = nn.Parameter(constant, requires_grad=False) if type(p) is nn.Parameter else p
        for name, buffer in source.named_buffers():
            own = buffer.detach().to(dtype if dtype is not None and name in converted else buffer.dtype, copy=True)
            memo[id(buffer)] = own
            self._own.append((buffer, own))
        try:
            self.module: nn.Module = evaluating(copy.deepcopy(source, memo))
        except Exception as error:  # whatever a module's own __deepcopy__ raises
            raise TypeError(f"{type(source).__name__} cannot be copied ({error}); give a module that copy.deepcopy accepts") from error

    def refresh(self) -> bool:
        """Takes over what was written into the source's tensors; False where tensors were replaced, and a new copy is due.

        Whether something was written is not asked: tensors' version counters do not see writes through `.data`.
        """
        if _identity(self._source) != self._identity:
            return False
        if self._own:
            theirs, own = zip(*self._own, strict=True)
            torch._foreach_copy_(list(own), [tensor.detach() for tensor in theirs])
        return True


def evaluating(module: nn.Module) -> nn.Module:
    """The module, in eval mode but for bitsandbytes' 4-bit layers: there they repack their weights, the caller's, for a CPU without
    gradients."""
    for part in module.modules():
        part.training = any(kind.__name__ == "Linear4bit" for kind in type(part).__mro__)
    return module


def _identity(module: nn.Module) -> list[tuple[str, int, int]]:
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return [(name, id(tensor), tensor.data_ptr()) for name, tensor in tensors]
