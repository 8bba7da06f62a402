"""The tool's own share of a run over digits-C: all but encoding, model forward and backward, optimizer and guard.

    python bench/runs/own_time.py [--images-per-class 10]

One process, then Ray's workers, one a core, each on the same images in batches of 50. Start-up (models, processes) is told apart: it
does not grow with the data. A worker's own time is what it waits for images and what a batch takes it beside the models, from its second
batch on. Writes bench/results/own_time.json.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from dtta_fast.runs.config import RunConfig
from dtta_fast.runs.evaluate import evaluate
from dtta_fast.runs.scale import ray_records
from dtta_fast.runs.streams import batches_of
from dtta_fast.runs.worker import open_data
from dtta_fast.runtime import environment

RESULT = Path(__file__).parents[1] / "results" / "own_time.json"
MODELS = ("encode", "adapt", "guard")


def alone(run: RunConfig) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        found = evaluate(run, Path(folder) / "run")
    seconds = found["seconds"]
    models, whole = sum(seconds[name] for name in MODELS), found["wall_seconds"] - seconds["start"]
    return told(1, found["images"], models, whole - models, seconds)


def on_ray(run: RunConfig) -> dict[str, Any]:
    data = open_data(run)
    batches = batches_of(run, data)
    seconds: dict[str, float] = {}
    images = 0
    for _, records, phases in ray_records(run, data, batches, range(len(batches))):
        if phases["load"]:  # not a worker's first
            images += len(records)
            for name, took in phases.items():
                seconds[name] = seconds.get(name, 0.0) + took
    return told(os.cpu_count() or 1, images, sum(seconds[name] for name in MODELS), seconds["own"] + seconds["load"], seconds)


def told(workers: int, images: int, models: float, own: float, seconds: dict[str, float]) -> dict[str, Any]:
    share = own / (own + models)
    print(f"{workers} worker(s): {images} images, models {models:.1f} s, the tool's own {own:.2f} s: {share:.1%}", flush=True)
    return {"workers": workers, "images": images, "models": models, "own": own, "own_share": share, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images-per-class", type=int, default=10)
    run = RunConfig(per_class=parser.parse_args().images_per_class, batch=50, device="cpu")
    found = {"one process": alone(run), "ray": on_ray(run), "environment": environment.describe()}
    RESULT.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
