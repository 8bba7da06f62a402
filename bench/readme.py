"""Writes the tables of README.md and docs from the results files. --check writes nothing, and fails if a table is out of date.

python bench/readme.py [--check]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import classes_tables
import gpu_tables
import support_table
import torch
from torch import Tensor

from dtta_fast.metrics import bootstrap_interval

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"


def _records(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"quality_{name}.json").read_text())
    return found


def _right(record: dict[str, Any], seeds: int, images: int) -> Tensor:
    """Returns how often each of the first images is answered correctly: means over the first seeds and all corruptions, [images]."""
    rows = [run[corruption]["right"][:images] for run in record["runs"][:seeds] for corruption in record["severities"]]
    return torch.tensor([[float(answer) for answer in row] for row in rows]).mean(0)


def advantage(fast: dict[str, Any], other: dict[str, Any]) -> str:
    """Formats FAST's accuracy minus another's in points, on the images and seeds that both have, with the interval over those images."""
    seeds, images = min(len(fast["runs"]), len(other["runs"])), min(fast["images"], other["images"])
    change = 100 * (_right(fast, seeds, images) - _right(other, seeds, images))
    low, high = bootstrap_interval(change)
    return f"{float(change.mean()):+.1f} ({low:+.1f} .. {high:+.1f})"


def quality(name: str) -> str:
    """Makes a row per method: means over corruptions and seeds, 95 % intervals over images, and FAST's advantage if FAST was run."""
    records = _records(name)
    fast = records.get("FAST")
    lines = [
        "| method | protocol | images, seeds | corrupted % (95 %) | gain | "
        + ("FAST minus this (95 %) | " if fast else "")
        + "worst corruption | clean | turned wrong | calibration error | forward + backward | s an image |",
        "|---" * (12 if fast else 11) + "|",
    ]
    for method, record in records.items():
        all_of_it, clean = record["corrupted"], record["clean"]
        low, high = (100 * bound for bound in all_of_it["interval"])
        worst, where = all_of_it["worst"]
        beside = f"{'' if record is fast else advantage(fast, record)} | " if fast else ""
        lines.append(
            f"| {method} | {record['protocol']} | {record['images']}, {len(record['runs'])} | {100 * all_of_it['accuracy']:.1f} "
            f"({low:.1f} .. {high:.1f}) | {100 * all_of_it['gain']:+.1f} | {beside}{100 * worst:+.1f} {where} | "
            f"{100 * clean['accuracy']:.1f} | {100 * all_of_it['negative_flips']:.1f} % | {all_of_it['calibration_error']:.2f} | "
            f"{all_of_it['forwards']:.1f} + {all_of_it['backwards']:.1f} | {all_of_it['seconds']:.3f} |"
        )
    return "\n".join(lines)


GAINS = {
    "cifar_resnet": ("source", "matched alone", "FAST", "RANK", "ONLINE", "PAPER", "DUSA, matched", "NEO, matched", "CoTTA"),
    "digits": ("source", "matched alone", "FAST", "RANK", "ONLINE", "PAPER", "NEO, matched"),
    "open_vocabulary": ("source", "matched alone", "guard of 14, LoRA"),
    "fashion": ("source", "matched alone", "FAST", "RANK", "NEO, matched"),
    "digits_unseen": ("source", "FAST"),
}
TITLES = {
    "cifar_resnet": "CIFAR-10 under 15 corruptions, ResNet + UNet",
    "digits": "digits-C, ConvNeXt + DiT",
    "open_vocabulary": "digits-C, CLIP + Stable Diffusion",
    "fashion": "Fashion-MNIST-C, ConvNeXt + DiT",
    "digits_unseen": "digits-C, corruptions that nothing was chosen on",
}


def gains() -> str:
    """Makes the README's table: selected rows of the quality tables."""
    lines = [
        "| data, models | method | images, seeds | corrupted % | gain (95 %) | FAST minus this (95 %) | worst corruption "
        "| clean | evaluations |",
        "|---" * 9 + "|",
    ]
    for name, methods in GAINS.items():
        records = _records(name)
        for method in methods:
            record, found = records[method], records[method]["corrupted"]
            low, high = (100 * bound for bound in found["gain_interval"])
            beside = "" if method == "FAST" else advantage(records["FAST"], record)
            lines.append(
                f"| {TITLES[name]} | {method} | {record['images']}, {len(record['runs'])} | {100 * found['accuracy']:.1f} | "
                f"{100 * found['gain']:+.1f} ({low:+.1f} .. {high:+.1f}) | {beside} | "
                f"{100 * found['worst'][0]:+.1f} {found['worst'][1]} | {100 * record['clean']['accuracy']:.1f} | {found['forwards']:.0f} |"
            )
    return "\n".join(lines)


