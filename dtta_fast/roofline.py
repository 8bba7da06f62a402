"""What the machine attains: operations and bytes a second, measured, and how near to them a piece of work comes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dtta_fast.runtime.clock import Clock

SIZES = {"cpu": (256, 512, 1024, 2048), "cuda": (1024, 2048, 4096, 8192)}  # of square matrices; the peak is reached at one of them
COPIED = {"cpu": 2**27, "cuda": 2**30}  # bytes: more than caches hold
ROUNDS = 3  # at least: the first one fills caches and starts threads


@dataclass(frozen=True)
class Peak:
    """The best of some runs, FLOP/s of a matrix product in `dtype`, B/s of a copy: read and written bytes together."""

    dtype: str
    flops: float
    bytes: float


def measured_peak(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> Peak:
    """Measures the peak on this device with the threads that torch has now, in about `seconds`.

    The product is of square matrices in `dtype`, as torch computes it under its present settings: float32 in TF32 where that is on, and
    the peak is then called tf32. The copy is of a tensor that no cache holds. The fastest run counts.
    """
    tf32 = device.type == "cuda" and dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    kind = "cuda" if device.type == "cuda" else "cpu"
    flops, sizes = 0.0, SIZES[kind]
    for i, size in enumerate(sizes):
        a, b = (torch.randn(size, size, dtype=torch.float32, device=device).to(dtype) for _ in range(2))
        fastest = _fastest(functools.partial(torch.mm, a, b, out=torch.empty_like(a)), device, seconds / 2 / len(sizes))
        flops = max(flops, 2 * size**3 / fastest)
        if i + 1 < len(sizes) and ROUNDS * 2 * sizes[i + 1] ** 3 / flops > seconds / 2:  # a dtype that the machine is slow in
            break
    source = torch.ones(COPIED[kind] // 4, dtype=torch.float32, device=device)
    copy = _fastest(functools.partial(torch.empty_like(source).copy_, source), device, seconds / 2)
    return Peak("tf32" if tf32 else str(dtype).removeprefix("torch."), flops, 2 * source.nbytes / copy)


def attained(seconds: float, flops: float, bytes: float, peak: Peak) -> float:
    """The share of the roofline: the time that the peaks would have taken, the longer of both, divided by the time taken; 0 for no time.

    Near 1 is as fast as the machine is. Above 1 where data stayed in a cache that is faster than memory.
    """
    return max(flops / peak.flops, bytes / peak.bytes) / seconds if seconds > 0 else 0.0


@torch.no_grad()
def _fastest(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds of the fastest of the runs that fit."""
    clock, fastest, rounds = Clock(device), float("inf"), 0
    begun = clock.now()
    while rounds < ROUNDS or clock.now() - begun < seconds:
        start = clock.now()
        work()
        fastest, rounds = min(fastest, clock.now() - start), rounds + 1
    return fastest
