"""Draws accuracy on corrupted images against the denoiser's work, every method named beside its point: python bench/quality/plot.py

Reads bench/results/quality_BENCHMARK.json of every benchmark that was measured. Writes docs/quality_BENCHMARK.svg, the README's picture of
at most eight methods, and docs/quality_BENCHMARK_all.svg, all methods by number, with a key. A pass is a forward or a backward of the
denoiser for one image. Methods without a denoiser stand in a column of their own, in the order of their accuracy.

Some methods were run on fewer images than others. So that all can be compared, a method stands at the source's accuracy on all images
plus the method's gain over the source on the images that it was run on. Its bar is the gain's 95 % interval, and the number beside it the
gain in points.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.text import Annotation, Text
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator

ROOT = Path(__file__).parents[2]
BENCHMARKS = {"digits": "digits-C", "fashion": "Fashion-MNIST-C", "cifar_resnet": "CIFAR-10 under 15 corruptions"}
IN_README = {"digits": "CoTTA", "cifar_resnet": "EATA, matched"}  # benchmarks, and the method of SUMMARY that is left out for room
SUMMARY = {  # the README's methods: their names there, and colours that the colour-blind can tell apart
    "FAST": ("FAST", "#d1350f"),
    "RANK": ("RANK", "#e8743b"),
    "ONLINE": ("ONLINE", "#b8860b"),
    "PAPER": ("PAPER (Diffusion-TTA)", "#7b3294"),
    "diffusion classifier, 8": ("diffusion classifier", "#0072b2"),
    "NEO, matched": ("NEO, matched", "#2f9fd0"),
    "EATA, matched": ("EATA, matched", "#00845f"),
    "CoTTA": ("CoTTA", "#00845f"),
    "matched alone": ("matching alone", "#555555"),
}
OURS, DIFFUSION, PLAIN, GREY = "#d1350f", "#0072b2", "#3d7a4b", "#444444"
DIRECTIONS = [(math.cos(math.pi * k / 8), math.sin(math.pi * k / 8)) for k in range(16)]


class Point(NamedTuple):
    """A method's passes an image, its gain over the source in points, and its accuracy with the interval, in percent."""

    name: str
    passes: float
    gain: float
    accuracy: float
    low: float
    high: float


class Box(NamedTuple):
    """A rectangle of the picture, in pixels."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: Box) -> float:
        """Returns the area that both cover."""
        width, height = min(self.right, other.right) - max(self.left, other.left), min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(0.0, width) * max(0.0, height)


def source_accuracy(records: dict[str, Any]) -> float:
    """Returns the source's share of right answers on the images of the largest run: a method's accuracy without its gain."""
    figures = max(records.values(), key=lambda record: record["images"])["corrupted"]
    return float(figures["accuracy"] - figures["gain"])


def points(records: dict[str, Any]) -> list[Point]:
    """Returns every method but the source, the most accurate first."""
    source, found = source_accuracy(records), []
    for name, record in records.items():
        figures = record["corrupted"]
        values = (100 * (source + gain) for gain in (figures["gain"], *figures["gain_interval"]))
        if name != "source":
            found.append(Point(name, figures["forwards"] + figures["backwards"], 100 * figures["gain"], *values))
    return sorted(found, key=lambda point: -point.accuracy)


def signed(gain: float) -> str:
    """Returns points with their sign, as a label shows them."""
    return f"{gain:+.1f}".replace("-", "−")


def columns(found: list[Point]) -> tuple[list[float], float, float, float]:
    """Returns every point's place on the x axis, the ends of the column of the methods without a denoiser, and the end of the axis."""
    working = [point.passes for point in found if point.passes]
    idle = [point for point in found if not point.passes]
    end, last = min(working, default=10.0) / 1.6, 2.5 * max([100.0, *working])
    share = min(0.36, 0.12 + 0.06 * len(idle))  # of the axis
    width = math.log10(last / end) * share / (1 - share)
    begin = end / 10**width
    return [point.passes or begin * 10 ** (width * (idle.index(point) + 0.5) / len(idle)) for point in found], begin, end, last


def pixels(axis: Axes, x: float, y: float) -> tuple[float, float]:
    """Returns where a point of the data is in the picture."""
    right, up = axis.transData.transform((x, y))
    return float(right), float(up)


