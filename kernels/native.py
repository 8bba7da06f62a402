"""The native CPU library, reached through ctypes."""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np

import dtta_fast.kernels

NAME = {"win32": "dtta_kernels.dll", "darwin": "libdtta_kernels.dylib"}.get(sys.platform, "libdtta_kernels.so")


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The library that the build put beside this package, or None where it was built without a compiler."""
    for folder in dtta_fast.kernels.__path__:
        path = Path(folder) / NAME
        if path.is_file():
            native = ctypes.CDLL(str(path))
            words = np.ctypeslib.ndpointer(np.uint32, flags="C_CONTIGUOUS")
            native.dtta_philox4x32_10.argtypes = [words, words, ctypes.c_int64, words]
            native.dtta_philox4x32_10.restype = None
            return native
    return None


def philox(counters: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Philox4x32-10 words [N, 4] of uint32 counters [N, 4] under a uint32 key [2].

    Raises:
        RuntimeError: the library was not built.
    """
    native = library()
    if native is None:
        raise RuntimeError(f"{NAME} was not built: install a C++17 compiler and run pip install --force-reinstall --no-deps again")
    counters, key = np.ascontiguousarray(counters, np.uint32), np.ascontiguousarray(key, np.uint32)
    if counters.ndim != 2 or counters.shape[1] != 4 or key.shape != (2,):
        raise ValueError(f"counters has shape {counters.shape} and key {key.shape}; give [N, 4] and [2]")
    words = np.empty_like(counters)
    native.dtta_philox4x32_10(counters, key, len(counters), words)
    return words
