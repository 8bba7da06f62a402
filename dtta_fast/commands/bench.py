"""`dtta bench`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.table import Table

from dtta_fast import benchmark, environment
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


@dataclass(frozen=True)
class Bench:
    """Measure an adaptation here: latency, throughput, memory, cold start, and the accuracy it gives.

    The share of the machine's peak is told too. By default the digits zoo on digits-C, the corruptions in turn. precheck is off where no
    flag sets it, whatever the preset says: every image is adapted and pays for it. With --precheck answer the images that are left alone
    are counted in.

    Example: dtta bench --calls 20 --batches 1 4 --json bench.json
    """

    model: Name = None
    """A classifier: timm's name, hf-hub:ID, or a folder in timm's format; with --denoiser."""
    denoiser: Name = None
    """A DiT's folder, or its id on the hub, of the same classes; with --model."""
    images: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="(default: digits-C, or random pixels)")] = None
    """A folder of images for them, without labels; random pixels where it is left out, on which a guard has more to compare."""
    calls: int = 200
    """Calls of one image, for the percentiles, 20 and more; a batch takes a 20th of them."""
    batches: tuple[int, ...] = (1, 4, 16)
    """Numbers of images in a call, for throughput and memory: 1 4 16."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where both models run."""
    json: OutFile = None
    """Write the result to this file too, with the seconds of every call."""
    preset: str = "FAST"
    """FAST, PAPER, ONLINE or DUSA: what the settings below start from. FAST and ONLINE take a calibration."""
    config: Settings = EVERY_IMAGE
    """Settings of the adaptation; their defaults are the preset's."""

    def run(self) -> None:
        """Raises ValueError for bad arguments, models or images, all of it before anything is measured."""
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
