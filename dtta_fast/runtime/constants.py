"""Constant tensors that are made once for a device: moving one there in every call would make the host wait each time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch._guards import detect_fake_mode

from dtta_fast.runtime.compiling import is_tracing

P = ParamSpec("P")
T = TypeVar("T")


def kept(make: Callable[P, T]) -> Callable[P, T]:
    """Keeps what `make` returned for the last arguments, which have to be hashable. Tensors that a trace makes belong to it alone."""
    remembered = functools.lru_cache(maxsize=32)(torch.inference_mode(False)(make))

    @functools.wraps(make)
    def get(*args: P.args, **kwargs: P.kwargs) -> T:
        if is_tracing() or detect_fake_mode() is not None:
            return make(*args, **kwargs)
        return remembered(*args, **kwargs)  # type: ignore[arg-type]

    get.forget = remembered.cache_clear  # type: ignore[attr-defined]
    return get


@kept
def numbers(values: tuple[float, ...] | tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A tensor [N] of these values."""
    return torch.tensor(values, dtype=dtype, device=device)
