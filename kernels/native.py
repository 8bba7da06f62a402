"""The ops on the CPU, computed by the native library, which ctypes calls through its C ABI (kernels/cpp/dtta_ops.h)."""

from __future__ import annotations

import ctypes
import sys
from ctypes import c_char_p, c_double, c_int32, c_int64, c_uint64, c_void_p
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import dtta_fast.kernels
from dtta_fast.kernels import reference
from dtta_fast.kernels.pairs import Pairs

NAME = {"win32": "dtta_kernels.dll", "darwin": "libdtta_kernels.dylib"}.get(sys.platform, "libdtta_kernels.so")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ABI_VERSION = 1  # dtta_ops.h
BAD_TIMESTEP, BAD_IMAGE_ID = 2, 3  # dtta_ops.h


class _PairsStruct(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("x0", "table", "timesteps", "image_ids", "noise")),
        *((name, c_int64) for name in ("table_rows", "images", "pairs", "elements")),
        *((name, c_int64) for name in ("step", "pair0")),
        ("seed", c_uint64),
        *((name, c_int32) for name in ("x0_type", "noise_type")),
    )


class _Mixture(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("logits", "embeddings", "chosen")),
        *((name, c_int64) for name in ("images", "classes", "numbers", "count")),
        ("logit_scale", c_double),
        *((name, c_int32) for name in ("logits_type", "embeddings_type", "per_image")),
    )


_SIGNATURES = {
    "dtta_add_noise": (c_int32, [c_void_p, c_void_p, c_int32, c_int32]),
    "dtta_denoising_loss": (c_int32, [c_void_p, c_void_p, c_int32, c_int64, c_int32, *[c_void_p] * 3, c_int64, c_int32]),
    "dtta_mix_condition": (c_int32, [*[c_void_p] * 3, c_int32]),
    "dtta_mix_condition_backward": (c_int32, [*[c_void_p] * 5, c_int32]),
    "dtta_philox4x32_10": (None, [c_void_p, c_void_p, c_int64, c_void_p]),
    "dtta_instruction_set": (c_char_p, []),
    "dtta_use_instruction_set": (c_int32, [c_char_p]),
    "dtta_use_thread_pool": (None, [c_void_p]),
    "dtta_abi": (c_int64, []),
}


def path() -> Path | None:
    """Returns where the build put the library, or None if it was built without a compiler."""
    return next((Path(folder) / NAME for folder in dtta_fast.kernels.__path__ if (Path(folder) / NAME).is_file()), None)


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """Loads the library that the build put next to this package. Returns None if it is missing or from an incompatible build."""
    found = path()
    native = None if found is None else ctypes.CDLL(str(found))
    if native is None or not _matches(native):
        return None
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(native, name)
        function.restype, function.argtypes = result, arguments
    native.dtta_use_thread_pool(_openmp())
    return native


def _matches(native: ctypes.CDLL) -> bool:
    """Checks that the library uses the structs of this file; a library from an older build would read past them."""
    if not hasattr(native, "dtta_abi"):
        return False
    native.dtta_abi.restype = c_int64
    return bool(native.dtta_abi() == ABI_VERSION * 10**6 + ctypes.sizeof(_PairsStruct) * 1000 + ctypes.sizeof(_Mixture))


def missing() -> str:
    """Explains why there is no library, and how to fix it."""
    what = "is of an older build: " if path() is not None else "was not built: install a C++17 compiler and "
    return f"{NAME} {what}run pip install --force-reinstall --no-deps again"


def _openmp() -> int | None:
    """Returns the address of this process's OpenMP entry point, so that the kernels share torch's thread pool.

    Two pools would compete for the same cores. As with torch in general, a process forked after the threads have run cannot use them.
    """
    function = getattr(ctypes.CDLL(None), "GOMP_parallel", None) if sys.platform != "win32" else None
    return None if function is None else ctypes.cast(function, c_void_p).value


