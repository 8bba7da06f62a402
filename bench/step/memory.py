"""Peak memory of one adaptation of DiT-S/2 + ResNet-18 in chunks of 15, in MiB: python bench/step/memory.py PAIRS [bf16] [allocated]

A process of its own, since the system keeps one peak a process. Printed: the highest resident memory, and what was resident before
the adaptation; or what torch had allocated at its highest beyond what it had before. The two differ by what malloc keeps of freed memory.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from diffusers import DDPMScheduler

from dtta_fast import AdaptConfig, Adapter
from dtta_fast.denoisers.dit import DiT
from dtta_fast.denoisers.dit_network import DiTNetwork
from dtta_fast.denoisers.noise_process import NoiseProcess


def mebibytes(field: str) -> int:
    """Reads VmHWM (highest) or VmRSS (resident) of this process; getrusage would start at what the parent had."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) // 1024


def allocated(run: Callable[[], object]) -> float:
    """By torch, at the highest, beyond what it had before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    totals = sorted((event["ts"], event["args"]["Total Allocated"]) for event in events if event.get("name") == "[memory]")
    return (max(total for _, total in totals) - totals[0][1]) / 2**20


if __name__ == "__main__":
    pairs, precision = int(sys.argv[1]), "bf16" if "bf16" in sys.argv else None
    denoiser = DiT(DiTNetwork(32, 2, 4, 384, 12, 6), NoiseProcess.from_scheduler(DDPMScheduler(1000, beta_schedule="linear")))
    config = AdaptConfig(steps=1, pairs=pairs, chunk=15, precision=precision)
    adapter = Adapter(timm.create_model("resnet18"), denoiser, config)
    before = mebibytes("VmRSS")
    run = lambda: adapter.adapt(torch.rand(1, 3, 224, 224), latents=torch.randn(1, 4, 32, 32))  # noqa: E731
    if "allocated" in sys.argv:
        print(allocated(run))
    else:
        run()
        print(mebibytes("VmHWM"), before)
