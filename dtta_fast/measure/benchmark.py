"""Latency, throughput, memory, cold start and roofline of an adaptation, together with its number of evaluations and its accuracy."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dtta_fast.config import AdaptConfig
from dtta_fast.denoisers.base import Denoiser
from dtta_fast.measure.counting import Counter
from dtta_fast.measure.roofline import attained, measured_peak
from dtta_fast.session.adapter import Adapter
from dtta_fast.session.precision import products

FEWEST_ROUNDS = 3  # minimum rounds per batch
CALLS_BEFORE = 5  # untimed calls after the warm-up, since other images may take other code paths
FEWEST_CALLS = 20  # minimum number of calls for meaningful percentiles
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")

Advance = Callable[[str], None]


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99, interpolated linearly between at least two samples, and the ratio of p99 to p50."""
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98], "p99_over_p50": cuts[98] / cuts[49]}


def latency(
    adapter: Adapter, images: Tensor, calls: int, labels: Tensor | None = None, advance: Advance = lambda stage: None
) -> dict[str, Any]:
    """Measures the latency of adapting to one image at a time, until the prediction is on the host.

    Cycles through images [N, 3, H, W]; call i uses image id i.

    Args:
        calls: number of timed calls after a warm-up. labels: [N]. advance: called after each call.

    Returns:
        seconds and evaluations of each call; percentiles over all calls, and, under same_work, over the calls with the most common number
        of evaluations, since a guard and a pre-check need more on some images; evaluations_per_image; accuracy before and after
        adaptation in 0..1, or None without labels; warmup, the seconds of Adapter.warmup.

    Raises:
        ValueError: fewer than 20 calls.
    """
    check_calls(calls)
    adapter.reset()
    warmup = adapter.warmup(images[:1])
    answers: list[int] = []
    before: list[int] = []
    seconds: list[float] = []
    evaluations: list[int] = []
    for i in range(CALLS_BEFORE):
        _call(adapter, images, i)
    adapter.reset()
    for i in range(calls):
        start = time.perf_counter()
        result = _call(adapter, images, i)
        answers.append(int(result.predictions[0]))
        seconds.append(time.perf_counter() - start)
        before.append(int(result.predictions_before[0]))
        evaluations.append(int(result.evaluations[0]))
        advance("latency")
    usual = statistics.mode(evaluations)
    same = [taken for taken, count in zip(seconds, evaluations, strict=True) if count == usual]
    accuracy = None
    if labels is not None:
        truth = [int(labels[i % len(labels)]) for i in range(calls)]
        right = [sum(a == b for a, b in zip(found, truth, strict=True)) / calls for found in (before, answers)]
        accuracy = {"before": right[0], "after": right[1]}
    return {
        "calls": calls,
        "warmup": warmup,
        **percentiles(seconds),
        "same_work": {"evaluations": usual, "calls": len(same), **(percentiles(same) if len(same) > 1 else {})},
        "evaluations_per_image": sum(evaluations) / calls,
        "accuracy": accuracy,
        "seconds": seconds,
        "evaluations": evaluations,
    }


def throughput(adapter: Adapter, images: Tensor, rounds: int, advance: Advance = lambda stage: None) -> dict[str, Any]:
    """Adapts repeatedly to a batch [B, 3, H, W] with image ids 0 .. B - 1, and times each round until the predictions are on the host.

    Returns:
        batch; seconds of each round, and images_per_second from their median; evaluations of the batch; warmup as in latency().
    """
    adapter.reset()
    warmup, seconds, evaluations = adapter.warmup(images), [], 0
    for _ in range(rounds):
        start = time.perf_counter()
        result = adapter.adapt(images)
        result.predictions.tolist()
        seconds.append(time.perf_counter() - start)
        evaluations = int(result.evaluations.sum())
        advance(f"batch of {len(images)}")
    rate = len(images) / statistics.median(seconds)
    return {"batch": len(images), "images_per_second": rate, "evaluations": evaluations, "warmup": warmup, "seconds": seconds}


def flops(model: nn.Module, denoiser: Denoiser, config: AdaptConfig, images: Tensor) -> int:
    """Floating-point operations of the matrix products, convolutions and attention in one adaptation to a batch [B, 3, H, W].

    They are counted in eager mode, since a compiled graph hides its operators; compilation changes none of these operations.
    """
    adapter = Adapter(model, denoiser, config.replace(compile="off"))
    adapter.adapt(images)  # the first call also runs forward passes to measure memory
    adapter.reset()
    with Counter() as counter:
        adapter.adapt(images)
    return sum(count.flops for count in counter.counts.values())


