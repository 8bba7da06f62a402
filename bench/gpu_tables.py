"""Makes the GPU tables of README.md and docs/performance.md from bench/results/gpu_*.json, which bench/gpu.py writes on a GPU."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
NOTHING = "Not measured yet: no GPU has run `python bench/gpu.py`."
PRECISIONS = ("fp32", "tf32", "bf16")
GIB = 2**30


def runs(folder: Path) -> list[dict[str, Any]]:
    """Loads the results files in a folder, sorted by name.

    Raises:
        ValueError: a file was written by --tiny, so its figures are not measurements.
    """
    found = []
    for path in sorted(folder.glob("gpu_*.json")):
        run = json.loads(path.read_text())
        if run.get("tiny") is not False:
            raise ValueError(
                f"{path.name} was written by bench/gpu.py --tiny, whose figures mean nothing: delete it, or run without --tiny"
            )
        found.append(run)
    return found


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Formats a Markdown table. Without rows, the result is empty."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|", *lines]) if lines else ""


def number(value: Any, form: str, factor: float = 1.0) -> str:
    """Formats a number for a cell. Anything that is not a number gives an empty cell."""
    return format(factor * value, form) if isinstance(value, (int, float)) and not isinstance(value, bool) else ""


def group(run: dict[str, Any], stage: str, name: str) -> dict[str, Any]:
    """Returns one group of a stage's measurements, by label."""
    found: dict[str, Any] = run["stages"].get(stage, {}).get("measured", {}).get(name, {})
    return found


