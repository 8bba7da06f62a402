"""Measures the machine's peak operations and bytes per second, and how close a piece of work comes to them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dtta_fast.runtime.clock import Clock

SIZES = {"cpu": (256, 512, 1024, 2048), "cuda": (1024, 2048, 4096, 8192)}  # sizes of square matrices; one of them reaches the peak
COPIED = {"cpu": 2**27, "cuda": 2**30}  # bytes; more than the caches hold
ROUNDS = 3  # minimum number of runs; the first one fills caches and starts threads


@dataclass(frozen=True)
class Peak:
    """Best result of several runs: FLOP/s of a matrix product in `dtype`, and B/s of a copy, counting bytes read and written."""

    dtype: str
    flops: float
    bytes: float


def measured_peak(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> Peak:
    """Measures the peak of this device with torch's current number of threads, in about `seconds`.

    Multiplies square matrices in `dtype` under torch's current settings; if TF32 is on, float32 uses it, and the dtype of the peak is then
    "tf32". Copies a tensor that is larger than any cache. The fastest run counts.
    """
    tf32 = device.type == "cuda" and dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    kind = "cuda" if device.type == "cuda" else "cpu"
    flops, sizes = 0.0, SIZES[kind]
    for i, size in enumerate(sizes):
        a, b = (torch.randn(size, size, dtype=torch.float32, device=device).to(dtype) for _ in range(2))
        fastest = _fastest(functools.partial(torch.mm, a, b, out=torch.empty_like(a)), device, seconds / 2 / len(sizes))
        flops = max(flops, 2 * size**3 / fastest)
        if i + 1 < len(sizes) and ROUNDS * 2 * sizes[i + 1] ** 3 / flops > seconds / 2:  # the machine is slow in this dtype
            break
    source = torch.ones(COPIED[kind] // 4, dtype=torch.float32, device=device)
    copy = _fastest(functools.partial(torch.empty_like(source).copy_, source), device, seconds / 2)
    return Peak("tf32" if tf32 else str(dtype).removeprefix("torch."), flops, 2 * source.nbytes / copy)


def attained(seconds: float, flops: float, bytes: float, peak: Peak) -> float:
    """Share of the roofline: the longer of the two times that the work would take at the peaks, divided by the actual time; 0 if that is 0.

    A value near 1 is as fast as the machine can be. Values above 1 occur if data stayed in a cache that is faster than memory.
    """
    return max(flops / peak.flops, bytes / peak.bytes) / seconds if seconds > 0 else 0.0


@torch.no_grad()
def _fastest(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds of the fastest run; repeats the work for about `seconds`, at least ROUNDS times."""
    clock, fastest, rounds = Clock(device), float("inf"), 0
    begun = clock.now()
    while rounds < ROUNDS or clock.now() - begun < seconds:
        start = clock.now()
        work()
        fastest, rounds = min(fastest, clock.now() - start), rounds + 1
    return fastest