def first_image(
    model: str | None, denoiser: str | None, images: Tensor, config: AdaptConfig, caches: str | Path | None = None
) -> dict[str, Any]:
    """Adapts to images [B, 3, H, W] on their device in a separate process.

    Args:
        model, denoiser: as in runs.models.load_pair. caches: a folder for the compiler caches that persist between processes; None uses
            the default folders.

    Returns:
        Seconds: total, from the start of the process until the predictions are on the host, and its parts: imports (including the start
        of Python), loading, adaptation. memory: bytes before the adaptation and at the peak of the process,
        {"resident": {"before", "peak"}}, and on a GPU also "allocated" by torch. predictions: the predictions.

    Raises:
        ChildProcessError: the process failed; the message contains the last line of its output.
    """
    from safetensors.torch import save_file

    # run in a separate folder, because Python searches its start folder first for modules
    with tempfile.TemporaryDirectory() as folder:
        save_file({"images": images.cpu().contiguous()}, Path(folder, "images.safetensors"))
        request = {"model": model, "denoiser": denoiser, "device": str(images.device), "config": asdict(config), "folder": os.getcwd()}
        Path(folder, "request.json").write_text(json.dumps({**request, "start": time.time()}))
        kept = {} if caches is None else dict.fromkeys(CACHES, str(Path(caches).resolve()))
        command = [sys.executable, "-m", "dtta_fast.measure.first_image"]
        ended = subprocess.run(command, cwd=folder, env={**os.environ, **kept}, capture_output=True, text=True, check=False)
        if ended.returncode:
            last = (ended.stderr.strip() or "no message").splitlines()[-1]
            raise ChildProcessError(f"the process of the first image ended with status {ended.returncode}: {last}")
        found: dict[str, Any] = json.loads(Path(folder, "result.json").read_text())
    return found


def run(
    model: nn.Module,
    denoiser: Denoiser,
    images: Tensor,
    labels: Tensor | None,
    config: AdaptConfig,
    *,
    names: tuple[str | None, str | None],
    calls: int,
    batches: Sequence[int],
    advance: Advance = lambda stage: None,
) -> dict[str, Any]:
    """Runs all measurements on the device of the images [N, 3, H, W].

    Args:
        labels: [N] or None. names: names of the model and the denoiser, from which a separate process loads them (see first_image). calls:
            number of single-image calls for latency; each batch size gets a 20th of them, but at least 3. batches: batch sizes, up to N.
            advance: called after each call or process, rounds_of(calls, batches) times.

    Returns:
        latency; throughput, one row per batch size, with its flops, flops_per_second, share_of_peak and memory; cold_start with empty and
        with kept compiler caches, or {"error"} if that process failed; peak, of matrix products in the denoiser's precision and of copies.

    Raises:
        ValueError: too few calls, a batch of 0, or a config that does not fit.
    """
    check_calls(calls)
    check_batches(batches)
    adapter = Adapter(model, denoiser, config)
    one = latency(adapter, images, calls, labels, advance)
    with products(config.precision, images.device):
        peak = measured_peak(images.device, adapter.engine.program.problem.denoiser.dtype)
    rows = []
    for batch in batches:
        row = throughput(adapter, images[:batch], _rounds(calls), advance)
        operations = flops(model, denoiser, config, images[:batch])
        taken = statistics.median(row["seconds"])
        rows.append(
            {**row, "flops": operations, "flops_per_second": operations / taken, "share_of_peak": attained(taken, operations, 0, peak)}
        )
    if images.device.type == "cuda":
        torch.cuda.empty_cache()  # the processes below use the same device
    with tempfile.TemporaryDirectory() as caches:

        def fresh(batch: int) -> dict[str, Any]:
            try:
                return first_image(*names, images[:batch], config, caches)
            except ChildProcessError as error:  # keep the earlier measurements
                return {"error": str(error)}

        starts = {}
        for cache in ("empty", "kept"):
            starts[cache] = fresh(1)
            advance("fresh process")
        for row, batch in zip(rows, batches, strict=True):
            row["memory"] = (starts["kept"] if batch == 1 else fresh(batch)).get("memory", {})
            advance("fresh process")
    return {"latency": one, "throughput": rows, "cold_start": starts, "peak": asdict(peak)}


def rounds_of(calls: int, batches: Sequence[int]) -> int:
    """Number of times that run() calls `advance`."""
    return calls + len(batches) * (_rounds(calls) + 1) + 2


def check_calls(calls: int) -> None:
    """Raises ValueError if there are too few calls for meaningful percentiles."""
    if calls < FEWEST_CALLS:
        raise ValueError(f"calls is {calls}; give {FEWEST_CALLS} or more, 200 for a p99 that two calls stand behind")


def check_batches(batches: Sequence[int]) -> None:
    """Raises ValueError if there are no batch sizes, one is below 1, or one occurs twice."""
    if not batches or min(batches) < 1 or len(set(batches)) != len(batches):
        raise ValueError(
            f"batches is {', '.join(map(str, batches)) or 'empty'}; give different whole numbers of at least 1, such as 1 4 16"
        )


def _rounds(calls: int) -> int:
    return max(FEWEST_ROUNDS, calls // 20)


def _call(adapter: Adapter, images: Tensor, i: int) -> Any:
    row = i % len(images)
    return adapter.adapt(images[row : row + 1], image_ids=torch.tensor([i], dtype=torch.int64, device=images.device))
