"""Measures a session's calls: the first call, latency, steps, launches, memory and the denoiser's evaluations."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bench.gpu_stages.recording import NEEDS_GPU, Setting
from bench.gpu_stages.timing import by_events, kernels_of, summary, synchronize, whole_calls
from dtta_fast import Adapter
from dtta_fast.session.loop import Batch

STEPS = 20  # timed steps, at most
SLOW = 10.0  # seconds; a call that takes longer is the last one to warm up


def measured(adapter: Adapter, images: Tensor, latents: Tensor | None, setting: Setting, most: int, seconds: float) -> dict[str, Any]:
    """Times at most `most` calls in about `seconds`, after two warm-up calls (one if it is slow); then times steps and profiles a call."""
    device, found = setting.device, {}

    def call() -> Any:
        return adapter.adapt(images, latents=latents)

    for name in ("first", "second"):  # libraries plan and code is compiled here, outside the samples
        start = time.perf_counter()
        result = call()
        synchronize(device)
        found[name] = time.perf_counter() - start
        if found[name] > SLOW:
            break
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    found["seconds"] = summary(whole_calls(call, device, most, seconds))
    if device.type == "cuda":
        found["peak bytes"] = torch.cuda.max_memory_allocated(device)
    config, problem = adapter.config, adapter.engine.program.problem
    of_steps = config.steps * config.pairs * problem.forwards()
    found |= {
        "images": len(images),
        "precision": config.precision,
        "compile": config.compile,
        "evaluations": result.evaluations.tolist(),
        "of steps": of_steps,
        "guarded": int((result.evaluations > of_steps).sum()),
        "accepted": int(result.accepted.sum()),
        "loss": result.loss.mean(0).tolist(),
        "chunk": adapter.engine.program.schedule.chunk,
        "rows of a guard": adapter.engine.program.schedule.guard_rows,
        "phases": result.seconds,
    }
    found["step"] = _step(adapter, images, latents, setting, seconds / 4)
    if device.type == "cuda":
        launched = kernels_of(call, device)
        busy = launched["kernel seconds"] and launched["kernel seconds"] / found["seconds"]["median"]
        found |= {**launched, "busy": busy}
    else:
        found |= dict.fromkeys(("peak bytes", "launches", "busy"), NEEDS_GPU)
    return found


def _step(adapter: Adapter, images: Tensor, latents: Tensor | None, setting: Setting, seconds: float) -> dict[str, Any]:
    """Times a step with as many images as run at once."""
    with prepared(adapter, images, latents) as (state, batch):
        samples = by_events(lambda: adapter.engine.program.step(state, batch, 0), setting.device, STEPS, seconds)
    return {**summary(samples), "images": len(batch.image_ids)}


@contextmanager
def prepared(adapter: Adapter, images: Tensor, latents: Tensor | None) -> Iterator[tuple[Any, Batch]]:
    """Puts the engine into a call, before the first step; yields the state, and the batch of images that run at once."""
    engine = adapter.engine
    with torch.enable_grad(), engine.context():
        engine.refresh()
        yield engine.program.begin(adapter.crop(images), torch.arange(len(images), device=images.device), latents)


def forget() -> None:
    """Frees the memory of deleted sessions, because a new session plans with what is free."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
