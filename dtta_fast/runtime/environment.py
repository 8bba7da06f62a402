"""Describes this machine: versions, devices, and the backend of the ops."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from dtta_fast.kernels import backends, native

PACKAGES = ("dtta-fast", "torch", "triton", "torchvision", "diffusers", "timm", "transformers", "safetensors", "numpy")


def describe() -> dict[str, str]:
    """Returns names and values in the order in which to print them."""
    threads = torch.get_num_threads()
    machine = f"{platform.system()} {platform.machine()}, {threads} thread{'s' * (threads > 1)}"
    found = {"python": platform.python_version(), "machine": machine}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    gpus = [device_name(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]
    found["GPUs"] = ", ".join(gpus) or "none"
    found["native library"] = "built" if native.library() is not None else "not built (was there a C++17 compiler at installation?)"
    for device in ("cpu", "cuda"):
        found[f"ops on {device}"] = "{}: {}".format(*backends.serving(device))
    return found


def device_name(device: torch.device) -> str:
    """Returns the name of the GPU or the processor, if the system provides it."""
    if device.type == "cuda":
        try:
            return torch.cuda.get_device_name(device)
        except (RuntimeError, AssertionError) as error:  # RuntimeError: broken driver; AssertionError: torch without CUDA
            return f"a GPU that cannot be asked for its name ({str(error).splitlines()[0]})"
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def load_average() -> list[float] | None:
    """Returns the load averages over 1, 5 and 15 minutes, or None if the system has none (Windows)."""
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else None