def speed() -> str:
    """Compares the first case of the step benchmark with the naive engine, in a sentence for the README."""
    runs = {tuple(run["extra_info"]["case"]): run for run in _benchmarks("step")}
    (size, classifier, adapting, _), naive = next((case, run) for case, run in runs.items() if case[3] == "naive")
    run = runs[size, classifier, adapting, "bf16, compiled"]
    seconds, slow, info = run["stats"]["median"], naive["stats"]["median"], run["extra_info"]
    return (
        f"On 2 CPU cores, a step of 30 pairs with a frozen {size} and a {classifier} takes {seconds:.2f} s in bfloat16 and compiled, and "
        f"{slow:.2f} s in the naive engine in float32: {slow / seconds:.1f} times less, at {info['flops'] / seconds / 1e12:.2f} TFLOP/s, "
        f"{info['flops'] / seconds / info['peak']:.0%} of the machine's peak in bfloat16."
    )


def by_corruption(name: str) -> str:
    """Makes a row per method and a column per corruption: mean accuracy over seeds in %. Rows with different images are not comparable."""
    records = _records(name)
    severities = next(iter(records.values()))["severities"]
    head = " | ".join(f"{corruption} {severity}" for corruption, severity in severities.items())
    lines = [f"| method | images, seeds | {head} | clean |", "|---" * (len(severities) + 3) + "|"]
    for method, record in records.items():
        cells = [statistics.mean(run[column]["accuracy"] for run in record["runs"]) for column in (*severities, "clean")]
        row = " | ".join(f"{100 * cell:.1f}" for cell in cells)
        lines.append(f"| {method} | {record['images']}, {len(record['runs'])} | {row} |")
    return "\n".join(lines)


def dense(name: str) -> str:
    """Makes a row per method for a task that predicts maps. Scores are in points, except for rmse."""
    records = json.loads((RESULTS / f"dense_{name}.json").read_text())
    heads = list(next(iter(records.values()))["corrupted"]["scores"])
    lines = [
        "| method | " + " | ".join(heads) + " | gain (95 %) | worst corruption | clean | scenes | evaluations | s an image |",
        "|---" * (len(heads) + 7) + "|",
    ]
    for method, record in records.items():
        found, (worst, where) = record["corrupted"], record["corrupted"]["worst"]
        low, high = (100 * bound for bound in found["gain_interval"])
        cells = " | ".join(f"{found['scores'][head] * (1 if head == 'rmse' else 100):.2f}" for head in heads)
        lines.append(
            f"| {method} | {cells} | {100 * found['gain']:+.2f} ({low:+.2f} .. {high:+.2f}) | {100 * worst:+.2f} {where} | "
            f"{100 * record['clean']['gain']:+.2f} | {record['images']} | {found['evaluations']:.0f} | {found['seconds']:.2f} |"
        )
    return "\n".join(lines)


def kernels() -> str:
    """Compares the ops with eager torch and the compiled reference, and gives the share of the copy bandwidth of the same run."""
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
    """Compares the step with the naive engine, and gives its rate and its share of the matrix products' peak in that precision and run."""
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
    """Makes the table of whole calls: throughput, latency and first image on the digits zoo, and memory."""
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


