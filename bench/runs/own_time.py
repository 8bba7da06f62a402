"""The tool's own share of a run over digits-C: all but encoding, model forward and backward, optimizer and guard.

    python bench/runs/own_time.py [--images-per-class 10]

One process, then Ray's workers, one a core, each on the same images in batches of 50. Start-up (models, processes) is told apart: it does
not grow with the data. Of Ray's workers the share is counted between the first batch's arrival and the last one's. Writes
bench/results/own_time.json.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from dtta_fast import environment
from dtta_fast.evaluate import Finished, batches_of, evaluate, open_data
from dtta_fast.runs.config import RunConfig
from dtta_fast.scale import ray_records

RESULT = Path(__file__).parents[1] / "results" / "own_time.json"
MODELS = ("encode", "adapt", "guard")


def alone(run: RunConfig) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        found = evaluate(run, Path(folder) / "run")
    seconds = found["seconds"]
    wall = found["wall_seconds"] - seconds["start"]
    return _shares(wall, 1, sum(seconds[name] for name in MODELS), found["images"], seconds)


def on_ray(run: RunConfig) -> dict[str, Any]:
    data = open_data(run)
    batches = batches_of(run, data)
    start = time.perf_counter()
    arrivals: list[tuple[float, Finished]] = [(time.perf_counter(), one) for one in ray_records(run, data, batches, range(len(batches)))]
    workers = os.cpu_count() or 1
    later = arrivals[workers:]  # each worker's first batch began before the clock
    wall = later[-1][0] - arrivals[workers - 1][0]
    busy = sum(seconds[name] for _, (_, _, seconds) in later for name in MODELS)
    images = sum(len(records) for _, (_, records, _) in later)
    return {**_shares(wall, workers, busy, images, {}), "start": arrivals[0][0] - start}


def _shares(wall: float, workers: int, busy: float, images: int, seconds: dict[str, float]) -> dict[str, Any]:
    own = 1 - busy / (wall * workers)
    print(f"{workers} worker(s): {images} images in {wall:.1f} s, the tool's own share {own:.1%}", flush=True)
    return {"workers": workers, "images": images, "wall": wall, "models": busy, "own_share": own, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images-per-class", type=int, default=10)
    run = RunConfig(per_class=parser.parse_args().images_per_class, batch=50, device="cpu")
    found = {"one process": alone(run), "ray": on_ray(run), "environment": environment.describe()}
    RESULT.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