def calls(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Lists the calls of FAST and PAPER with DiT-XL/2, eager and compiled."""
    both = (*group(run, "engine", "calls").values(), *group(run, "compiled", "calls").values())
    return [call for call in both if "seconds" in call]


def percentiles(samples: list[float]) -> tuple[float, float] | None:
    """Returns p50 and p99 in ms, or None for fewer than 20 samples."""
    if len(samples) < 20:
        return None
    cuts = statistics.quantiles(samples, n=100, method="inclusive")
    return 1e3 * cuts[49], 1e3 * cuts[98]


def rate(run: dict[str, Any], call: dict[str, Any]) -> tuple[str, str]:
    """Returns the denoiser's TFLOP/s in a call, and their share of what matrix products in that precision reached in the same run."""
    flops, seconds = call.get("flops"), call["seconds"]["median"]
    peak = (group(run, "engine", "peak") | group(run, "compiled", "peak")).get(call["precision"], {}).get("flops")
    if not flops:
        return "", ""
    return f"{flops / seconds / 1e12:.0f}", number(peak and flops / seconds / peak, ".0%")


def naive(run: dict[str, Any], work: str, images: int, precision: str = "bf16") -> list[str]:
    """Divides the naive engine's time, in each of its precisions, by our engine's time for the same work in `precision`."""
    turns = [turn for turn in group(run, "against_naive", "turns").values() if "seconds" in turn and turn["work"] == work]
    own = [t for t in turns if (t["engine"], t["precision"], t["images"]) == ("engine", precision, images)]
    found = []
    for against in PRECISIONS:
        theirs = [t for t in turns if (t["engine"], t["precision"]) == ("naive", against)]
        both = bool(own and theirs)
        found.append(f"{theirs[0]['seconds']['median'] / (own[0]['seconds']['median'] / images):.1f}" if both else "")
    return found


def short(folder: Path = RESULTS) -> str:
    """Makes the README's table: FAST on one image and on 16, and PAPER, in bfloat16 without compilation."""
    found, rows = runs(folder), []
    for run in found:
        for preset, images, work in (("FAST", 1, "steps"), ("FAST", 16, "steps"), ("PAPER", 1, "recipe")):
            for call in calls(run):
                if (call["preset"], call["images"], call["precision"], call["compile"]) != (preset, images, "bf16", "off"):
                    continue
                seconds = call["seconds"]["median"]
                cuts = percentiles(call["seconds"]["samples"]) if images == 1 else None
                time = f"{seconds:.2f} s" if preset == "PAPER" else f"{1e3 * seconds / images:.1f} ms"
                if cuts is not None and preset == "FAST":
                    time = f"p50 {cuts[0]:.1f} ms, p99 {cuts[1]:.1f} ms"
                what = f"{preset}, {images} image{'s' * (images > 1)} a call"
                evaluations = f"{statistics.mean(call['evaluations']):.0f}"
                rows.append([run["device"], what, time, evaluations, *naive(run, work, images), *rate(run, call)])
    heads = ["GPU", "what", "an image", "evaluations", *(f"times naive {name}" for name in PRECISIONS), "TFLOP/s", "of bf16's peak"]
    return table(heads, rows) or NOTHING


def full(folder: Path = RESULTS) -> str:
    """Makes the section of docs/performance.md: all measurements, one GPU after another."""
    return "\n\n".join(_run(run) for run in runs(folder)) or NOTHING


def _run(run: dict[str, Any]) -> str:
    environment = run["environment"]
    versions = ", ".join(f"{name} {environment[name]}" for name in ("torch", "triton", "python") if name in environment)
    changed = " with changes" if run["changed since"] else ""
    card = group(run, "machine", "card").get("busy", {})
    if "driver_version" in card:
        versions += f", driver {card['driver_version']}; {card['clocks.sm']} and {card['power.draw']} under load"
    parts = [
        f"### {run['device']}",
        f"{versions}; commit {run['commit'][:10]}{changed}; {run['started'][:10]}.",
        _stages(run),
    ]
    sections = (_calls, _stable_diffusion, _naive, _rows, _graphs, _products, _attention, _bandwidth, _kernels, _mixtures)
    for title, found in (section(run) for section in sections):
        if found:
            parts += [f"**{title}**", found]
    return "\n\n".join(parts)


def _stages(run: dict[str, Any]) -> str:
    rows = []
    for name, stage in run["stages"].items():
        measured = stage["measured"].items()
        values = [(f"{kind}, {label}", value) for kind, own in measured for label, value in own.items() if isinstance(value, dict)]
        notes = [stage["error"]] if "error" in stage else []
        notes += [f"{label}: {value[key]}" for label, value in values for key in ("error", "left out", "refused") if key in value]
        notes += [f"{label}: {'fine' if value['fine'] else 'broken'}" for label, value in values if "fine" in value]
        for label, value in values:
            if "passed" in value:
                ran = f"{value['passed']} passed, {value['failed']} failed, {value['skipped']} skipped"
                failures = "".join(f"; {failure['name']}" for failure in value["failures"])
                notes.append(f"{value['collected']} tests: {ran}{failures}")
            if "head size" in value:
                notes.append(f"{label}: {', '.join(value['forward']['operators'])}")
        rows.append([name, stage["status"], f"{stage['seconds']:.0f}", "<br>".join(notes).replace("|", "\\|")])
    return table(["stage", "ended", "s", "notes"], rows)


def _call(call: dict[str, Any], *more: str) -> list[str]:
    samples = call["seconds"]["samples"]
    cuts = percentiles(samples)
    return [
        f"{1e3 * call['seconds']['median'] / call['images']:.1f}",
        f"p50 {cuts[0]:.1f}, p99 {cuts[1]:.1f} ({len(samples)})" if cuts else f"{1e3 * call['seconds']['median']:.1f} ({len(samples)})",
        f"{statistics.mean(call['evaluations']):.0f}",
        f"{1e3 * call['step']['median']:.1f}",
        number(call["launches"], ",.0f"),
        number(call["busy"], ".0%"),
        *more,
        number(call["peak bytes"], ".1f", 1 / GIB),
        f"{call['first']:.1f}",
    ]


CALL = ("ms an image", "ms a call (calls)", "evaluations an image", "ms a step", "launches a call", "GPU busy")


def _calls(run: dict[str, Any]) -> tuple[str, str]:
    rows = [
        [call["preset"], str(call["images"]), call["precision"], call["compile"], *_call(call, *rate(run, call))] for call in calls(run)
    ]
    heads = ["preset", "images", "precision", "compile", *CALL, "TFLOP/s", "of the peak", "peak GiB", "first call, s"]
    return "Whole calls: DiT-XL/2 at 256 and ConvNeXt-T", table(heads, rows)


def _stable_diffusion(run: dict[str, Any]) -> tuple[str, str]:
    found = [call for call in group(run, "stable_diffusion", "calls").values() if "seconds" in call]
    rows = [[call["preset"], str(call["images"]), call["precision"], *_call(call)] for call in found]
    heads = ["config", "images", "precision", *CALL, "peak GiB", "first call, s"]
    return "Stable Diffusion 1.5 at 512 and CLIP ViT-L/14, LoRA", table(heads, rows)


def _naive(run: dict[str, Any]) -> tuple[str, str]:
    rows = []
    what = group(run, "against_naive", "models").get("work", {})
    for turn in group(run, "against_naive", "turns").values():
        if "seconds" in turn:
            times = naive(run, turn["work"], turn["images"], turn["precision"]) if turn["engine"] == "engine" else [""] * len(PRECISIONS)
            seconds = f"{1e3 * turn['seconds']['median'] / turn['images']:.1f}"
            rows.append([what[turn["work"]], turn["engine"], turn["precision"], str(turn["images"]), seconds, *times])
    heads = ["work", "engine", "precision", "images", "ms an image", *(f"times naive {name}" for name in PRECISIONS)]
    return "The naive engine on the same work", table(heads, rows)


def _rows(run: dict[str, Any]) -> tuple[str, str]:
    found = {int(rows): value for rows, value in group(run, "step", "rows").items() if "forward" in value}
    rows = []
    for count in sorted(found):
        cells = [str(count)]
        for name in ("forward", "forward and backward"):
            one = found[count][name]
            cells += [f"{1e3 * one['median']:.2f}", number(one["flops"] and one["flops"] / one["median"], ".0f", 1e-12)]
        rows.append(cells)
    heads = ["rows", "forward, ms", "TFLOP/s", "forward and backward to the condition, ms", "TFLOP/s"]
    return "DiT-XL/2 in bfloat16 by rows", table(heads, rows)


def _graphs(run: dict[str, Any]) -> tuple[str, str]:
    rows = []
    for name, found in group(run, "step", "graphs").items():
        if "capturable" not in found:
            continue
        eager, graph = found["eager"]["median"], found.get("graph", {}).get("median")
        captured = "yes" if found["capturable"] else f"no: {found['reason']}"
        same = ""
        if found["capturable"]:
            same = "yes" if found["bit for bit the same"] else f"no, by {found['largest difference']:.1e}"
        cells = [number(found.get("launches"), ",.0f"), f"{1e3 * eager:.2f}", number(graph, ".2f", 1e3)]
        rows.append([name, captured, same, *cells, number(graph and eager / graph, ".1f")])
    heads = ["one image, FAST, bfloat16", "capturable", "bit for bit the eager one", "launches", "eager, ms", "CUDA graph, ms", "times"]
    return "CUDA graphs", table(heads, rows)


def _products(run: dict[str, Any]) -> tuple[str, str]:
    found: dict[tuple[int, int, int], dict[str, dict[str, Any]]] = {}
    for one in group(run, "ceilings", "products").values():
        if "seconds" in one:
            found.setdefault((one["rows"], one["k"], one["n"]), {})[one["dtype"]] = one
    rows = []
    for (count, k, n), by_dtype in sorted(found.items()):
        cells = [f"{count:,}", f"{k} to {n}"]
        for dtype in ("bf16", "fp8"):
            seconds = by_dtype[dtype]["seconds"]["median"] if dtype in by_dtype else None
            cells += [number(seconds, ".1f", 1e6), number(seconds and by_dtype[dtype]["flops"] / seconds, ".0f", 1e-12)]
        rows.append(cells)
    heads = ["rows", "linear layer", "bf16, µs", "TFLOP/s", "fp8, µs", "TFLOP/s"]
    return "Ceilings: the DiT's products by themselves, fp8 without the casts", table(heads, rows)


def _attention(run: dict[str, Any]) -> tuple[str, str]:
    rows = []
    for name, found in group(run, "ceilings", "attention").items():
        cells = [name]
        for way in ("forward", "forward and backward"):
            seconds = found.get(way, {}).get("seconds", {}).get("median")
            cells += [number(seconds, ".1f", 1e6), number(seconds and found[way]["flops"] / seconds, ".0f", 1e-12)]
        rows.append([*cells, found.get("refused") or found.get("error") or found.get("left out") or ""])
    heads = ["backend, rows", "forward, µs", "TFLOP/s", "forward and backward, µs", "TFLOP/s", "refused"]
    return "Attention: 16 heads of 72, 256 tokens, bfloat16", table(heads, rows)


def _bandwidth(run: dict[str, Any]) -> tuple[str, str]:
    rows = []
    for kind in ("copy", "gated normalisation"):
        for name, found in group(run, "ceilings", kind).items():
            if "seconds" in found:
                seconds = found["seconds"]["median"]
                rows.append([f"{kind}, {name}", f"{1e6 * seconds:.1f}", f"{found['bytes'] / seconds / 1e9:,.0f}"])
    return "Bandwidth", table(["what", "µs", "GB/s"], rows)


def _kernels(run: dict[str, Any]) -> tuple[str, str]:
    copies = {name: found["bytes"] / found["seconds"]["median"] for name, found in group(run, "ops", "copy").items() if "seconds" in found}
    known = [value for value in group(run, "ops", "predicted").values() if "error" not in value and "left out" not in value]
    predicted = known[0] if known else {}
    rows = []
    for found in group(run, "ops", "noise").values():
        if "seconds" not in found:
            continue
        seconds, size = found["seconds"]["median"], f"{found['pairs']} pairs of 4x{found['side']}x{found['side']}"
        attained = found["bytes"] / seconds
        times = predicted.get(found["variant"], {}).items() if found["pairs"] == 180 else ()
        said = ", ".join(f"{1e6 * one['seconds']:.1f} ({gpu}, {one['bound']})" for gpu, one in times)
        share = number(size in copies and attained / copies[size], ".0%")
        rows.append([found["variant"], size, f"{1e6 * seconds:.1f}", said, f"{attained / 1e9:,.0f}", share])
    heads = ["kernel", "size", "µs", "predicted, µs", "GB/s", "of a copy as large"]
    return "The noise kernels, L2 flushed", table(heads, rows)


def _mixtures(run: dict[str, Any]) -> tuple[str, str]:
    rows = []
    for found in group(run, "ops", "mix_condition").values():
        if "seconds" in found:
            seconds = found["seconds"]["median"]
            rows.append([found["form"], str(found["images"]), f"{1e6 * seconds:.1f}", f"{found['bytes'] / seconds / 1e9:,.0f}"])
    heads = ["form", "images", "forward and backward, µs", "GB/s"]
    return "mix_condition over 1,000 classes of 1,152 numbers, as called", table(heads, rows)