def classes() -> str:
    """Makes the table of one image's seconds and evaluations, by number of classes."""
    runs = {(run["extra_info"]["form"], run["extra_info"]["classes"]): run for run in _benchmarks("classes")}
    counts = sorted({count for _, count in runs})
    lines = ["| | " + " | ".join(f"{count} classes" for count in counts) + " |", "|---" * (len(counts) + 1) + "|"]
    for form in dict.fromkeys(form for form, _ in runs):
        cells = [f"{runs[form, n]['stats']['median']:.3f} s, {runs[form, n]['extra_info']['evaluations']} evaluations" for n in counts]
        lines.append(f"| {form} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def real_sizes() -> str:
    """Makes the table of Stable Diffusion at its real sizes: a step as measured, and what would fit on a card with 24 GiB."""
    records = json.loads((RESULTS / "real_sizes.json").read_text())
    sizes = list(records)
    gib = 2**30
    rows = {
        "parameters of the UNet": [f"{r['parameters of the unet'] / 1e6:.0f} M" for r in records.values()],
        "pairs, seconds of the step": [f"{r['pairs']}, {r['step']:.0f} s" for r in records.values()],
        "peak memory of the process": [f"{r['peak bytes of the process'] / gib:.1f} GiB" for r in records.values()],
        "FLOPs a pair, without attention's own products": [f"{r['flops a pair'] / 1e12:.2f} T" for r in records.values()],
        "bytes a pair, plain": [f"{r['bytes a pair']['False'] / gib:.2f} GiB" for r in records.values()],
        "bytes a pair, checkpointed": [f"{r['bytes a pair']['True'] / gib:.2f} GiB" for r in records.values()],
    }
    for way in next(iter(records.values()))["by count"]:
        found = [r["by count"][way] for r in records.values()]
        rows[f"{way}: weights; 180 pairs at once; pairs at once on 24 GiB; 180 pairs in such chunks"] = [
            f"{f['weights'] / gib:.1f} GiB; {(f['weights'] + f['activations of 180 pairs at once']) / gib:.0f} GiB; "
            f"{f['pairs at once on a 24 GiB card']}; {f['180 pairs in chunks'] / gib:.1f} GiB"
            for f in found
        ]
    lines = ["| | " + " | ".join(f"Stable Diffusion {size}" for size in sizes) + " |", "|---" * (len(sizes) + 1) + "|"]
    return "\n".join([*lines, *(f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items())])


def own_time() -> str:
    """Makes the table of the time that a run spends outside the models."""
    found = json.loads((RESULTS / "own_time.json").read_text())
    lines = ["| run | images | models, s | the tool's own, s | share |", "|---|---|---|---|---|"]
    for name in ("one process", "ray"):
        row = found[name]
        shown = "one process" if name == "one process" else f"Ray, {row['workers']} workers"
        lines.append(f"| {shown} | {row['images']} | {row['models']:.1f} | {row['own']:.2f} | {row['own_share']:.1%} |")
    return "\n".join(lines)


def _embedded() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / "embed_cpu.json").read_text())
    return found


WAYS = ("eager", "compiled step", "package in Python", "package in C++")
DTYPES = ("float32", "bfloat16")


def embedding() -> str:
    """Makes a row per way and precision: step and call times, their ratios, and the largest difference from the engine's outputs."""
    found = _embedded()
    heads = ("denoiser", "way", "step, ms", "eager's, times that", "that, times compiled Python's", "call, ms", "eager's, times that")
    lines = ["| " + " | ".join((*heads, "farthest output", "loading, ms")) + " |", "|---" * 9 + "|"]
    for dtype in DTYPES:
        of, median = found[dtype], statistics.median
        step = {way: 1e3 * median(of["by turns"][way]["step"]) for way in WAYS}
        call = {way: 1e3 * median(of["by turns"][way]["call"]) for way in WAYS}

        def ratio(what: str, way: str, to: str, turns: dict[str, Any] = of["by turns"]) -> float:
            """Takes the median of each turn's ratio: if the machine slows down for a while, both sides of a ratio slow down."""
            return statistics.median(a / b for a, b in zip(turns[to][what], turns[way][what], strict=True))

        for way in WAYS:
            held = f"{of['differences'][way]:.1e} (tolerance {of['manifest']['tolerance']:.1e})" if way in of["differences"] else ""
            loading = f"{1e3 * median(of['loads'][way]):.0f} (longest {1e3 * max(of['loads'][way]):.0f})" if way in of["loads"] else ""
            to_eager, to_compiled = ratio("step", way, "eager"), 1 / ratio("step", way, "compiled step")
            lines.append(
                f"| {dtype} | {way} | {step[way]:.1f} | {to_eager:.2f} | {to_compiled:.2f} | "
                f"{call[way]:.1f} | {ratio('call', way, 'eager'):.2f} | {held} | {loading} |"
            )
    same = " and ".join(f"{found[dtype]['same predictions']} of {found['images']} in {dtype}" for dtype in DTYPES)
    return "\n".join([*lines, "", f"Predictions of all three alike: {same}."])


