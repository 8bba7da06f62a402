"""Measures candidate settings for the FAST preset on the validation split of digits-C.

    python bench/choose_fast.py --images 150 [--only NAME ...]

Appends a JSON line a candidate to bench/results/choose_fast.jsonl: the settings, accuracy a corruption, cost. The test split is not read.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from dtta_fast import demo, presets

RESULTS = Path(__file__).parent / "results" / "choose_fast.jsonl"

CANDIDATES: dict[str, dict[str, object]] = {
    "preset": {},
    "no guard": {"guard": 0, "guard_threshold": 0.0},
    "guard without a test": {"guard_threshold": 0.0},
    "lr 1e-3": {"lr": 1e-3},
    "lr 2e-4": {"lr": 2e-4},
    "logit_scale 6": {"logit_scale": 6.0},
    "plain softmax": {"logit_scale": None},
    "range 300-700": {"timestep_range": (300, 700)},
    "range 0-1000": {"timestep_range": None},
    "norm layers": {"parameters": "norm", "lr": 5e-3},
    "guard of 16, 2 errors": {"guard": 16, "guard_threshold": 2.0},
    "10 steps": {"steps": 10},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=150)
    parser.add_argument("--only", nargs="*", default=list(CANDIDATES))
    args = parser.parse_args()
    for name in args.only:
        config = presets.FAST.replace(**CANDIDATES[name])
        found = demo.run(config, args.images, split="validation")
        with RESULTS.open("a") as file:
            file.write(json.dumps({"candidate": name, "config": dataclasses.asdict(config), **found}) + "\n")
        source, adapted = found["source_accuracy"], found["adapted_accuracy"]
        clean = found["clean"]
        print(
            f"{name:24} {source:6.1%} -> {adapted:6.1%}   clean {clean['source_accuracy']:6.1%} -> {clean['adapted_accuracy']:6.1%}   "
            f"{found['evaluations_per_image']:5.1f} evaluations, {found['seconds_per_image']:.3f} s an image",
            flush=True,
        )


if __name__ == "__main__":
    main()
