"""Whole calls of adapt() on the digits zoo under FAST without its pre-check; ratios hold within one run.

pytest bench/end_to_end --benchmark-json=bench/results/end_to_end_cpu.json --benchmark-save-data --benchmark-disable-gc

16 images in one call against 16 calls; one image again and again, for its percentiles; and, in processes of their own, the first
image with an empty compile cache and with a kept one, and the peak memory of long and short steps.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dtta_fast import Adapter, presets, zoo
from dtta_fast.measure.benchmark import first_image
from dtta_fast.runtime.environment import describe

BENCH = Path(__file__).parents[1]
FAST = presets.FAST.replace(precheck="off")  # which would leave these clean images alone: every image here is adapted
WAYS = {
    "float32": {},
    "float32, compiled step": {"compile": "step"},
    "bf16": {"precision": "bf16"},
}


def run(script: str, *arguments: str, **environment: str) -> list[float]:
    command = [sys.executable, str(BENCH / script), *arguments]
    found = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **environment})
    return [float(value) for value in found.stdout.split()]


@pytest.mark.parametrize("form", ["16 calls", "one call"])
@pytest.mark.parametrize("way", WAYS)
def test_sixteen_images(benchmark, way, form):
    model, denoiser = zoo.load("digits")
    images, ids = zoo.example("digits")[0][:16], torch.arange(16)
    adapter = Adapter(model, denoiser, FAST.replace(**WAYS[way]))
    parts = [slice(0, 16)] if form == "one call" else [slice(i, i + 1) for i in range(16)]
    warmup = adapter.warmup(images[parts[0]])
    benchmark.extra_info.update(way=way, form=form, images=16, warmup=warmup, environment=describe())
    benchmark.pedantic(lambda: [adapter.adapt(images[p], image_ids=ids[p]) for p in parts], rounds=7, iterations=1, warmup_rounds=1)


def test_one_image(benchmark):
    model, denoiser = zoo.load("digits")
    images, _ = zoo.example("digits")
    adapter = Adapter(model, denoiser, FAST)
    benchmark.extra_info.update(environment=describe())
    benchmark.pedantic(lambda: adapter.adapt(images[:1]), rounds=100, iterations=1, warmup_rounds=5)


@pytest.mark.parametrize("compile", ["off", "regional", "step"])
def test_first_image(benchmark, tmp_path, compile):
    images = zoo.example("digits")[0][:1]

    def start() -> list[float]:
        found = first_image(None, None, images, FAST.replace(compile=compile), tmp_path)
        return [found["total"], found["adaptation"]]

    cold = start()
    kept: list[list[float]] = []
    benchmark.pedantic(lambda: kept.append(start()), rounds=3, iterations=1, warmup_rounds=0)
    benchmark.extra_info.update(compile=compile, cold=cold, kept=kept, environment=describe())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_peak_memory(benchmark, precision):
    lengths = (15, 180)
    resident = {pairs: run("step/memory.py", str(pairs), precision) for pairs in lengths}
    # malloc's own threshold grows with what is freed, and then keeps it
    trimmed = {pairs: run("step/memory.py", str(pairs), precision, MALLOC_TRIM_THRESHOLD_="16777216") for pairs in lengths}
    allocated = {pairs: run("step/memory.py", str(pairs), precision, "allocated") for pairs in lengths}
    benchmark.extra_info.update(precision=precision, mebibytes=resident, trimmed=trimmed, allocated=allocated, environment=describe())
    benchmark.pedantic(lambda: None, rounds=1, iterations=1)
