"""Draws the gain against passes through the denoiser, every method a curve: python bench/quality/plot.py writes docs/quality.svg.

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
    """By family: passes, gain over the source and its interval in points, in order of passes."""
    found: dict[str, list[tuple[float, float, float, float]]] = {}
    for record in records.values():
        figures = record["corrupted"]
        passes = max(NONE, figures["forwards"] + figures["backwards"])
        point = (passes, *(100 * value for value in (figures["gain"], *figures["gain_interval"])))
        found.setdefault(record["family"], []).append(point)
    return {family: sorted(points) for family, points in found.items()}


def main() -> None:
    paths = [path for name in ("digits", "fashion") if (path := ROOT / "bench" / "results" / f"quality_{name}.json").is_file()]
    mpl.rcParams.update({"svg.hashsalt": "dtta", "font.size": 9})
    figure, axes = plt.subplots(1, len(paths), figsize=(5.5 * len(paths), 5.2), squeeze=False, sharey=True)
    found = {path: curves(json.loads(path.read_text())) for path in paths}
    families = dict.fromkeys(family for curve in found.values() for family in curve)
    colours = dict(zip(families, [*mpl.colormaps["tab20"].colors] * 2, strict=False))
    for axis, (path, curve) in zip(axes[0], found.items(), strict=True):
        for k, (family, points) in enumerate(curve.items()):
            ours = family in ("FAST", "ONLINE")
            passes, gains, low, high = zip(*points, strict=True)
            errors = [[a - b for a, b in zip(gains, low, strict=True)], [b - a for a, b in zip(gains, high, strict=True)]]
            style = {"linewidth": 2.5 if ours else 1.0, "markersize": 9 if ours else 4.5, "zorder": 3 if ours else 2}
            style |= {"color": colours[family], "marker": "*" if ours else "osv^DP<"[k % 7], "elinewidth": 0.7, "capsize": 2}
            axis.errorbar(passes, gains, errors, label=family, **style)
        axis.axhline(0, color="black", linewidth=0.6)
        axis.set(xscale="log", xlabel="passes through the denoiser an image", title=f"{path.stem.removeprefix('quality_')}-C, test images")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("gain over the source, points (95 % interval)")
    lines = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines.keys(), loc="lower center", ncols=5, fontsize=7)
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    figure.savefig(ROOT / "docs" / "quality.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
