"""Times code: warms up first, keeps the raw samples, and reports the median."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.gpu_stages.recording import first_line

SAMPLES = 200  # of a kernel's time to keep, at most


def summary(samples: list[float]) -> dict[str, Any]:
    """Returns the median and the samples, in seconds."""
    return {"median": statistics.median(samples), "samples": samples}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def whole_calls(work: Callable[[], Any], device: torch.device, most: int, seconds: float) -> list[float]:
    """Returns the seconds of each call until the device has finished: `most` calls, or those that fit in `seconds`, but at least one."""
    samples: list[float] = []
    synchronize(device)
    begun = time.perf_counter()
    while not samples or (len(samples) < most and time.perf_counter() - begun < seconds):
        start = time.perf_counter()
        work()
        synchronize(device)
        samples.append(time.perf_counter() - start)
    return samples


def by_events(work: Callable[[], Any], device: torch.device, most: int, seconds: float) -> list[float]:
    """Returns the seconds of each run between two CUDA events, or by a clock on a CPU.

    The device is idle before the first event. The first run is not counted.
    """
    if device.type != "cuda":
        work()
        return whole_calls(work, device, most, seconds)
    samples: list[float] = []
    begun = time.perf_counter()
    work()
    while not samples or (len(samples) < most and time.perf_counter() - begun < seconds):
        torch.cuda.synchronize(device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / 1000)
    return samples


def of_kernels(work: Callable[[], Any], device: torch.device) -> list[float]:
    """Returns the seconds of what `work` launches, by triton.testing.do_bench, or by a clock on a CPU.

    do_bench flushes the L2 cache before each run.
    """
    if device.type != "cuda":
        work()
        return whole_calls(work, device, 3, 0.1)
    from triton.testing import do_bench

    found: list[float] = do_bench(work, warmup=10, rep=50, return_mode="all")
    step = -(-len(found) // SAMPLES)
    return [milliseconds / 1000 for milliseconds in found[::step]]


def kernels_of(work: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Profiles one run: how many kernels and copies ran, the sum of their seconds, and the kernels that took the longest.

    If the profiler fails, its error takes the place of the number, so that earlier timings are not lost.
    """
    synchronize(device)
    try:
        spans = _spans(work, device)
    except (RuntimeError, AssertionError) as error:
        return {"launches": first_line(error), "kernel seconds": None, "longest": {}}
    by_name: dict[str, list[float]] = {}
    for name, seconds in spans:
        by_name.setdefault(name[:120], []).append(seconds)
    longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:15]
    return {
        "launches": len(spans),
        "kernel seconds": sum(seconds for _, seconds in spans),
        "longest": {name: {"launches": len(each), "seconds": sum(each)} for name, each in longest},
    }


def _spans(work: Callable[[], Any], device: torch.device) -> list[tuple[str, float]]:
    """Returns the name and seconds of each kernel and copy."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        work()
        synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    return [(event["name"], event["dur"] / 1e6) for event in events if event.get("cat") in kinds]
