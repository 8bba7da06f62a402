"""The figures of the report, each a plot with a text description of its values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dtta_fast.report.measures import Bin, Estimate, LossStep, Scale, number
from dtta_fast.report.svg import Axis, Plot, axis, tick_label

NAME_LENGTH = 20  # maximum length of a name next to a bar
COLOURS = 8  # run colours; the ninth run reuses the first one


def colour(run: int) -> str:
    """Returns the CSS class for the colour of a run."""
    return f"run{run % COLOURS}"


class BarRow(NamedTuple):
    """A name and one value per run, with its interval if available; None if a run has no value."""

    name: str
    values: Sequence[Estimate | float | None]


def bars(key: str, title: str, rows: Sequence[BarRow], runs: Sequence[str], scale: Scale, *, sign: bool = True, unit: str = "") -> Plot:
    """Plots horizontal bars with one row per name and the runs stacked within it. sign: show signs, because the values are changes."""
    factor = 100 if scale.percent else 1
    ends = [0.0]
    for row in rows:
        ends += [factor * end for value in row.values if value is not None for end in _ends(value)]
    across = axis(min(ends), max(ends))
    thick = 12 if len(runs) == 1 else 8
    row_height = len(runs) * (thick + 2) + 8
    words = []
    for row in rows:
        told = [_told(value, scale, sign, name if len(runs) > 1 else "") for value, name in zip(row.values, runs, strict=True)]
        words.append(f"{row.name}: {', '.join(told)}")
    left = 16 + 6.3 * min(NAME_LENGTH, max(len(row.name) for row in rows))
    plot = Plot(key, title, "; ".join(words) + ".", row_height * len(rows), left=left, bottom=42 if unit else 24, top=4)
    plot.x_axis(across, sign, unit)
    for i, row in enumerate(rows):
        top = i * row_height + 4
        plot.text(0, i * row_height + row_height / 2, short(row.name), "name", dx=-8, anchor="end")
        for k, value in enumerate(row.values):
            if value is None:
                continue
            y, name = top + k * (thick + 2) + 1, f"{runs[k]}, " if len(runs) > 1 else ""
            main = value.value if isinstance(value, Estimate) else value
            hint = f"{name}{row.name}: {_told(value, scale, sign)}"
            plot.bar(across.share(0), across.share(factor * main), y, thick, f"fill {colour(k)}", hint)
            if isinstance(value, Estimate):
                low, high = (across.share(factor * end) for end in (value.low, value.high))
                plot.line(low, y + thick / 2, high, y + thick / 2, "whisker")
                for end in (low, high):
                    plot.line(end, y + thick / 2 - 3, end, y + thick / 2 + 3, "whisker")
    return plot


def _ends(value: Estimate | float) -> tuple[float, ...]:
    return tuple(value) if isinstance(value, Estimate) else (value,)


def _told(value: Estimate | float | None, scale: Scale, sign: bool, name: str = "") -> str:
    if value is None:
        told = "none"
    elif isinstance(value, Estimate):
        told = f"{scale.shown(value.value, sign)} ({scale.shown(value.low, sign)} to {scale.shown(value.high, sign)})"
    else:
        told = scale.shown(value, sign)
    return f"{name} {told}".strip()


def short(name: str, length: int = NAME_LENGTH) -> str:
    """Shortens a name to fit next to a bar, keeping its end, which contains the severity."""
    return name if len(name) <= length else f"{name[: length - 5]}…{name[-4:]}"


def reliability_plot(key: str, run: str, number_of_run: int, before: Sequence[Bin], after: Sequence[Bin]) -> Plot:
    """Plots accuracy against confidence per bin; the area of a dot grows with the share of images in its bin."""
    unit = axis(0, 100)
    words = []
    for name, found in (("before", before), ("after", after)):
        told = (f"{number(100 * b.confidence, 0)} % sure, {number(100 * b.accuracy, 0)} % right" for b in found)
        words.append(f"{name}: {'; '.join(told)}")
    plot = Plot(key, f"Accuracy by confidence, {run}", ". ".join(words) + ".", 260, left=36, top=26, bottom=42)
    plot.x_axis(unit, label="confidence, %")
    plot.y_axis(unit, "accuracy, %")
    plot.curve([(0, plot.height), (1, 0)], "diagonal")
    for css, name, found in (("before", "before", before), (colour(number_of_run), "after", after)):
        points = [(b.confidence, plot.y(unit, 100 * b.accuracy)) for b in found]
        plot.curve(points, f"curve {css}")
        for b, (x, y) in zip(found, points, strict=True):
            share, sure, right = (number(100 * value) for value in b)
            hint = f"{name}: {share} % of the images, {sure} % sure, {right} % right"
            plot.dot(x, y, 2.5 + 9 * b.share**0.5, f"bin {css}", hint)
    return plot


class CostPoint(NamedTuple):
    """The name and number of a run, its mean evaluations per image and its main measure before and after."""

    name: str
    run: int
    evaluations: float
    before: float
    after: Estimate


def cost_plot(key: str, points: Sequence[CostPoint], scale: Scale) -> Plot:
    """Plots the main measure against evaluations per image: hollow before, filled with its interval after."""
    factor = 100 if scale.percent else 1
    across = axis(0, max(point.evaluations for point in points))
    values = [factor * value for point in points for value in (point.before, *point.after)]
    up = axis(min(values), max(values))
    words = "; ".join(
        f"{p.name}: {number(p.evaluations)} evaluations, {scale.shown(p.before)} before, {_told(p.after, scale, False)} after"
        for p in points
    )
    label = scale.label.lower()
    plot = Plot(key, f"{scale.label} against evaluations an image", f"{words}.", 230, left=48, top=26, bottom=42)
    plot.x_axis(across, label="evaluations an image")
    plot.y_axis(up, f"{label}, %" if scale.percent else label)
    for point in points:
        x, css = across.share(point.evaluations), colour(point.run)
        before, after, low, high = (plot.y(up, factor * value) for value in (point.before, *point.after))
        plot.curve([(0, before), (x, after)], f"link {css}")
        plot.line(x, low, x, high, f"curve {css}")
        plot.dot(0, before, 4.5, f"hollow {css}", f"{point.name}, before: {scale.shown(point.before)}")
        plot.dot(x, after, 5.5, f"solid {css}", f"{point.name}, after: {_told(point.after, scale, False)}")
    return plot


def cumulative_plot(key: str, evaluations: Sequence[int]) -> Plot:
    """Plots the cumulative share of images over the number of evaluations, as steps."""
    ordered = sorted(evaluations)
    counts: dict[int, int] = {}
    for i, value in enumerate(ordered, 1):
        counts[value] = i
    across, up = axis(0, ordered[-1]), axis(0, 100)
    shares = {value: 100 * count / len(ordered) for value, count in counts.items()}
    marks = {number(100 * q, 0): ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.25, 0.5, 0.75, 0.9)}
    words = ", ".join(f"{share} % of the images took at most {value}" for share, value in marks.items())
    plot = Plot(key, "Images by evaluations", f"{words}; the most is {ordered[-1]}.", 230, left=36, top=26, bottom=42)
    plot.x_axis(across, label="evaluations an image, at most")
    plot.y_axis(up, "share of images, %")
    points = [(0.0, plot.height)]
    for value, share in shares.items():
        points += [(across.share(value), points[-1][1]), (across.share(value), plot.y(up, share))]
    points.append((1.0, points[-1][1]))
    plot.curve(points, f"curve {colour(0)}")
    return plot


def loss_plot(key: str, curves: Sequence[tuple[str, int, Sequence[LossStep]]]) -> Plot:
    """Plots the mean loss and its quartiles for each run (name, number, steps)."""
    longest = max(len(steps) for _, _, steps in curves)
    ends = [value for _, _, steps in curves for step in steps for value in step]
    up = axis(min(ends), max(ends))
    words = []
    for name, _, steps in curves:
        told = (f"step {k} {step.mean:.4g} ({step.low:.4g} to {step.high:.4g})" for k, step in enumerate(steps, 1))
        words.append(f"{name}: {', '.join(told)}")
    left = 18 + 6.2 * max(len(tick_label(tick, up)) for tick in up.ticks)
    plot = Plot(key, "Denoising loss by step", "; ".join(words) + ".", 230, left=left, top=26, bottom=42)
    stride = -(-longest // 10)
    across = Axis(0.5, longest + 0.5, tuple(range(1, longest + 1, stride)))
    for tick in across.ticks:
        plot.text(across.share(tick), plot.height + 13, f"{tick:g}", anchor="middle")
    plot.text(0.5, plot.height + 31, "step", "axis", anchor="middle")
    plot.y_axis(up, "loss")
    for _, i, steps in curves:
        xs = [across.share(k) for k in range(1, len(steps) + 1)]
        if len(steps) > 1:
            low, high = ([(x, plot.y(up, getattr(step, end))) for x, step in zip(xs, steps, strict=True)] for end in ("low", "high"))
            plot.area([*low, *reversed(high)], f"band {colour(i)}")
    for name, i, steps in curves:
        points = [(across.share(k), plot.y(up, step.mean)) for k, step in enumerate(steps, 1)]
        plot.curve(points, f"curve {colour(i)}")
        for k, (step, (x, y)) in enumerate(zip(steps, points, strict=True), 1):
            if len(steps) == 1:  # no band; show the quartiles as a line
                plot.line(x, plot.y(up, step.low), x, plot.y(up, step.high), f"curve {colour(i)}")
            if len(steps) <= 20:
                plot.dot(x, y, 3, f"solid {colour(i)}", f"{name}, step {k}: {step.mean:.4g}")
    return plot


class Pair(NamedTuple):
    """A class probability or a score before and after, as text and as shares of the longest bar. truth: this is the true class."""

    name: str
    before: float
    after: float
    shown: str
    truth: bool = False


def pairs_plot(key: str, title: str, pairs: Sequence[Pair], run: int) -> Plot:
    """Plots two thin bars per row, before and after, with their values."""
    words = "; ".join(f"{pair.name}{' (true class)' if pair.truth else ''} {pair.shown}" for pair in pairs)
    right = 16 + 7 * max(len(pair.shown) for pair in pairs)
    plot = Plot(key, title, f"Before → after: {words}.", 24 * len(pairs), left=112, right=right, top=2, bottom=2)
    for i, pair in enumerate(pairs):
        y, css = 24 * i, "name truth" if pair.truth else "name"
        plot.text(0, y + 12, ("✓ " if pair.truth else "") + short(pair.name, 15), css, dx=-8, anchor="end")
        plot.bar(0, 1, y + 4, 16, "track")
        plot.bar(0, pair.before, y + 5, 6, "fill before")
        plot.bar(0, pair.after, y + 13, 6, f"fill {colour(run)}")
        plot.text(1, y + 12, pair.shown, css, dx=right - 4, anchor="end")
    return plot
