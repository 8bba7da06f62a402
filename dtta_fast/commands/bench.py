"""`dtta bench`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.table import Table

from dtta_fast.commands.common import (
    Name,
    OutFile,
    Settings,
    check_path,
    checked_device,
    holds,
    progress_bar,
    quiet,
    shown,
    terminal,
    write_json,
)
from dtta_fast.commands.subjects import EVERY_IMAGE, load_subject
from dtta_fast.measure import benchmark
from dtta_fast.runtime import environment
from dtta_fast.session.checks import check_calibration


@dataclass(frozen=True)
class Bench:
    """Benchmark adaptation on this machine: latency, throughput, memory, cold start and accuracy.

    Also reports the fraction of the machine's peak performance. By default it runs the digits zoo on digits-C, cycling through the
    corruptions. Regardless of the preset, precheck is off unless a flag sets it, so that every image is adapted and its full cost is
    measured. With --precheck answer, the images that are not adapted are included in the measurements.

    Example: dtta bench --calls 20 --batches 1 4 --json bench.json
    """

    model: Name = None
    """Classifier: a timm name, hf-hub:ID, or a folder in timm's format; requires --denoiser."""
    denoiser: Name = None
    """DiT for the same classes: a folder or a hub id; requires --model."""
    images: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="(default: digits-C, or random pixels)")] = None
    """Folder of unlabeled images for these models; random pixels if omitted, which give a guard more candidates to compare."""
    calls: int = 200
    """Single-image calls for the percentiles, at least 20; each batch size runs a 20th of that number."""
    batches: tuple[int, ...] = (1, 4, 16)
    """Batch sizes for throughput and memory: 1 4 16."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device on which both models run."""
    json: OutFile = None
    """Also write the result, with the duration of every call in seconds, to this file."""
    preset: str = "FAST"
    """FAST, RANK, PAPER, ONLINE or DUSA: the starting point of the settings below. FAST, RANK and ONLINE need a calibration."""
    config: Settings = EVERY_IMAGE
    """Adaptation settings; their defaults come from the preset."""

    def run(self) -> None:
        """Raises ValueError for bad arguments, models or images, before measuring anything."""
        check_path("json", self.json, holds("benchmark", "environment"))
        benchmark.check_calls(self.calls)
        benchmark.check_batches(self.batches)
        device = checked_device(self.device)
        about = {
            "benchmark": "bench",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "load_average": environment.load_average(),
            "preset": self.preset.upper(),
            "device": environment.device_name(device),
            "threads": torch.get_num_threads(),
        }
        quiet()
        with progress_bar() as progress:
            bar = progress.add_task("loading", total=benchmark.rounds_of(self.calls, self.batches))
            subject = load_subject(self.model, self.denoiser, self.images, max(self.calls, *self.batches), device)
            check_calibration(subject.denoiser, self.config)
            found = benchmark.run(
                subject.model,
                subject.denoiser,
                subject.images,
                subject.labels,
                self.config,
                names=(self.model, self.denoiser),
                calls=self.calls,
                batches=self.batches,
                advance=lambda stage: progress.update(bar, description=shown(stage), advance=1),
            )
        result = {**about, "subject": subject.name, **found, "config": asdict(self.config), "environment": environment.describe()}
        write_json(self.json, result)
        _print_bench(result)


def _print_bench(result: dict[str, Any]) -> None:
    console, one, config = terminal(), result["latency"], result["config"]
    where = f"{shown(result['subject'])}, preset {result['preset']}, {shown(result['device'])}, {result['threads']} threads"
    console.print(_latency(one, where))
    console.print(_throughput(result))
    starts = Table(title="Cold start: a fresh process to its first image, seconds")
    starts.add_column("caches of compilers")
    for head in ("total", "imports", "loading", "adaptation"):
        starts.add_column(head, justify="right")
    for cache, row in result["cold_start"].items():
        failed = "error" in row
        starts.add_row(cache, *("failed" if failed else f"{row[name]:.2f}" for name in ("total", "imports", "loading", "adaptation")))
    for cache, row in result["cold_start"].items():
        if "error" in row:
            starts.caption = f"{cache}: {shown(row['error'])}"
    console.print(starts)
    peak = result["peak"]
    console.print(f"Peak measured here: {peak['flops'] / 1e12:.3g} TFLOP/s in {peak['dtype']}, copies {peak['bytes'] / 1e9:.3g} GB/s.")
    if one["accuracy"] is None:
        console.print(f"{one['evaluations_per_image']:.1f} evaluations an image; the images have no labels, so accuracy is not known.")
    else:
        before, after = (100 * one["accuracy"][when] for when in ("before", "after"))
        cost = f"{one['evaluations_per_image']:.1f} evaluations an image, precheck {config['precheck']}"
        console.print(f"Accuracy {before:.1f} -> {after:.1f} % on the {one['calls']} images, {cost}.")


def _latency(one: dict[str, Any], where: str) -> Table:
    table = Table(title=f"{where}\nLatency of one image, milliseconds")
    table.add_column("calls")
    for head in ("p50", "p95", "p99", "p99/p50"):
        table.add_column(head, justify="right")
    same = one["same_work"]
    rows = {f"all {one['calls']}": one}
    if "p50" in same and same["calls"] < one["calls"]:
        rows[f"{same['calls']} of {same['evaluations']} evaluations each"] = same
    for name, row in rows.items():
        table.add_row(name, *(f"{1e3 * row[q]:.1f}" for q in ("p50", "p95", "p99")), f"{row['p99_over_p50']:.2f}")
    warmup = one["warmup"]
    table.caption = f"warm-up: {warmup['cold']:.2f} s cold, {warmup['warm']:.2f} s warm"
    return table


def _throughput(result: dict[str, Any]) -> Table:
    kinds = list(dict.fromkeys(kind for row in result["throughput"] for kind in row["memory"]))
    table = Table(title="Throughput and memory", caption="memory: MiB of a fresh process, before its adaptation -> peak")
    heads = ("batch", "images/s", "evals/img", "TFLOP/s", "of peak", "warm-up s", *kinds)
    for head in heads:
        table.add_column(head, justify="right")
    for row in result["throughput"]:
        sizes = [row["memory"].get(kind, {"before": None, "peak": None}).values() for kind in kinds]
        memory = [" -> ".join("-" if size is None else f"{size / 2**20:.0f}" for size in found) for found in sizes]
        rates = f"{row['images_per_second']:.1f}", f"{row['evaluations'] / row['batch']:.1f}", f"{row['flops_per_second'] / 1e12:.3g}"
        table.add_row(str(row["batch"]), *rates, f"{row['share_of_peak']:.1%}", f"{row['warmup']['cold']:.2f}", *memory)
    return table
