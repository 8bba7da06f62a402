"""Stage 1, the machine: versions, clocks, code that once broke on a GPU, and which attention backend serves heads of 72 numbers."""

from __future__ import annotations

import shutil
import subprocess
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch.nn.attention import sdpa_kernel

from bench.gpu_stages import models
from bench.gpu_stages.ceilings import BACKENDS, HEAD, heads, refused
from bench.gpu_stages.recording import Record, Setting, first_line
from bench.gpu_stages.timing import kernels_of
from dtta_fast import AdaptConfig, Adapter
from dtta_fast.core import optimizers

QUERY = (
    "name,driver_version,vbios_version,pstate,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,temperature.gpu,"
    "memory.total,memory.used,compute_mode,clocks_event_reasons.active"
)
BUSY = 8192  # side of the matrices that are multiplied to put the GPU under load


def run(setting: Setting, record: Record) -> None:
    """Runs all checks. They read the card's settings and change none."""
    device = setting.device
    if device.type != "cuda":
        record.needs_gpu("card", "idle")
    else:
        record.measure("card", "idle", card)
        record.measure("card", "torch", lambda: properties(device))
    for name in ("sgd", "adam", "adamw"):
        record.measure("broke once", f"{name} update", lambda name=name: update(name, device))
    record.measure("broke once", "ViT under vmap, 2 images, float32", lambda: vit(setting))
    for name in (None, *BACKENDS):
        record.measure("attention of head size 72", name or "torch's choice", lambda name=name: attention(name, device))
    if device.type == "cuda":
        record.measure("card", "busy", lambda: busy(device))


def card() -> dict[str, str]:
    """Queries nvidia-smi. An old driver does not know the name of the last field."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        raise FileNotFoundError("nvidia-smi is not on the PATH")
    fields = QUERY.split(",")
    for known in (fields, fields[:-1]):
        found = subprocess.run(
            [tool, f"--query-gpu={','.join(known)}", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
        if found.returncode == 0:
            return dict(zip(known, (value.strip() for value in found.stdout.splitlines()[0].split(",")), strict=True))
    raise RuntimeError(f"nvidia-smi: {found.stdout.strip() or found.stderr.strip()}")


def properties(device: torch.device) -> dict[str, Any]:
    """Collects what torch knows about the card, and its versions of CUDA and cuDNN."""
    found = torch.cuda.get_device_properties(device)
    names = ("major", "minor", "multi_processor_count", "total_memory", "L2_cache_size")
    versions = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return {**{name: getattr(found, name, None) for name in names}, **versions}


def busy(device: torch.device) -> dict[str, str]:
    """Queries the card while it works through a second of matrix products."""
    a, b = (torch.randn(BUSY, BUSY, device=device).bfloat16() for _ in range(2))
    for _ in range(600):
        torch.mm(a, b)
    found = card()
    torch.cuda.synchronize(device)
    return found


def update(optimizer: Any, device: torch.device) -> dict[str, Any]:
    """Makes one update with torch's fused kernels, as the engine does, and compares it with the same update on the CPU in float64.

    The learning rate used to be a float64 tensor, which the CUDA kernels do not accept.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 5, 7), (3, 64), (3, 2, 3, 4, 4))  # weights of three images
    own, gradients = ([torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes] for _ in range(2))
    results = []
    for place, dtype in ((torch.device("cpu"), torch.float64), (device, torch.float32)):
        weights, slopes = ([tensor.to(place, dtype, copy=True) for tensor in tensors] for tensors in (own, gradients))
        slots = optimizers.init_slots(optimizer, weights, images=3)
        step, lr = torch.zeros((), dtype=torch.int64, device=place), optimizers.rate(1e-2, place)
        optimizers.update_(optimizer, weights, slopes, slots, step, lr, 0.9, 0.01)
        results.append([tensor.double().cpu() for tensor in weights])
    change = max(float((new - old).abs().max()) for new, old in zip(results[0], own, strict=True))
    error = max(float((one - other).abs().max()) for one, other in zip(*results, strict=True))
    return {"largest change": change, "largest error": error, "fine": error < 1e-4 * change}


def vit(setting: Setting) -> dict[str, Any]:
    """Adapts to two images together and one by one, each with its own weights. Attention's backward once got an empty logsumexp here."""
    torch.manual_seed(0)
    with torch.device(setting.device):
        model = timm.create_model("test_vit", num_classes=models.CLASSES).eval()
    side = model.pretrained_cfg["input_size"][-1]
    torch.nn.init.normal_(model.get_classifier().weight, std=0.1)
    small = models.dit(Setting(setting.device, True, setting.out))
    adapter = Adapter(model, small, AdaptConfig(steps=2, pairs=4, optimizer="sgd", lr=1.0, precision="fp32"))
    images, latents = torch.rand(2, 3, side, side, device=setting.device), models.latents(2, small, setting)
    ids = torch.arange(2, device=setting.device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        together = adapter.adapt(images, latents=latents)
    alone = [adapter.adapt(images[i : i + 1], latents=latents[i : i + 1], image_ids=ids[i : i + 1]) for i in range(2)]
    change = float((together.outputs - together.outputs_before).abs().max())
    error = float((together.outputs - torch.cat([result.outputs for result in alone])).abs().max())
    return {
        "one by one": adapter.engine.program.problem.loop,
        "warnings": sorted({str(warning.message).splitlines()[0][:300] for warning in caught}),
        "largest change": change,
        "largest difference": error,
        "fine": not adapter.engine.program.problem.loop and change > 0 and error < 1e-2 * change,
    }


def attention(name: str | None, device: torch.device) -> dict[str, Any]:
    """Runs two rows in bfloat16, forward and backward, with a backend or with torch's choice. Returns what ran, or the refusal."""
    q, k, v = (tensor.requires_grad_() for tensor in heads(2, device))
    upstream = torch.randn_like(q)
    with warnings.catch_warnings(record=True) as caught, nullcontext() if name is None else sdpa_kernel(BACKENDS[name]):
        warnings.simplefilter("always")
        try:
            out = F.scaled_dot_product_attention(q, k, v)
            torch.autograd.grad(out, (q, k, v), upstream, retain_graph=True)
        except RuntimeError as error:
            if not refused(error):
                raise
            return {"refused": first_line(error), "because": sorted({str(warning.message)[:300] for warning in caught})}
        return {
            "head size": HEAD,
            "forward": ran(lambda: F.scaled_dot_product_attention(q, k, v), device),
            "backward": ran(lambda: torch.autograd.grad(out, (q, k, v), upstream, retain_graph=True), device),
        }


def ran(work: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Returns the names of the attention operators and, on a GPU, the longest kernels with their seconds."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        work()
    operators = sorted({event.name for event in profiler.events() if "attention" in event.name})
    return {"operators": operators, **({"kernels": kernels_of(work, device)["longest"]} if device.type == "cuda" else {})}
