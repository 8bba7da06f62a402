"""Adapts to the first images in a fresh process: `python -m dtta_fast.measure.first_image`, which benchmark.first_image starts and times.

Reads request.json and images.safetensors from the working folder, and writes result.json there. Resident memory is None if the system has
no /proc.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Imports, loads and adapts, and writes the seconds of each and the memory; time counts from the start given in the request."""
    import timm  # noqa: F401 - it and the schedulers are what loading imports
    import torch
    from diffusers import DDPMScheduler  # noqa: F401
    from safetensors.torch import load_file

    from dtta_fast.config import AdaptConfig
    from dtta_fast.runs.models import load_pair
    from dtta_fast.session.adapter import Adapter

    imported, folder = time.time(), Path.cwd()
    request: dict[str, Any] = json.loads((folder / "request.json").read_text())
    os.chdir(request["folder"])  # model paths are relative to this folder
    device = torch.device(request["device"])
    model, denoiser = load_pair(request["model"], request["denoiser"])
    adapter = Adapter(model.to(device), denoiser.to(device), AdaptConfig(**request["config"]))
    images = load_file(folder / "images.safetensors")["images"].to(device)
    loaded, memory = time.time(), _memory(device)
    predictions = adapter.adapt(images).predictions.tolist()
    done, after = time.time(), _memory(device)
    seconds = {"imports": imported - request["start"], "loading": loaded - imported, "adaptation": done - loaded}
    memory = {name: {"before": memory[name][0], "peak": after[name][1]} for name in after}
    result = {"predictions": predictions, "total": done - request["start"], **seconds, "memory": memory}
    (folder / "result.json").write_text(json.dumps(result))


def _memory(device: Any) -> dict[str, Any]:
    """Current and peak bytes of the process' resident set, and of torch's allocations on a GPU."""
    import torch

    found: dict[str, Any] = {"resident": (None, None)}
    status = Path("/proc/self/status")  # getrusage would start from the parent's memory
    if status.is_file():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        found["resident"] = tuple(1024 * int(lines[name].split()[0]) for name in ("VmRSS", "VmHWM"))
    if device.type == "cuda":
        found["allocated"] = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    return found


if __name__ == "__main__":
    main()