def trail(start: tuple[float, float], end: tuple[float, float]) -> list[Box]:
    """Returns small boxes along the line from start to end."""
    steps = max(1, int(math.dist(start, end) / 3))
    places = [tuple(a + (b - a) * k / steps for a, b in zip(start, end, strict=True)) for k in range(steps + 1)]
    return [Box(x - 1, y - 1, x + 1, y + 1) for x, y in places]


def place(axis: Axes, labels: list[Annotation], bars: list[tuple[float, float]], taken: list[Box]) -> None:
    """Moves each label to the place near its point, or near an end of its bar, where it covers least of what is there.

    A line leads to a label that is far away. The labels take their places in order and nothing is drawn by chance, so a picture is
    always the same. bars are the intervals, in the data's units, and taken is what the picture shows already.
    """
    figure: Any = axis.figure
    renderer, frame, unit = figure.canvas.get_renderer(), axis.get_window_extent(), figure.dpi / 72
    inner, taken = Box(frame.x0, frame.y0, frame.x1, frame.y1), list(taken)
    for label, ends in zip(labels, bars, strict=True):
        size, point = Text.get_window_extent(label, renderer), pixels(axis, *label.xy)
        low, high = (pixels(axis, label.xy[0], end) for end in ends)
        starts = [(point, right, up, distance) for distance in (9, 15, 24, 36, 50) for right, up in DIRECTIONS]
        starts += [
            (end, right, up, distance)
            for end, up in ((high, 1.0), (low, -1.0))
            for right, distance in ((0.0, 3), (0.8, 3), (-0.8, 3), (0.0, 12), (0.0, 24), (0.0, 36))
        ]
        best: tuple[float, Box, list[Box], tuple[float, float], float] | None = None
        for start, right, up, distance in starts:
            x = start[0] + right * (distance * unit + size.width / 2)
            y = start[1] + up * (distance * unit + size.height / 2)
            box = Box(x - size.width / 2 - 2, y - size.height / 2 - 1, x + size.width / 2 + 2, y + size.height / 2 + 1)
            near = (min(max(start[0], box.left), box.right), min(max(start[1], box.bottom), box.top))
            leader = trail(start, near)[3:] if distance > 12 else []
            outside = (box.right - box.left) * (box.top - box.bottom) - box.overlap(inner)
            covered = sum(box.overlap(other) for other in taken)
            crossed = sum(step.overlap(other) for step in leader for other in taken)
            cost = 20 * outside + 10 * covered + 20 * crossed + 4 * distance * unit + 6 * abs(right) * (-1 if start == point else 1)
            if best is None or cost < best[0]:
                best = cost, box, leader, (x, y), right
        assert best is not None
        _, box, leader, (x, y), right = best
        label.set_position(((x - point[0]) / unit, (y - point[1]) / unit))
        label.set_multialignment("left" if right > 0.4 else "right" if right < -0.4 else "center")
        if label.arrow_patch is not None:
            label.arrow_patch.set_visible(bool(leader))
        taken += [box, *leader]


