"""Measures candidate settings on the validation split of a benchmark; no test split is read.

    python bench/quality/choose.py [BENCHMARK] [--images 100] [--only WORD ...] [--root FOLDER]

Appends one JSON line per candidate to bench/results/choose.jsonl: its settings, accuracy by corruption, and cost. --only selects the
candidates whose names begin with one of the words.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from functools import partial
from pathlib import Path

from methods import (
    BATCH,
    MANY,
    METHODS,
    SINGLE,
    Method,
    Protocol,
    Setting,
    augmented,
    by_adapter,
    by_baseline,
    cotta,
    eata,
    memo,
    mirrored,
    sar,
    tent,
)
from run import BENCHMARKS, CIFAR, measure, subject, summary

from dtta_fast import AdaptConfig, presets
from dtta_fast.runtime import environment

RESULTS = Path(__file__).parents[1] / "results" / "choose.jsonl"
FAST, ONLINE, DUSA = presets.FAST, presets.ONLINE, presets.DUSA
EMBEDDING = ONLINE.replace(objective="embedding_mix", pairs=4, top_k=None, drawn_classes=0, logit_scale=6.0, lr=1e-4)

CONFIGS: dict[str, AdaptConfig] = {
    "FAST as it is": FAST,
    "FAST nothing matched": FAST.replace(match="off", precheck="off"),
    "FAST denoiser sees matched": FAST.replace(match="denoiser", precheck="off"),
    "FAST no guard": FAST.replace(guard=0, guard_threshold=0.0),
    "FAST no pre-check": FAST.replace(precheck="off"),
    "FAST guard 12, 1 error": FAST.replace(guard=12, guard_threshold=1.0),
    "FAST guard 12": FAST.replace(guard=12),
    "FAST guard 16": FAST.replace(guard=16),
    "FAST 5 steps, 3e-4": FAST.replace(steps=5, lr=3e-4),
    "FAST lr 1e-3": FAST.replace(lr=1e-3),
    "FAST logit_scale 3": FAST.replace(logit_scale=3.0),
    **{f"FAST range {low}-{low + 300}": FAST.replace(timesteps="stratified", timestep_range=(low, low + 300)) for low in (300, 500, 600)},
    "FAST range 200-700": FAST.replace(timesteps="stratified", timestep_range=(200, 700)),
    "FAST range 450-700": FAST.replace(timesteps="stratified", timestep_range=(450, 700)),
    "FAST antithetic": FAST.replace(antithetic=True),
    "FAST shared noise": FAST.replace(share_noise=True),
    "FAST common draws": FAST.replace(common_draws=True),
    "FAST uniform": FAST.replace(timesteps="uniform"),
    "FAST top 3": FAST.replace(top_k=3),
    "FAST top 3, 2 drawn": FAST.replace(top_k=3, drawn_classes=2),
    "FAST noise mixing": FAST.replace(objective="noise_mix", top_k=3, pairs=2),
    **{f"ONLINE lr {lr}": ONLINE.replace(lr=lr) for lr in (3e-6, 1e-5, 3e-5, 1e-4)},
    "ONLINE denoiser adapts": ONLINE.replace(denoiser_parameters="all", denoiser_lr=1e-5),
    "ONLINE 2 pairs": ONLINE.replace(pairs=2),
    "ONLINE top 3": ONLINE.replace(top_k=3, drawn_classes=0),
    "ONLINE logit_scale 6": ONLINE.replace(logit_scale=6.0),
    "ONLINE t 500": ONLINE.replace(timesteps="stratified", timestep_range=(500, 501)),
    "ONLINE guard": ONLINE.replace(guard=24, guard_threshold=3.0),
    **{f"ONLINE embeddings, lr {lr}": EMBEDDING.replace(lr=lr) for lr in (3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3)},
    "ONLINE embeddings, denoiser adapts": EMBEDDING.replace(denoiser_parameters="all", denoiser_lr=1e-5),
    "ONLINE embeddings, range 450-700": EMBEDDING.replace(timesteps="stratified", timestep_range=(450, 700)),
    **{f"DUSA t {t}": DUSA.replace(timestep_range=(t, t + 1)) for t in (100, 300, 500, 650)},
    "DUSA lr 1e-3": DUSA.replace(lr=1e-3),
    "DUSA lr 1e-5": DUSA.replace(lr=1e-5),
    "DUSA logit_scale 3": DUSA.replace(logit_scale=3.0),
    "DUSA matched": DUSA.replace(match="both"),
    "DUSA matched, lr 1e-5": DUSA.replace(match="both", lr=1e-5),
    "DUSA matched, lr 1e-5, t 500": DUSA.replace(match="both", lr=1e-5, timestep_range=(500, 501)),
}
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def candidates(natural: bool) -> dict[str, tuple[Method, dict[str, object]]]:
    """Returns the candidates and their settings; those without a denoiser take larger batches of natural images."""
    batch = MANY if natural else 10
    augment = mirrored if natural else augmented
    baselines = {"TENT": tent, "EATA": eata, "SAR": sar, "CoTTA": partial(cotta, augment=augment), "MEMO": partial(memo, augment=augment)}
    found: dict[str, tuple[Method, dict[str, object]]] = {}
    for name, config in CONFIGS.items():
        online = config.mode == "online"
        make = by_adapter(config, answer_first=name.startswith("DUSA"))
        found[name] = Method(make, 10 if online else BATCH, "online" if online else SINGLE, name), dataclasses.asdict(config)
    for name, build in baselines.items():
        for lr in RATES:
            protocol: Protocol = "single-sample" if name == "MEMO" else "online"
            found[f"{name} lr {lr}"] = Method(by_baseline(build(lr)), batch, protocol, name), {"lr": lr}
            if name in ("TENT", "EATA"):
                found[f"{name}, matched lr {lr}"] = Method(by_baseline(build(lr), matched=True), batch, protocol, name), {"lr": lr}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", nargs="?", choices=[name for name in BENCHMARKS if name != "open_vocabulary"], default="digits")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--only", nargs="*", default=[""])
    parser.add_argument("--root", type=Path, help="the folder with CIFAR-10")
    parser.add_argument("--denoiser", type=Path, default=CIFAR, help="the diffusion model of CIFAR-10")
    args = parser.parse_args()
    args.split, args.unseen = "validation", False
    model, denoiser, train, streams, labels, severities = subject(args)
    setting = Setting(model, denoiser, train, 0)
    source = measure(METHODS["source"], setting, streams, labels)
    for name, (method, settings) in candidates(args.benchmark.startswith("cifar")).items():
        if not any(name.startswith(word) for word in args.only):
            continue
        rows = measure(method, setting, streams, labels)
        found = {key: summary([rows], source, names) for key, names in (("corrupted", list(severities)), ("clean", ["clean"]))}
        by_corruption = {corruption: row["accuracy"] for corruption, row in rows.items()}
        record = {
            "benchmark": args.benchmark,
            "candidate": name,
            "images": args.images,
            "settings": settings,
            **found,
            "accuracy": by_corruption,
            "versions": environment.describe(),
        }
        with RESULTS.open("a") as file:
            file.write(json.dumps(record) + "\n")
        figures, worst = found["corrupted"], found["corrupted"]["worst"]
        print(
            f"{name:28} {figures['accuracy']:6.1%} gain {figures['gain']:+6.1%}  clean {found['clean']['accuracy']:6.1%}  "
            f"worst {worst[0]:+.1%} {worst[1]}  flips {figures['negative_flips']:.1%}  "
            f"{figures['forwards']:.1f} + {figures['backwards']:.1f} passes, {figures['seconds']:.3f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