def latency() -> str:
    found = _embedded()
    lines = ["| denoiser | way | calls | p50 | p95 | p99 | p99 / p50 |", "|---" * 7 + "|"]
    for dtype in DTYPES:
        for way in WAYS:
            seconds = found[dtype]["in a row"][way]
            cuts = statistics.quantiles(seconds, n=100, method="inclusive")
            p50, p95, p99 = (1e3 * cuts[i] for i in (49, 94, 98))
            lines.append(f"| {dtype} | {way} | {len(seconds)} | {p50:.1f} | {p95:.1f} | {p99:.1f} | {p99 / p50:.2f} |")
    return "\n".join(lines)


def deadlines() -> str:
    found = _embedded()["float32"]
    lines = ["| way | deadline, ms | steps made | longest call, ms | over, in steps |", "|---" * 5 + "|"]
    for way, calls in found["deadlines"].items():
        step = 1e3 * statistics.median(found["by turns"][way]["step"])
        for deadline in sorted({call["deadline_ms"] for call in calls}):
            own = [call for call in calls if call["deadline_ms"] == deadline]
            longest, made = 1e3 * max(call["seconds"] for call in own), sorted({int(call["steps"]) for call in own})
            over = max(0.0, longest - deadline) / step
            lines.append(
                f"| {way} | {deadline:.0f} | {' to '.join(map(str, dict.fromkeys((made[0], made[-1]))))} | {longest:.1f} | {over:.1f} |"
            )
    return "\n".join(lines)


def threads() -> str:
    found = _embedded()["threads"]
    memory, calls = found["mebibytes"], sum(found["calls"])
    return (
        f"{found['threads']} threads on one adapter for {found['seconds']:.0f} s (`python bench/embed/threads.py`): {calls} calls, "
        f"{found['wrong']} with another result than the serial one, bit for bit; resident memory {memory[2]:.0f} MiB after 10 s, "
        f"{memory[-1]:.0f} MiB at the end."
    )


TABLES = {
    "README.md": {"gains": gains, "speed": speed, "gpu": gpu_tables.short},
    "docs/performance.md": {
        "kernels": kernels,
        "step": step,
        "end-to-end": end_to_end,
        "real sizes": real_sizes,
        "real sizes of classes": classes_tables.real_sizes,
        "gpu": gpu_tables.full,
    },
    "docs/evaluation.md": {"own time": own_time},
    "docs/models.md": {"support": support_table.support},
    "docs/embedding.md": {"embedding": embedding, "latency": latency, "deadlines": deadlines, "threads": threads},
    "docs/quality.md": {
        "quality": lambda: quality("digits"),
        "open vocabulary": lambda: quality("open_vocabulary"),
        "open vocabulary by corruption": lambda: by_corruption("open_vocabulary"),
        "ablations": lambda: quality("digits_ablations"),
        "cifar resnet": lambda: quality("cifar_resnet"),
        "cifar resnet by corruption": lambda: by_corruption("cifar_resnet"),
        "cifar convnext": lambda: quality("cifar_convnext"),
        "fashion": lambda: quality("fashion"),
        "digits by corruption": lambda: by_corruption("digits"),
        "fashion by corruption": lambda: by_corruption("fashion"),
        "digits unseen": lambda: quality("digits_unseen"),
        "fashion unseen": lambda: quality("fashion_unseen"),
        "classes": classes,
        "calibration": classes_tables.calibration,
        "segmentation": lambda: dense("segmentation"),
        "depth": lambda: dense("depth"),
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for file, tables in TABLES.items():
        path = ROOT / file
        old = new = path.read_text()
        for name, table in tables.items():
            begin, end = f"<!-- {name}: written by bench/readme.py -->", f"<!-- {name}: end -->"
            if begin not in new or end not in new:
                sys.exit(f"{file} lacks the markers for the table {name}: {begin} ... {end}")
            before, after = new.split(begin)[0], new.split(end)[1]
            new = f"{before}{begin}\n{table()}\n{end}{after}"
        if check and new != old:
            sys.exit(f"{file} differs from the results files: run python bench/readme.py")
        if not check:
            path.write_text(new)


if __name__ == "__main__":
    main()
