"""Draws accuracy against passes through the denoiser, every method a curve: python bench/quality/plot.py writes docs/quality.svg.

From bench/results/quality_digits.json, and quality_fashion.json where there is one. A pass is a forward or a backward of the denoiser
for one image; methods without a denoiser stand at the left edge.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[2]
NONE = 0.6  # where methods without a pass stand on the log axis


def curves(records: dict[str, Any]) -> dict[str, list[tuple[float, float, float, float]]]:
    """By family: passes, accuracy and its interval in %, in order of passes."""
    found: dict[str, list[tuple[float, float, float, float]]] = {}
    for record in records.values():
        figures = record["corrupted"]
        passes = max(NONE, figures["forwards"] + figures["backwards"])
        point = (passes, *(100 * value for value in (figures["accuracy"], *figures["interval"])))
        found.setdefault(record["family"], []).append(point)
    return {family: sorted(points) for family, points in found.items()}


def main() -> None:
    paths = [path for name in ("digits", "fashion") if (path := ROOT / "bench" / "results" / f"quality_{name}.json").is_file()]
    mpl.rcParams.update({"svg.hashsalt": "dtta", "font.size": 9})
    figure, axes = plt.subplots(1, len(paths), figsize=(6.5 * len(paths), 4.6), squeeze=False)
    for axis, path in zip(axes[0], paths, strict=True):
        records = json.loads(path.read_text())
        colours = plt.get_cmap("tab20").colors
        for k, (family, points) in enumerate(curves(records).items()):
            ours = family in ("FAST", "ONLINE")
            passes, accuracy, low, high = zip(*points, strict=True)
            errors = [[a - b for a, b in zip(accuracy, low, strict=True)], [b - a for a, b in zip(accuracy, high, strict=True)]]
            style = {"linewidth": 2.5 if ours else 1.2, "markersize": 6 if ours else 4, "zorder": 3 if ours else 2}
            axis.errorbar(passes, accuracy, errors, marker="o", color=colours[k % 20], label=family, elinewidth=0.8, capsize=2, **style)
        images = next(iter(records.values()))["images"]
        axis.set(
            xscale="log",
            xlabel="passes through the denoiser an image, forward and backward",
            ylabel="accuracy, %",
            title=f"{path.stem.removeprefix('quality_')}-C, {images} test images of each of 10 corruptions",
        )
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "quality.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
