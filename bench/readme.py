"""Writes the README's tables from the results files; --check fails where the README says something else.

python bench/readme.py [--check]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"


def digits_c() -> str:
    """FAST beside PAPER, a row a corruption; each column names its own number of images. In brackets the 95 % interval of the mean gain."""
    fast, paper = (json.loads((RESULTS / f"digits_c_{name}.json").read_text()) for name in ("fast", "paper"))

    def cells(row: dict[str, float]) -> str:
        source, adapted = 100 * row["source_accuracy"], 100 * row["adapted_accuracy"]
        matched = f"{100 * row['matched_accuracy']:.1f} | " if "matched_accuracy" in row else ""
        return f"{source:.1f} | {matched}{adapted:.1f} | {adapted - source:+.1f}"

    lines = [
        f"| | FAST, {fast['images']} images: source % | matched % | adapted % | gain "
        f"| PAPER, {paper['images']} images: source % | adapted % | gain |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in fast["corruptions"].items():
        lines.append(f"| {name} {row['severity']} | {cells(row)} | {cells(paper['corruptions'][name])} |")
    low, high = (f"{100 * bound:+.1f}" for bound in fast["gain_interval"])
    lines.append(f"| **mean of {len(fast['corruptions'])}** | {cells(fast)} ({low} .. {high}) | {cells(paper)} |")
    lines.append(f"| clean | {cells(fast['clean'])} | {cells(paper['clean'])} |")
    costs = []
    for run in (fast, paper):
        seconds = statistics.median(row["seconds_per_image"] for row in run["corruptions"].values())
        costs.append(f"{run['evaluations_per_image']:.1f} | {seconds:.2f} s |" + (" |" if "matched_accuracy" in run else ""))
    lines.append(f"| evaluations, seconds an image (median over the rows) | {costs[0]} | {costs[1]} |")
    return "\n".join(lines)


def kernels() -> str:
    """The ops beside eager torch and the compiled reference, with the share of the copy bandwidth of the same run."""
    rows: dict[tuple[str, str], dict[str, tuple[float, int]]] = {}
    copies = {}
    for run in json.loads((RESULTS / "kernels_cpu.json").read_text())["benchmarks"]:
        op, _, parameters = run["name"].removeprefix("test_").removesuffix("]").partition("[")
        form, measured = run["params"].get("form"), (run["stats"]["median"], run["extra_info"]["bytes"])
        size = " ".join(part for part in parameters.split("-") if part not in ("cpu", form))
        if op == "copy":
            copies[size] = measured[1] / measured[0]
        else:
            rows.setdefault((op, size), {})[form] = measured
    lines = ["| op | size | form | ms | times eager | GB/s | share of copy |", "|---|---|---|---|---|---|---|"]
    for (op, size), forms in rows.items():
        for form, (median, moved) in forms.items():
            times, rate = forms["eager"][0] / median, moved / median
            share = f"{rate / copies[size]:.0%}" if size in copies else ""
            lines.append(f"| {op} | {size} | {form} | {1e3 * median:.2f} | {times:.1f} | {rate / 1e9:.1f} | {share} |")
    return "\n".join(lines)


def _benchmarks(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((RESULTS / f"{name}_cpu.json").read_text())["benchmarks"]
    return found


def step() -> str:
    """The step beside the naive engine, with its rate and the share of the matrix products' peak in the same precision and run."""
    runs = {tuple(run["extra_info"]["case"]): run for run in _benchmarks("step")}
    lines = [
        "| models | denoiser | engine | s | times naive | evaluations/s | TFLOP/s | share of peak |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (size, classifier, adapting, form), run in runs.items():
        seconds, info = run["stats"]["median"], run["extra_info"]
        times = runs[size, classifier, adapting, "naive"]["stats"]["median"] / seconds
        rate = info["flops"] / seconds
        what = {"frozen": "frozen", "all": "adapts"}[adapting]
        cells = f"{seconds:.2f} | {times:.1f} | {info['evaluations'] / seconds:.1f} | {rate / 1e12:.2f} | {rate / info['peak']:.0%}"
        lines.append(f"| {size} + {classifier} | {what} | {form} | {cells} |")
    return "\n".join(lines)


def end_to_end() -> str:
    """Calls of adapt() on the digits zoo: throughput, latency, first image, memory."""
    lines, medians = ["| what | how | figure |", "|---|---|---|"], {}
    for run in _benchmarks("end_to_end"):
        info, stats = run["extra_info"], run["stats"]
        if run["name"].startswith("test_sixteen"):
            medians[info["way"], info["form"]] = stats["median"]
        elif run["name"] == "test_one_image":
            p50, p95, p99 = (1e3 * statistics.quantiles(stats["data"], n=100)[q - 1] for q in (50, 95, 99))
            lines.append(f"| one image, ms | float32, {len(stats['data'])} calls | p50 {p50:.0f}, p95 {p95:.0f}, p99 {p99:.0f} |")
        elif run["name"].startswith("test_first"):
            kept = statistics.median(whole for whole, _ in info["kept"])
            lines.append(
                f"| from the start of the process to the first image, s | compile {info['compile']} | "
                f"{info['cold'][0]:.1f} with an empty cache, {kept:.1f} with a kept one |"
            )
        else:
            for what, field in (
                ("allocated by torch", "allocated"),
                ("resident", "mebibytes"),
                ("resident, MALLOC_TRIM_THRESHOLD_=16777216", "trimmed"),
            ):
                sizes = {pairs: values[0] for pairs, values in info[field].items()}
                lines.append(
                    f"| peak memory, {what}, MiB (DiT-S/2 + ResNet-18, chunks of 15) | {info['precision']} | "
                    f"15 pairs {sizes['15']:.0f}, 180 pairs {sizes['180']:.0f}: {sizes['180'] / sizes['15']:.2f} times |"
                )
    for way in dict.fromkeys(way for way, _ in medians):
        apart, together = medians[way, "16 calls"], medians[way, "one call"]
        lines.append(f"| 16 images, s | {way} | {apart:.2f} in 16 calls, {together:.2f} in one: {apart / together:.1f} times |")
    return "\n".join(lines)


TABLES = {"digits-c": digits_c, "kernels": kernels, "step": step, "end-to-end": end_to_end}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    old = new = README.read_text()
    for name, table in TABLES.items():
        begin, end = f"<!-- {name}: written by bench/readme.py -->", f"<!-- {name}: end -->"
        if begin not in new or end not in new:
            sys.exit(f"README.md has no place for {name}: {begin} ... {end}")
        before, after = new.split(begin)[0], new.split(end)[1]
        new = f"{before}{begin}\n{table()}\n{end}{after}"
    if check and new != old:
        sys.exit("README.md differs from the results files: run python bench/readme.py")
    if not check:
        README.write_text(new)


if __name__ == "__main__":
    main()
