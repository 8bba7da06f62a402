"""The tables of calibrations and of a classifier's models at their real sizes."""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
NAMES = {"digits": "digits-C", "fashion": "Fashion-MNIST-C", "cifar_resnet": "CIFAR-10, ResNet"}


def calibration() -> str:
    """Makes the table of what a cheap calibration costs in accuracy, against the shipped one."""
    records = json.loads((RESULTS / "calibration.json").read_text())
    lines = [
        "| benchmark | images | forward passes: shipped, cheap | seconds | trust: shipped, cheap | FAST: shipped "
        "| cheap minus shipped (95 %) | RANK: shipped | cheap minus shipped (95 %) |",
        "|---" * 9 + "|",
    ]
    for name, record in records.items():
        cells = []
        for found in record["presets"].values():
            streams = [row["accuracy"] for stream, row in found["shipped"].items() if stream != "clean"]
            low, high = found["difference"]["interval"]
            cells += [
                f"{100 * sum(streams) / len(streams):.1f}",
                f"{100 * found['difference']['mean']:+.1f} ({100 * low:+.1f} .. {100 * high:+.1f})",
            ]
        shipped, cheap = record["shipped"], record["cheap"]
        lines.append(
            f"| {NAMES[name]} | {record['images']} | {shipped['forwards']:,}, {cheap['forwards']:,} | {cheap['seconds']:.0f} "
            f"| {shipped['trust']:.2f}, {cheap['trust']:.2f} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines)


def real_sizes() -> str:
    """Makes the table of ConvNeXt-T with DiT-XL/2: seconds as measured or derived, and memory by count."""
    found, gib = json.loads((RESULTS / "real_sizes_classes.json").read_text()), 2**30
    weights = sum(found["weights in bf16"].values()) / gib
    plain, checkpointed = (found["bytes a pair in bf16"][way] / gib for way in ("False", "True"))
    rows = {
        "parameters of the DiT": f"{found['parameters'] / 1e6:.0f} M",
        "FLOPs a pair, forward and backward to the condition": f"{found['flops a pair'] / 1e12:.2f} T",
        f"a step of {found['pairs']} pairs, measured": f"{found['step']:.1f} s",
        f"a forward of {found['pairs']} rows, measured": f"{found['forward']:.1f} s",
        "the autoencoder's encoding, measured": f"{found['encode']:.1f} s",
        "FAST: 12 pairs and a guard of 48, from these": f"{found['FAST']:.0f} s",
        "a step of PAPER: 180 pairs, from these": f"{found['step of PAPER']:.0f} s",
        "peak memory of the process, float32": f"{found['peak bytes of the process'] / gib:.1f} GiB",
        "weights: DiT and autoencoder in bfloat16, classifier in float32": f"{weights:.2f} GiB",
        "bytes a pair in bfloat16: plain, checkpointed": f"{plain:.2f} GiB, {checkpointed:.2f} GiB",
    }
    for card, ways in found["pairs at once"].items():
        rows[f"pairs at once on {card} GB: plain, checkpointed"] = f"{ways['False']}, {ways['True']}"
    return "\n".join(["| | ConvNeXt-T with DiT-XL/2, 256 pixels |", "|---|---|", *(f"| {name} | {cell} |" for name, cell in rows.items())])
