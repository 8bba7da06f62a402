"""Segmentation and depth on corrupted scenes: one command, one table.

    python bench/quality/dense.py segmentation|depth [--images 200] [--split validation --only NAME ...]

Every method meets the same scenes of each corruption, and clean ones. Writes bench/results/dense_TASK.json, a record a method: every
image's main score by corruption (intersection over union; relative error), the other scores' means, passes and seconds an image. On the
validation split it is bench/results/choose_dense.jsonl instead, which settings are chosen from.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtta_fast import AdaptConfig, Adapter, presets, zoo
from dtta_fast.commands.demo_digits import CLEAN
from dtta_fast.commands.demo_maps import CORRUPTIONS, MAIN, scores, truth_of
from dtta_fast.data.corruptions import corrupt
from dtta_fast.data.scenes import scenes
from dtta_fast.metrics import bootstrap_interval
from dtta_fast.runtime import environment

RESULTS = Path(__file__).parents[1] / "results"
DENSE = presets.DENSE
BATCH = 8

METHODS: dict[str, AdaptConfig | None] = {
    "source": None,
    "matched alone": None,
    "DENSE": DENSE,
    "DENSE, no guard": DENSE.replace(guard=0, guard_threshold=0.0, precheck="off"),
    "DENSE, no pre-check": DENSE.replace(precheck="off"),
    "DENSE, unmatched": DENSE.replace(match="off", precheck="off"),
}


def candidates() -> dict[str, AdaptConfig]:
    found = {name: config for name, config in METHODS.items() if config is not None}
    for lr, span, threshold in (
        (1e-4, (200, 500), 1.0),
        (3e-5, (200, 500), 2.0),
        (1e-4, (50, 300), 3.0),
        (1e-4, (200, 500), 4.0),
        (3e-5, (200, 500), 4.0),
    ):
        settings = {"lr": lr, "timestep_range": span, "guard_threshold": threshold}
        found[f"lr {lr} t {span[0]}-{span[1]} threshold {threshold}"] = DENSE.replace(**settings)
    for match, lr in (("both", 1e-4), ("both", 5e-4), ("off", 1e-4), ("off", 5e-4)):
        found[f"match {match} lr {lr}, no guard"] = DENSE.replace(match=match, lr=lr, guard=0, guard_threshold=0.0)
    found["t 500-800 lr 1e-4, no guard"] = DENSE.replace(lr=1e-4, timestep_range=(500, 800), guard=0, guard_threshold=0.0)
    found["norm layers at 1e-3"] = DENSE.replace(parameters="norm", lr=1e-3, guard_threshold=2.0)
    found["match denoiser"] = DENSE.replace(match="denoiser", lr=1e-4, guard_threshold=3.0)
    return found


@torch.no_grad()
def measure(name: Any, config: AdaptConfig | None, matched: bool, streams: dict[str, Tensor], truth: Tensor) -> dict[str, Any]:
    model, denoiser = zoo.load(name)
    task = zoo.task(name)
    adapter = Adapter(model, denoiser, config or DENSE, task)
    bound, _ = task.bind(model, denoiser)
    rows = {}
    for stream, images in streams.items():
        adapter.reset()
        predictions, start, evaluations, accepted = [], time.perf_counter(), 0, 0
        for part in torch.arange(len(images)).split(BATCH):
            if config is None:
                crop = task.crop(model, images[part])
                crop = denoiser.calibration.match(crop) if matched and denoiser.calibration is not None else crop
                predictions.append(task.predict(bound(task.normalise(model, crop)), (crop.shape[-2], crop.shape[-1])))
            else:
                result = adapter.adapt(images[part], image_ids=part)
                predictions.append(result.predictions)
                evaluations += int(result.evaluations.sum())
                accepted += int(result.accepted.sum())
        seconds = time.perf_counter() - start
        found = scores(name, torch.cat(predictions), truth)
        rows[stream] = {
            "images": [round(float(value), 5) for value in found[MAIN[name]]],
            "scores": {key: float(values.mean()) for key, values in found.items()},
            "evaluations": evaluations / len(images),
            "accepted": accepted / len(images),
            "seconds": seconds / len(images),
        }
    return rows


def summary(rows: dict[str, Any], source: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Means over corruptions, the mean gain with its 95 % interval over images, and the corruption that gains least."""
    gains = torch.tensor([[a - b for a, b in zip(rows[n]["images"], source[n]["images"], strict=True)] for n in names])
    worst = max if "abs_rel" in rows[names[0]]["scores"] else min  # of an error the gain is below 0
    return {
        "scores": {key: sum(rows[n]["scores"][key] for n in names) / len(names) for key in rows[names[0]]["scores"]},
        "gain": float(gains.mean()),
        "gain_interval": bootstrap_interval(gains.mean(0)),
        "worst": worst((float(gain.mean()), name) for gain, name in zip(gains, names, strict=True)),
        **{key: sum(rows[n][key] for n in names) / len(names) for key in ("evaluations", "accepted", "seconds")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["segmentation", "depth"])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--split", choices=["validation", "test"], default="test")
    args = parser.parse_args()
    choosing = args.split == "validation"
    data = scenes(args.split, args.images)
    severities = CORRUPTIONS[args.task]
    streams = {**{name: corrupt(data.images, name, severity) for name, severity in severities.items()}, CLEAN: data.images}
    truth = truth_of(args.task, data)
    source = measure(args.task, None, False, streams, truth)
    path = RESULTS / f"dense_{args.task}.json"
    records = json.loads(path.read_text()) if path.is_file() else {}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=RESULTS, check=False).stdout.strip()
    methods = {**METHODS, **candidates()} if choosing else METHODS
    for name, config in methods.items():
        if args.only and name not in args.only:
            continue
        rows = source if name == "source" else measure(args.task, config, name == "matched alone", streams, truth)
        record = {
            "task": args.task,
            "method": name,
            "images": args.images,
            "severities": severities,
            "corrupted": summary(rows, source, list(severities)),
            "clean": summary(rows, source, [CLEAN]),
            "commit": commit,
            "environment": environment.describe(),
        }
        if choosing:
            with (RESULTS / "choose_dense.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
        else:
            records[name] = {**record, "rows": rows}
            path.write_text(json.dumps(records) + "\n")
        found, clean = record["corrupted"], record["clean"]
        low, high = found["gain_interval"]
        print(
            f"{name:36} {found['scores'][MAIN[args.task]]:.4f} gain {found['gain']:+.4f} ({low:+.4f} .. {high:+.4f})  "
            f"clean {clean['gain']:+.4f}  worst {found['worst'][0]:+.4f} {found['worst'][1]}  "
            f"{found['evaluations']:.1f} evaluations, accepted {found['accepted']:.0%}, {found['seconds']:.3f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
