"""Compares time and work with the machine's peaks, and finds the bottleneck of the longest phase."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dtta_fast.config import AdaptConfig
from dtta_fast.measure.counting import Count
from dtta_fast.measure.roofline import Peak, attained, measured_peak
from dtta_fast.runtime.phases import OTHER

NEAR = 0.2  # share of a peak from which work counts as bound by it; the peak was measured on one large, uninterrupted operator
SMALL = 5e-5  # seconds that an operator's work would take at the peaks; below this, the call overhead dominates


@dataclass(frozen=True)
class Row:
    """A phase or an operator.

    share: share of the total time. flops, bytes: counted over all its calls. of_flops, of_bytes: shares of the peaks. attained: share of
    the roofline, the larger of the two. kernel: on CUDA, the name of its longest-running device kernel.
    """

    name: str
    seconds: float
    share: float
    calls: int
    flops: int
    bytes: int
    flops_per_second: float
    bytes_per_second: float
    of_flops: float
    of_bytes: float
    attained: float
    kernel: str = ""

    @classmethod
    def of(cls, name: str, seconds: float, whole: float, count: Count, peak: Peak, kernel: str = "") -> Row:
        flops, moved = (amount / seconds if seconds > 0 else 0.0 for amount in (count.flops, count.bytes))
        return cls(
            name=name,
            seconds=seconds,
            share=seconds / whole,
            calls=count.calls,
            flops=count.flops,
            bytes=count.bytes,
            flops_per_second=flops,
            bytes_per_second=moved,
            of_flops=flops / peak.flops,
            of_bytes=moved / peak.bytes,
            attained=attained(seconds, count.flops, count.bytes, peak),
            kernel=kernel,
        )


def bottleneck(phases: Sequence[Row], config: AdaptConfig, peak: Peak, device: torch.device) -> str:
    """Describes in one sentence what bounds the longest phase, according to its figures, and what would shorten it."""
    row = max((phase for phase in phases if phase.name != OTHER), key=lambda phase: phase.seconds)  # no remedy for time outside phases
    shares = f"{100 * row.of_flops:.0f} % of the {peak.dtype} peak and {100 * row.of_bytes:.0f} % of the memory bandwidth"
    found = f"{row.name[0].upper()}{row.name[1:]} takes {100 * row.share:.0f} % of the time at {shares}: "
    each = row.seconds / row.calls if row.calls else 0.0
    if row.attained >= NEAR and row.of_flops >= row.of_bytes:
        return f"{found}bound by computation; {_less_work(row.name, config)} would shorten it{_half(config, peak, device)}."
    if row.attained >= NEAR:
        return f"{found}bound by memory bandwidth; {_fewer_bytes(row.name, config)} would shorten it."
    at_peak = f"{1e6 * each:,.0f} µs each on average, of which the peaks would take {1e6 * each * row.attained:,.0f}"
    if each * row.attained < SMALL:
        better = "graphs" if device.type == "cuda" else "regional"
        remedy = "more images at once" + (f" or compile={better!r}" if config.compile == "off" else "")
        return f"{found}bound by the overhead of many small operators ({row.calls:,}, {at_peak}); {remedy} may shorten it."
    return f"{found}bound by none of them; its {row.calls:,} operators are not small ({at_peak}): their kernels are slow here."


def _less_work(phase: str, config: AdaptConfig) -> str:
    if phase == "guard":
        return f"fewer pairs in the guard (guard is {config.guard})"
    if phase in ("classifier", "optimizer", "restore", "encode"):
        return f"fewer steps (steps is {config.steps})" if phase != "encode" else "latents given with the images"
    return f"fewer pairs or steps (pairs is {config.pairs}, steps {config.steps})"


def _fewer_bytes(phase: str, config: AdaptConfig) -> str:
    if phase in ("classifier", "optimizer", "restore") and config.parameters == "all":
        return "fewer weights that move (parameters is 'all': norm, head and lora move less)"
    return _less_work(phase, config)


def _half(config: AdaptConfig, peak: Peak, device: torch.device) -> str:
    """Suggests half precision if its measured peak is higher on this machine."""
    if peak.dtype != "float32" or config.precision != "auto":
        return ""
    factor = measured_peak(device, torch.bfloat16, 0.5).flops / peak.flops
    return f", and precision='bf16' may: its peak here is {factor:.1f} times as high" if factor > 1.1 else ""
