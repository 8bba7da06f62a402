"""Measures candidate settings for the FAST preset on the validation split of digits-C.

    python bench/choose_fast.py --images 150 [--only NAME ...]

Appends a JSON line a candidate to bench/results/choose_fast.jsonl: the settings, accuracy a corruption, cost. The test split is not read.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from dtta_fast import demo, environment, presets

RESULTS = Path(__file__).parent / "results" / "choose_fast.jsonl"

CANDIDATES: dict[str, dict[str, object]] = {
    "preset": {},
    "nothing matched": {"match": "off"},
    "denoiser sees matched": {"match": "denoiser"},
    "no guard": {"guard": 0, "guard_threshold": 0.0},
    "guard 8, 1 error": {"guard": 8, "guard_threshold": 1.0},
    "guard 16, 2 errors": {"guard": 16, "guard_threshold": 2.0},
    "5 steps": {"steps": 5},
    "lr 1e-3": {"lr": 1e-3},
    "lr 3e-4": {"lr": 3e-4},
    "logit_scale 3": {"logit_scale": 3.0},
    "range 450-800": {"timestep_range": (450, 800)},
    "denoiser adapts": {"denoiser_parameters": "all", "denoiser_lr": 1e-4},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=150)
    parser.add_argument("--only", nargs="*", default=list(CANDIDATES))
    args = parser.parse_args()
    RESULTS.parent.mkdir(exist_ok=True)
    for name in args.only:
        config = presets.FAST.replace(**CANDIDATES[name])
        found = demo.run(config, args.images, split="validation")
        record = {"candidate": name, "versions": environment.describe(), "config": dataclasses.asdict(config), **found}
        with RESULTS.open("a") as file:
            file.write(json.dumps(record) + "\n")
        source, adapted = found["source_accuracy"], found["adapted_accuracy"]
        clean = found["clean"]
        print(
            f"{name:24} {source:6.1%} -> {adapted:6.1%}   clean {clean['source_accuracy']:6.1%} -> {clean['adapted_accuracy']:6.1%}   "
            f"{found['evaluations_per_image']:5.1f} evaluations, {found['seconds_per_image']:.3f} s an image",
            flush=True,
        )


if __name__ == "__main__":
    main()
