"""Renders a profile as a page and its figures as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dtta_fast.measure.bottleneck import Row
from dtta_fast.measure.profiling import Memory, Profile
from dtta_fast.report.figures import COLOURS, colour
from dtta_fast.report.measures import number
from dtta_fast.report.page import ENVIRONMENT
from dtta_fast.report.svg import Plot, axis
from dtta_fast.runtime.phases import OTHER

HEADS = ("ms", "%", "calls", "GFLOP", "MB", "GFLOP/s", "GB/s", "% peak")
KERNELS = 15  # number of operators shown
BAND = 14  # height in pixels of the band of phases below a timeline


def cells(row: Row) -> list[str]:
    """Formats the figures of a row, in the order of HEADS."""
    return [
        figure(1e3 * row.seconds),
        number(100 * row.share),
        f"{row.calls:,}",
        figure(row.flops / 1e9),
        figure(row.bytes / 1e6),
        figure(row.flops_per_second / 1e9),
        figure(row.bytes_per_second / 1e9),
        number(100 * row.attained),
    ]


def figure(value: float) -> str:
    """Formats a value with about three digits."""
    if 0 < value < 0.0005:
        return "<0.001"
    return number(value, next((digits for digits, least in enumerate((100, 10, 1)) if value >= least), 3)) if value else "0"


def heading(found: Profile) -> str:
    """Describes what was measured."""
    milliseconds = f"{figure(1e3 * found.seconds)} ms, {figure(1e3 * found.seconds / found.images)} an image"
    return f"{found.images} image{'s' if found.images > 1 else ''} on {found.device}: {milliseconds}; {found.evaluations:,} evaluations"


def peak_line(found: Profile) -> str:
    """States the peaks to which the shares refer."""
    product, copy = figure(found.peak.flops / 1e9), figure(found.peak.bytes / 1e9)
    return f"Measured peak: {product} GFLOP/s ({found.peak.dtype} matrix product), {copy} GB/s (copy). A share is that of the nearer one."


def memory_line(memory: Memory) -> str:
    """States the peak memory and the phase in which it occurs."""
    return f"Peak memory: {figure(memory.peak / 1e6)} MB above the start, in {memory.peak_phase}."


def kernels_line(found: Profile) -> str:
    """States to which run the operator times refer."""
    return f"Times are those of a run under the profiler, which took {figure(1e3 * found.profiled_seconds)} ms."


def make_profile_page(found: Profile, subject: str) -> str:
    """Renders a page that loads no external resources. subject: what was profiled."""
    longest = sorted((row for row in found.phases if row.name != OTHER), key=lambda row: -row.seconds)[:COLOURS]
    colours = {row.name: colour(i) for i, row in enumerate(longest)}
    return ENVIRONMENT.get_template("profile.html").render(
        found=found,
        subject=subject,
        heading=heading(found),
        peak=peak_line(found),
        memory=memory_line(found.memory),
        profiled=kernels_line(found),
        heads=HEADS,
        phases=[(row.name, "", cells(row)) for row in found.phases],
        kernels=[(row.name, row.kernel, cells(row)) for row in found.kernels[:KERNELS]],
        colours=colours,
        bar=_bar(found.phases, colours),
        timeline=_timeline(found.memory, colours, found.profiled_seconds),
        details=[("Config", _plain(found.config)), ("Environment", _plain(found.environment))],
    )


def _bar(phases: Sequence[Row], colours: Mapping[str, str]) -> Plot:
    """Plots the total time as one bar split into phases."""
    words = ", ".join(f"{row.name} {number(100 * row.share)} %" for row in phases)
    plot, start = Plot("time", "Time by phase", f"{words}.", 26, left=0, right=0, top=2, bottom=2), 0.0
    for row in phases:
        end = min(1.0, start + max(0.0, row.share))
        plot.bar(start, end, 0, 26, f"fill {colours.get(row.name, 'before')}", f"{row.name}: {number(100 * row.share)} %")
        start = end
    return plot


def _timeline(memory: Memory, colours: Mapping[str, str], whole: float) -> Plot:
    """Plots memory over time above a band of the phases."""
    across, up = axis(0, 1e3 * whole), axis(0, memory.peak / 1e6, most=5)
    plot = Plot("memory", "Memory over time", memory_line(memory), 220, left=56, top=26, bottom=42)
    plot.x_axis(across, label="ms")
    plot.y_axis(up, "MB above the start")
    steps: list[tuple[float, float]] = []
    for seconds, held in memory.points:
        x, y = across.share(1e3 * seconds), plot.y(up, held / 1e6)
        steps += [(x, steps[-1][1] if steps else y), (x, y)]  # the memory held before and after this point
    steps.append((across.share(1e3 * whole), steps[-1][1]))
    plot.area([(0.0, plot.height), *steps, (steps[-1][0], plot.height)], "band run0")
    plot.curve(steps, "curve run0")
    for span in memory.spans:
        low, high = (across.share(1e3 * seconds) for seconds in (span.start, span.end))
        hint = f"{span.phase}: {figure(1e3 * (span.end - span.start))} ms"
        plot.bar(low, high, plot.height - BAND, BAND, f"fill {colours.get(span.phase, 'before')}", hint)
    x, y = across.share(1e3 * memory.peak_seconds), plot.y(up, memory.peak / 1e6)
    plot.dot(x, y, 4, "solid run0", memory_line(memory))
    return plot


def _plain(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, str(value)) for name, value in values.items()]
