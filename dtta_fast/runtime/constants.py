"""Constant tensors that are created once per device: moving them there in every call would make the host wait each time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import torch
from torch._guards import detect_fake_mode

from dtta_fast.runtime.compiling import is_tracing

P = ParamSpec("P")
T = TypeVar("T")


_NOTED: ContextVar[list[Any] | None] = ContextVar("noted", default=None)


@contextmanager
def noting(constants: list[Any]) -> Iterator[None]:
    """Appends to the list every constant that is asked for, since the cache may let go of it."""
    token = _NOTED.set(constants)
    try:
        yield
    finally:
        _NOTED.reset(token)


def kept(make: Callable[P, T]) -> Callable[P, T]:
    """Caches the results of `make` for the latest arguments, which must be hashable. Tensors made during a trace are not cached."""
    remembered = functools.lru_cache(maxsize=32)(torch.inference_mode(False)(make))

    @functools.wraps(make)
    def get(*args: P.args, **kwargs: P.kwargs) -> T:
        if is_tracing() or detect_fake_mode() is not None:
            return make(*args, **kwargs)
        found = remembered(*args, **kwargs)  # type: ignore[arg-type]
        if (noted := _NOTED.get()) is not None:
            noted.append(found)
        return found

    get.forget = remembered.cache_clear  # type: ignore[attr-defined]
    return get


@kept
def numbers(values: tuple[float, ...] | tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Returns a tensor [N] with these values."""
    return torch.tensor(values, dtype=dtype, device=device)
