"""Writes a Chrome trace of a call that shows the engine's phases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.gpu_stages.timing import synchronize
from dtta_fast.measure.profiling import Annotator
from dtta_fast.runtime.phases import listening

LARGEST = 15 * 2**20  # bytes; a trace of this size is easy to copy and to open


def trace(call: Callable[[], Any], path: Path, device: torch.device) -> dict[str, Any]:
    """Writes the compressed trace of one call, which chrome://tracing and ui.perfetto.dev open.

    It shows the operators, or only the kernels if the file would be too large.
    """
    cpu, cuda = torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA
    on_cuda = device.type == "cuda"
    for activities in ([cpu, cuda], [cuda]) if on_cuda else ([cpu],):
        with torch.profiler.profile(activities=activities) as profiler, listening(Annotator()):
            call()
            synchronize(device)
        profiler.export_chrome_trace(str(path))
        size = path.stat().st_size
        if size <= LARGEST:
            return {"file": path.name, "bytes": size, "operators": cpu in activities}
        path.unlink()
    return {"left out": f"the trace takes {size} bytes, over the {LARGEST} of a file"}
