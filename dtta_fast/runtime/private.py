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
        # pairs of a source's tensor and the copy's own, where the two share no memory
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self._converted: list[tuple[Tensor, Tensor]] = []
        memo: dict[int, Any] = {}
        for name, p in source.named_parameters():
            constant = p.detach()
            if dtype is not None and name in converted and p.dtype != dtype:
                constant = constant.to(dtype)
                self._converted.append((p, constant))
            memo[id(p)] = nn.Parameter(constant, requires_grad=False) if is_plain(p) else p
        for name, buffer in source.named_buffers():
            own = buffer.detach().to(dtype if dtype is not None and name in converted else buffer.dtype, copy=True)
            memo[id(buffer)] = own
            self._buffers.append((buffer, own))
        try:
            self.module: nn.Module = evaluating(copy.deepcopy(source, memo))
        except Exception as error:  # whatever a module's own __deepcopy__ raises
            raise TypeError(f"{type(source).__name__} cannot be copied ({error}); give a module that copy.deepcopy accepts") from error
        self._versions: list[int | None] = self._counted()

    def refresh(self) -> bool:
        """Takes over what was written into the source's tensors; False where tensors were replaced, and a new copy is due.

        Buffers are copied every time. Converted weights are cast again only where torch has counted a write: casting all of them would
        take longer than a step of a small batch. torch does not count writes through `.data`: see recast().
        """
        if _identity(self._source) != self._identity:
            return False
        versions = self._counted()
        written = [pair for pair, now, then in zip(self._converted, versions, self._versions, strict=True) if now is None or now != then]
        if outdated := [*self._buffers, *written]:
            theirs, own = zip(*outdated, strict=True)
            torch._foreach_copy_(list(own), [tensor.detach() for tensor in theirs])
        self._versions = versions
        return True

    def recast(self) -> None:
        """Casts all converted weights anew at the next refresh()."""
        self._versions = [None] * len(self._converted)

    def _counted(self) -> list[int | None]:
        """Counts the writes to each converted weight; None for one made under torch.inference_mode(), where torch does not count."""
        return [None if p.is_inference() else p._version for p, _ in self._converted]


def is_plain(parameter: nn.Parameter) -> bool:
    """Tells a plain parameter from one of a class of its own, such as a quantised weight, which is shared as it is."""
    return type(parameter) is nn.Parameter


def evaluating(module: nn.Module) -> nn.Module:
    """The module, in eval mode but for bitsandbytes' 4-bit layers: there they repack their weights, the caller's, for a CPU without
    gradients."""
    for part in module.modules():
        part.training = any(kind.__name__ == "Linear4bit" for kind in type(part).__mro__)
    return module


def _identity(module: nn.Module) -> list[tuple[Any, ...]]:
    """Names the tensors and the memory that they lie in."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return [(name, id(tensor), tensor.untyped_storage()._cdata, tensor.storage_offset()) for name, tensor in tensors]