def draw(axis: Axes, found: list[Point], source: float, texts: list[str], colours: list[str]) -> None:
    """Draws the points with their intervals, FAST as a star, the source as a line, and a text beside every point."""
    at, begin, end, last = columns(found)
    top = max([point.high for point in found] + [source])
    bottom = min([point.low for point in found] + [source])
    axis.set(xscale="log", xlim=(begin, last), ylim=(bottom - 0.06 * (top - bottom), top + 0.14 * (top - bottom)))
    axis.axvspan(begin, end, color="#f1f1f1", linewidth=0)
    ticks = [10**k for k in range(math.ceil(math.log10(end)), 5) if 10**k < last]
    middle = math.sqrt(begin * end)
    axis.set_xticks([middle, *ticks], ["no denoiser", *(f"{tick:,}" for tick in ticks)])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set(xlabel="passes through the denoiser an image", ylabel="correct on corrupted images, %")
    axis.spines[["top", "right"]].set_visible(False)
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.axhline(source, color="black", linewidth=1.2, linestyle=(0, (5, 3)), zorder=1.5)
    name = axis.annotate(
        f"source, not adapted: {source:.1f} %",
        (1, source),
        (-2, -4),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        va="top",
    )
    labels = []
    for point, x, text, colour in zip(found, at, texts, colours, strict=True):
        fast = point.name == "FAST"
        error = [[point.accuracy - point.low], [point.high - point.accuracy]]
        style: dict[str, Any] = {"elinewidth": 1.6 if fast else 0.9, "zorder": 4 if fast else 3, "marker": "*" if fast else "o"}
        style |= {"markersize": 17 if fast else 6.5, "markeredgecolor": "white", "markeredgewidth": 0.7}
        axis.errorbar([x], [point.accuracy], error, color=colour, **style)
        labels.append(
            axis.annotate(
                text, (x, point.accuracy), (0, 0), textcoords="offset points", ha="center", va="center", color=colour, zorder=5,
                fontweight="bold" if fast else "normal", fontsize=mpl.rcParams["font.size"] * (1.25 if fast else 1),
                arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.7, "shrinkA": 0, "shrinkB": 3},
            )
        )  # fmt: skip
    figure: Any = axis.figure
    figure.canvas.draw()
    figure.set_layout_engine("none")  # the labels find their places in the layout as it is now
    written = name.get_window_extent(figure.canvas.get_renderer())
    taken = [Box(written.x0, written.y0, written.x1, written.y1)]
    left, line = pixels(axis, begin, source)
    taken.append(Box(left, line - 1, written.x1, line + 1))
    unit = figure.dpi / 72
    for point, x in zip(found, at, strict=True):
        x, low = pixels(axis, x, point.low)
        high, middle = pixels(axis, 1, point.high)[1], pixels(axis, 1, point.accuracy)[1]
        half = (8 if point.name == "FAST" else 4) * unit
        taken += [Box(x - 3 * unit, low, x + 3 * unit, high), Box(x - half, middle - half, x + half, middle + half)]
    order = sorted(range(len(found)), key=lambda k: (found[k].name != "FAST", k))
    place(axis, [labels[k] for k in order], [(found[k].low, found[k].high) for k in order], taken)


def summary(records: dict[str, Any], title: str, path: Path, left_out: str = "") -> None:
    """Draws the README's methods, those that were measured and not `left_out`, with their names and gains."""
    found = [point for point in points(records) if point.name in SUMMARY and point.name != left_out]
    figure, axis = plt.subplots(figsize=(8.2, 4.7), layout="constrained")
    texts = [f"{SUMMARY[point.name][0]}\n{signed(point.gain)}" for point in found]
    axis.set_title(title, loc="left", fontweight="bold")
    draw(axis, found, 100 * source_accuracy(records), texts, [SUMMARY[point.name][1] for point in found])
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def whole(records: dict[str, Any], title: str, path: Path) -> None:
    """Draws all methods, numbered in the order of their accuracy, with the key on the right."""
    found = points(records)
    ours = [point.name.startswith(("FAST", "ONLINE")) for point in found]
    colours = [OURS if own else DIFFUSION if point.passes else PLAIN for own, point in zip(ours, found, strict=True)]
    figure, (axis, key) = plt.subplots(1, 2, figsize=(11, 6.2), width_ratios=(1, 0.62), layout="constrained")
    axis.set_title(title, loc="left", fontweight="bold")
    key.set(xlim=(0, 1), ylim=(max(len(found), 24) + 0.5, -1.5))
    key.axis("off")
    for x, text, side in ((0.09, "method", "left"), (0.85, "gain", "right"), (1.0, "passes", "right")):
        key.text(x, -0.2, text, ha=side, color=GREY)
    for row, (point, colour) in enumerate(zip(found, colours, strict=True), 1):
        style = {"color": colour, "va": "center", "fontweight": "bold" if point.name == "FAST" else "normal"}
        key.text(0.06, row, row, ha="right", **style)
        key.text(0.09, row, point.name, **style)
        key.text(0.85, row, signed(point.gain), ha="right", **style)
        key.text(1.0, row, f"{point.passes:,.0f}" if point.passes else "none", ha="right", **style)
    numbers = [str(row) for row in range(1, len(found) + 1)]
    draw(axis, found, 100 * source_accuracy(records), numbers, colours)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    mpl.use("Agg")
    mpl.rcParams.update({"svg.hashsalt": "dtta", "font.size": 10})
    for name, title in BENCHMARKS.items():
        results = ROOT / "bench" / "results" / f"quality_{name}.json"
        if results.is_file():
            records = json.loads(results.read_text())
            if name in IN_README:
                summary(records, title, ROOT / "docs" / f"quality_{name}.svg", IN_README[name])
            whole(records, title, ROOT / "docs" / f"quality_{name}_all.svg")


if __name__ == "__main__":
    main()