def thread_pool() -> str:
    """Describes the threads on which the kernels run."""
    return "the process's OpenMP threads" if _openmp() else "threads of its own"


def _loaded() -> ctypes.CDLL:
    native = library()
    if native is None:
        raise RuntimeError(missing())
    return native


def instruction_set() -> str:
    """Returns the instruction set that the kernels use on this machine: "avx512", "avx2" or "portable"."""
    return _loaded().dtta_instruction_set().decode()


def use_instruction_set(name: str) -> None:
    """Selects an instruction set other than the fastest one, for tests and benchmarks.

    Raises:
        ValueError: this processor or build does not support it.
    """
    if _loaded().dtta_use_instruction_set(name.encode()):
        raise ValueError(f"name is {name!r}, which this processor or build does not have; it runs on {instruction_set()}")


def philox(counters: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Computes Philox4x32-10 words [N, 4] from uint32 counters [N, 4] and a uint32 key [2].

    Raises:
        RuntimeError: the library was not built.
    """
    native = _loaded()
    counters, key = np.ascontiguousarray(counters, np.uint32), np.ascontiguousarray(key, np.uint32)
    if counters.ndim != 2 or counters.shape[1] != 4 or key.shape != (2,):
        raise ValueError(f"counters has shape {counters.shape} and key {key.shape}; give [N, 4] and [2]")
    words = np.empty_like(counters)
    native.dtta_philox4x32_10(counters.ctypes.data, key.ctypes.data, len(counters), words.ctypes.data)
    return words


def _pointer(tensor: Tensor | None, *types: torch.dtype) -> int | None:
    """Returns the address of a tensor with one of these dtypes.

    C++ traverses the memory by dtype alone, so any other tensor could be read past its end.

    Raises:
        TypeError: the tensor has another dtype, is not contiguous, or is not on the CPU.
    """
    if tensor is None:
        return None
    if tensor.dtype not in types or tensor.device.type != "cpu" or not tensor.is_contiguous():
        laid = "" if tensor.is_contiguous() else ", not contiguous"
        names = ", ".join(str(kind) for kind in types)
        raise TypeError(f"a tensor is {tensor.dtype} on {tensor.device}{laid}; {NAME} takes contiguous ones on the CPU of {names}")
    return tensor.data_ptr()


def _type(tensor: Tensor | None) -> int:
    return 0 if tensor is None else TYPES[tensor.dtype]


def _ran(code: int) -> None:
    if code == BAD_TIMESTEP:
        raise ValueError("timesteps has values outside the table; give rows of it, 0 .. len(table) - 1")
    if code == BAD_IMAGE_ID:
        raise ValueError("image_ids has values outside a word; give 0 .. 2^32 - 1")
    if code:
        raise RuntimeError(f"{NAME} refused the call with code {code}; dtta_ops.h names it")


def _struct(pairs: Pairs) -> _PairsStruct:
    x0, table, timesteps, image_ids, seed, step, pair0, noise = pairs
    if not 0 <= int(step) < 2**32:
        raise ValueError(f"step has values {int(step)}; give 0 .. 2^32 - 1")
    words = _pointer(timesteps, torch.int64), _pointer(image_ids, torch.int64)
    pointers = _pointer(x0, *TYPES), _pointer(table, torch.float32), *words, _pointer(noise, *TYPES)
    sizes = len(table), *timesteps.shape, x0[0].numel()
    return _PairsStruct(*pointers, *sizes, int(step), pair0, seed, _type(x0), _type(noise))


def add_noise(pairs: Pairs, dtype: torch.dtype) -> Tensor:
    """Computes reference.add_noise for contiguous float32, bfloat16 and float16 tensors."""
    x_t = torch.empty((pairs.timesteps.numel(), *pairs.x0.shape[1:]), dtype=dtype, device="cpu")
    given = _struct(pairs)
    _ran(_loaded().dtta_add_noise(ctypes.byref(given), _pointer(x_t, dtype), TYPES[dtype], torch.get_num_threads()))
    return x_t


def denoising_loss(prediction: Tensor, pairs: Pairs, l1: bool, upstream: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Computes reference.denoising_loss for contiguous float32, bfloat16 and float16 tensors."""
    loss = torch.empty(pairs.timesteps.shape, dtype=torch.float32, device="cpu")
    gradient = None if upstream is None else torch.empty_like(prediction)
    given, stride = _struct(pairs), prediction[0].numel()
    rows = _pointer(prediction, *TYPES), _type(prediction), stride, l1
    written = _pointer(loss, torch.float32), _pointer(upstream, torch.float32), _pointer(gradient, prediction.dtype), stride
    _ran(_loaded().dtta_denoising_loss(ctypes.byref(given), *rows, *written, torch.get_num_threads()))
    return loss, gradient


def _mixture(logits: Tensor, embeddings: Tensor, chosen: Tensor | None, logit_scale: float | None, per_image: bool) -> _Mixture:
    pointers = _pointer(logits, *TYPES), _pointer(embeddings, *TYPES), _pointer(chosen, torch.int64)
    sizes = *logits.shape, embeddings[0, 0].numel() if per_image else embeddings[0].numel(), 0 if chosen is None else chosen.shape[1]
    return _Mixture(*pointers, *sizes, logit_scale or 0.0, _type(logits), _type(embeddings), per_image)


def _is_product(logits: Tensor, embeddings: Tensor, chosen: Tensor | None, per_image: bool) -> bool:
    """Checks whether several images share one full table, so that the mixture is a matrix product.

    torch then takes 0.4 times as long as the native kernel (16 images, 1000 classes of size 1152). It first converts a half-precision
    table, which pays off only for many images: with 4 images it takes 5 times as long.
    """
    return chosen is None and not per_image and len(logits) > (1 if embeddings.dtype == torch.float32 else 15)


def mix_condition(
    logits: Tensor, embeddings: Tensor, chosen: Tensor | None, logit_scale: float | None, per_image: bool
) -> tuple[Tensor, Tensor]:
    """Computes reference.mix_condition for contiguous float32, bfloat16 and float16 tensors."""
    if _is_product(logits, embeddings, chosen, per_image):
        return reference.mix_condition(logits, embeddings, chosen, logit_scale, per_image)
    mixture = _mixture(logits, embeddings, chosen, logit_scale, per_image)
    mixed = embeddings.new_empty((len(logits), *embeddings.shape[1 + per_image :]))
    weights = torch.empty(logits.shape, dtype=torch.float32, device="cpu")
    written = _pointer(weights, torch.float32), _pointer(mixed, embeddings.dtype)
    _ran(_loaded().dtta_mix_condition(ctypes.byref(mixture), *written, torch.get_num_threads()))
    return mixed, weights


def mix_condition_backward(
    upstream: Tensor,
    logits: Tensor,
    embeddings: Tensor,
    chosen: Tensor | None,
    weights: Tensor,
    logit_scale: float | None,
    per_image: bool,
    with_embeddings: bool,
) -> tuple[Tensor, Tensor | None]:
    """Computes reference.mix_condition_backward for contiguous float32, bfloat16 and float16 tensors."""
    if _is_product(logits, embeddings, chosen, per_image):
        return reference.mix_condition_backward(upstream, logits, embeddings, chosen, weights, logit_scale, per_image, with_embeddings)
    mixture = _mixture(logits, embeddings, chosen, logit_scale, per_image)
    to_logits = torch.empty_like(logits)
    to_embeddings = torch.empty_like(embeddings) if with_embeddings else None
    given = _pointer(upstream, embeddings.dtype), _pointer(weights, torch.float32)
    written = _pointer(to_logits, logits.dtype), _pointer(to_embeddings, embeddings.dtype)
    _ran(_loaded().dtta_mix_condition_backward(ctypes.byref(mixture), *given, *written, torch.get_num_threads()))
    return to_logits, to_embeddings
