"""What a calibration of 5,000 evaluations loses against the shipped one, which took twenty times as many.

    python bench/quality/calibration.py digits fashion cifar_resnet [--images 100] [--root FOLDER]

Calibrates on training images with the classifier's outputs, then runs FAST and RANK on the benchmark's test images with both calibrations.
The images' statistics are those of the shipped calibration in both cases, so only the timesteps' density and the trust differ. Writes
bench/results/calibration.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from methods import METHODS, Setting, bound, model_inputs
from run import BENCHMARKS, RESULTS, measure, subject

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import source_tree

source_tree.use()

from dtta_fast import calibrate, zoo  # noqa: E402
from dtta_fast.metrics import bootstrap_interval  # noqa: E402
from dtta_fast.runtime import environment  # noqa: E402
from dtta_fast.tasks import ZeroShot  # noqa: E402

PRESETS = ("FAST", "RANK")
FULL = {"images": 64, "forwards": lambda classes: 64 * (20 * classes + 16 * 20 * 5 + 24 * 5)}  # of the shipped calibrations


def counted(denoiser: Any) -> list[int]:
    """Counts the rows of the denoiser's forward passes from now on."""
    found, forward = [0], denoiser.forward

    def counting(x: Any, *others: Any) -> Any:
        found[0] += len(x)
        return forward(x, *others)

    denoiser.forward = counting
    return found


def compared(args: argparse.Namespace) -> dict[str, Any]:
    """Calibrates one benchmark's denoiser, and measures the presets with both calibrations."""
    found = subject(args)
    task = ZeroShot(zoo.DIGITS, zoo.load_processor("open_vocabulary")) if args.benchmark == "open_vocabulary" else None
    setting = Setting(found.model, found.denoiser, found.train, 0, task)
    shipped = found.denoiser.calibration
    own = bound(setting)
    with torch.no_grad():
        outputs = torch.cat([own.model(model_inputs(own, part)) for part in found.train.split(50)])
    denoiser, start = own.denoiser, time.perf_counter()
    rows = counted(denoiser)
    cheap = calibrate(denoiser, found.train, outputs)
    seconds, forwards = time.perf_counter() - start, rows[0]
    del denoiser.forward
    cheap = dataclasses.replace(shipped, signal=cheap.signal, spread=cheap.spread, trust=cheap.trust)
    answers: dict[str, dict[str, Any]] = {}
    names = list(found.severities)
    for preset in PRESETS:
        answers[preset] = {}
        for name, calibration in (("shipped", shipped), ("cheap", cheap)):
            found.denoiser.calibration = calibration
            measured = measure(METHODS[preset], setting, found.streams, found.labels)
            answers[preset][name] = {
                stream: {key: row[key] for key in ("accuracy", "right", "forwards")} for stream, row in measured.items()
            }
            print(args.benchmark, preset, name, f"{sum(measured[n]['accuracy'] for n in names) / len(names):.1%}", flush=True)
        right = {
            name: torch.tensor([[float(r) for r in answers[preset][name][stream]["right"]] for stream in names]) for name in answers[preset]
        }
        difference = (right["cheap"] - right["shipped"]).mean(0)
        answers[preset]["difference"] = {"mean": float(difference.mean()), "interval": bootstrap_interval(difference)}
    found.denoiser.calibration = shipped
    classes = len(own.denoiser.class_embeddings({}))
    return {
        "images": args.images,
        "classes": classes,
        "shipped": {"forwards": FULL["forwards"](classes), "trust": shipped.trust, "signal": shipped.signal, "spread": shipped.spread},
        "cheap": {"forwards": forwards, "seconds": seconds, "trust": cheap.trust, "signal": cheap.signal, "spread": cheap.spread},
        "presets": answers,
        "environment": environment.describe(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmarks", nargs="+", choices=BENCHMARKS)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--split", choices=["validation", "test"], default="test")
    parser.add_argument("--root", type=Path, help="the folder with CIFAR-10")
    parser.add_argument("--denoiser", type=Path, default=Path(__file__).parents[1] / "zoo" / "cifar_weights" / "denoiser")
    parser.add_argument("--out", type=Path, default=RESULTS / "calibration.json")
    args = parser.parse_args()
    args.unseen = False
    record = json.loads(args.out.read_text()) if args.out.exists() else {}
    for benchmark in args.benchmarks:
        record[benchmark] = compared(argparse.Namespace(**{**vars(args), "benchmark": benchmark}))
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
