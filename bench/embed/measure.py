"""An adaptation of a corrupted digit as a host meets it: eager, compiled, as a package in Python and in C++; every ratio within one run.

    python bench/embed/measure.py [--calls 500] [--packages FOLDER]

Of one image that FAST adapts, in float32 and with the denoiser in bfloat16: seconds of a step (the median of a turn's) and of a call, by
turns of a tenth of a second, so that all ways meet the same machine; then calls in a row for percentiles, calls under deadlines, loads of
the package, and outputs of 60 images against the engine's. --packages keeps what was exported, and finds it again. Writes
bench/results/embed_cpu.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dtta_fast import Adapter, embed, presets, zoo
from dtta_fast.data.corruptions import DIGITS_C, corrupt
from dtta_fast.embed.functions import Functions
from dtta_fast.runtime import environment

HERE = Path(__file__).parent
RESULT = HERE.parent / "results" / "embed_cpu.json"
IMAGES, CHOSEN = 60, 9  # the chosen one asks for adaptation, and its answer changes: 3 steps and 2 times 24 guard pairs
TURNS = 80  # of every way: a call and a few steps each, so that a machine that is slow for a while is so for all
STEPS = 5  # of a turn
DEADLINES = (20.0, 40.0, 60.0, 80.0, 120.0, 160.0)  # milliseconds
PRECISIONS = {"float32": None, "bfloat16": "bf16"}


def timed(work: Callable[[], Any], repeats: int) -> list[float]:
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return found


def digits() -> Tensor:
    clean, _ = zoo.example("digits")
    kinds = list(DIGITS_C.items())
    return torch.cat([corrupt(clean[i : i + 1], *kinds[i % len(kinds)], first_id=i) for i in range(IMAGES)])


def stepper(adapter: Adapter, image: Tensor) -> Callable[[], Tensor]:
    """One step of a warm session, on a state of its own that goes on."""
    engine, ids = adapter.engine, torch.tensor([CHOSEN])
    with engine.context():
        state, batch = engine.program.begin(image, ids)
        own = pytree.tree_map(torch.clone, state)

    def once() -> Tensor:
        with torch.enable_grad(), engine.context():
            return engine.program.step(own, batch, 0)

    return once


def host(measure: Path, *arguments: Any) -> Any:
    run = subprocess.run([measure, *map(str, arguments)], check=True, capture_output=True, text=True)
    return json.loads(run.stdout)


def precision(name: str, images: Tensor, packages: Path, measure: Path, calls: int) -> dict[str, Any]:
    config = presets.FAST.replace(precision=PRECISIONS[name])
    model, denoiser = zoo.load("digits")
    path, ids, image = packages / f"digits_{name}.pt2", torch.tensor([CHOSEN]), images[CHOSEN : CHOSEN + 1]
    if not path.is_file():
        embed.export(model, denoiser, images[:32], path, config=config)
    eager, compiled = Adapter(model, denoiser, config), Adapter(model, denoiser, config.replace(compile="step"))
    package = embed.load(path, eager)
    one, every = packages / "one.f32", packages / "every.f32"
    image.numpy().tofile(one)
    images.numpy().tofile(every)
    for session in (eager, compiled, package):
        session.warmup(image)
    in_python: dict[str, Any] = {"eager": eager, "compiled step": compiled, "package in Python": package}
    steps: dict[str, Callable[[], Any]] = {"eager": stepper(eager, image), "compiled step": stepper(compiled, image)}
    example = [tensor.clone() for tensor in Functions(eager.engine.program, image, ids).by_name["step"].example]
    steps["package in Python"] = lambda: package._program.run("step", *example)
    found: dict[str, Any] = {way: {"step": [], "call": []} for way in (*in_python, "package in C++")}
    for work in steps.values():
        timed(work, 5)
    with subprocess.Popen([measure, "turns", path, one], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as in_cpp:
        assert in_cpp.stdin is not None
        assert in_cpp.stdout is not None
        for _ in range(TURNS):
            for way, session in in_python.items():
                found[way]["step"].append(statistics.median(timed(steps[way], STEPS)))
                found[way]["call"] += timed(lambda session=session: session.adapt(image, image_ids=ids), 1)
            in_cpp.stdin.write("\n")
            in_cpp.stdin.flush()
            told = json.loads(in_cpp.stdout.readline())
            found["package in C++"]["step"].append(statistics.median(told["step"]))
            found["package in C++"]["call"].append(told["call"])
        in_cpp.stdin.close()
    streak = {way: timed(lambda session=session: session.adapt(image, image_ids=ids), calls) for way, session in in_python.items()}
    told = host(measure, "latency", path, one, calls)
    streak["package in C++"] = told["call"]
    loads = {"package in C++": told["load"], "package in Python": timed(lambda: embed.load(path), 11)}
    deadlines = {"package in C++": host(measure, "deadlines", path, one, *DEADLINES)}
    for way in ("eager", "package in Python"):
        deadlines[way] = under_deadlines(in_python[way], image)
    differences = {"package in Python": 0.0, "package in C++": 0.0}
    rows = host(measure, "outputs", path, every)
    same = 0
    for i, row in enumerate(rows):
        keywords = {"image_ids": torch.tensor([i])}
        expected, theirs = eager.adapt(images[i : i + 1], **keywords), package.adapt(images[i : i + 1], **keywords)
        for way, outputs in (("package in Python", theirs.outputs[0]), ("package in C++", torch.tensor(row["outputs"]))):
            differences[way] = max(differences[way], float((outputs - expected.outputs[0]).abs().max()))
        same += row["predictions"] == expected.predictions.tolist() == theirs.predictions.tolist()
    return {
        "mebibytes": path.stat().st_size / 2**20,
        "manifest": {field: getattr(package.manifest, field) for field in ("tolerance", "measured", "measured_images", "weights")},
        "by turns": found,
        "in a row": streak,
        "loads": loads,
        "deadlines": deadlines,
        "differences": differences,
        "same predictions": same,
    }


def under_deadlines(session: Any, image: Tensor) -> list[dict[str, float]]:
    found = []
    for deadline in DEADLINES:
        for _ in range(20):
            start = time.perf_counter()
            result = session.adapt(image, image_ids=torch.tensor([CHOSEN]), deadline_ms=deadline)
            found.append({"deadline_ms": deadline, "seconds": time.perf_counter() - start, "steps": result.steps_run})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=500)
    parser.add_argument("--packages", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        packages = given.packages or Path(scratch)
        packages.mkdir(parents=True, exist_ok=True)
        build = Path(scratch) / "build"
        subprocess.run(
            ["cmake", "-S", str(HERE), "-B", str(build), f"-DPython3_EXECUTABLE={sys.executable}"], check=True, stdout=sys.stderr
        )
        subprocess.run(["cmake", "--build", str(build)], check=True, stdout=sys.stderr)
        images = digits()
        load_average = os.getloadavg()
        result: dict[str, Any] = {"images": IMAGES, "load_average": load_average, "environment": environment.describe()}
        for name in PRECISIONS:
            result[name] = precision(name, images, packages, build / "measure", given.calls if name == "float32" else given.calls * 2 // 5)
            ways = result[name]["by turns"]
            RESULT.write_text(json.dumps(result, indent=1) + "\n")  # what there is, should the next fail
            print(name, {way: round(1000 * statistics.median(row["step"]), 2) for way, row in ways.items()}, file=sys.stderr)
    threads = subprocess.run([sys.executable, str(HERE / "threads.py")], check=True, capture_output=True, text=True)
    result["threads"] = json.loads(threads.stdout)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
