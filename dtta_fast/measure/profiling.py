"""Profiles one adaptation: time, work and memory per phase and per operator, compared with the machine's measured peaks."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtta_fast.config import AdaptConfig
from dtta_fast.measure.bottleneck import Row, bottleneck
from dtta_fast.measure.counting import Count, Counter
from dtta_fast.measure.roofline import Peak, measured_peak
from dtta_fast.runtime import environment
from dtta_fast.runtime.clock import Clock
from dtta_fast.runtime.phases import OTHER, PHASES, Listener, listening
from dtta_fast.session.adapter import Adapter
from dtta_fast.session.precision import products
from dtta_fast.session.result import AdaptResult

RUNS, LONG = 3, 10.0  # number of timed runs; fewer once they have taken this many seconds
UNSTEADY = 1.3  # ratio of the slowest to the fastest run above which timings count as unsteady
WHOLE, MARK = "adaptation", "phase: "  # trace span names: the span of the whole call, and the prefix of phase spans
IDLE, OUTSIDE, COMPILED = "(device idle)", "(Python and autograd)", "(compiled code, Python and autograd)"  # time outside all operators
WITHIN = ("aten::_fused_", "dtta_fast::")  # operators that call other operators, which the counter does not see
POINTS = 1000  # maximum number of points in a memory timeline


@dataclass(frozen=True)
class Span:
    """Time span of a phase in the profiled run, in seconds from the start of the run."""

    phase: str
    start: float
    end: float


@dataclass(frozen=True)
class Memory:
    """Tensor memory on the device over the profiled run, in bytes above the amount at the start.

    points: (seconds from the start, bytes). peak: the maximum, reached at peak_seconds in peak_phase.
    """

    points: list[tuple[float, int]]
    peak: int
    peak_seconds: float
    peak_phase: str
    spans: list[Span]


@dataclass(frozen=True)
class Profile:
    """Result of profile().

    Attributes:
        seconds: duration of the adaptation, from the fastest run without the profiler. phases: the phases of that run, whose times add up
            to it.
        runs: seconds of all runs without the profiler. profiled_seconds: duration of the run under the profiler. kernels: the operators of
            that run, slowest first, including a row for the time that no operator accounts for.
        peak: the machine's measured peaks. bottleneck: a sentence about the longest phase. notes: remarks needed to interpret the figures.
        images: number of images in the batch. adapted: number of them that used the denoiser. evaluations: total denoiser evaluations.
        warmup: seconds of the first call and of a warm call, as returned by Adapter.warmup. device, shape, config, environment: what was
            measured, and where.
    """

    seconds: float
    runs: list[float]
    phases: list[Row]
    profiled_seconds: float
    kernels: list[Row]
    memory: Memory
    peak: Peak
    bottleneck: str
    notes: list[str]
    images: int
    adapted: int
    evaluations: int
    warmup: dict[str, float]
    device: str
    shape: tuple[int, ...]
    config: dict[str, Any]
    environment: dict[str, str]


def profile(
    adapter: Adapter,
    images: Tensor,
    *,
    image_ids: Tensor | None = None,
    latents: Tensor | None = None,
    timesteps: Tensor | None = None,
    noise: Tensor | None = None,
    trace: Path | None = None,
) -> Profile:
    """Adapts to `images` several times: to warm up, with phases timed, under torch.profiler, and once more to count the work.

    The state of an online adapter is restored after each run.

    Args:
        images: [B, 3, H, W]; images, image_ids, latents, timesteps and noise are as in Adapter.adapt.
        trace: path for the Chrome trace of the profiled run, which includes the phases (chrome://tracing, ui.perfetto.dev).

    Raises:
        ValueError: bad input, or the adapter replays CUDA graphs, whose phases and operators cannot be told apart.
    """
    if "graphs" in adapter.config.compile:
        remedy = "profile with 'off' or 'regional'"
        raise ValueError(f"compile is {adapter.config.compile!r}, and the parts of a graph cannot be told apart: {remedy}")
    given: dict[str, Any] = {"image_ids": image_ids, "latents": latents, "timesteps": timesteps, "noise": noise}
    state, compiled = adapter.state_dict(), adapter.config.compile != "off"
    on_cuda = images.device.type == "cuda"

    def run() -> tuple[float, AdaptResult]:
        """Runs one adaptation; returns the seconds until the device has finished, and the result."""
        clock = Clock(images.device)
        start = clock.now()
        result = adapter.adapt(images, **given)
        seconds = clock.now() - start
        adapter.load_state_dict(state)
        return seconds, result

    warmup = adapter.warmup(images, **given)
    runs, whole, seconds_by_phase, result = _timed(run, images.device)
    profiled_seconds, recorded, events = _recorded(run, on_cuda, trace)
    by_phase, by_operator = _counted(run, compiled)
    with products(adapter.config.precision, images.device):
        peak = measured_peak(images.device, adapter.engine.program.problem.denoiser.dtype)
    seconds_by_phase[OTHER] = whole - sum(seconds_by_phase.values())
    names = [name for name in (*PHASES, OTHER) if name in seconds_by_phase]
    phases = [Row.of(name, seconds_by_phase[name], whole, by_phase.get(name, Count()), peak) for name in names]
    return Profile(
        seconds=whole,
        runs=runs,
        phases=phases,
        profiled_seconds=profiled_seconds,
        kernels=_kernels(recorded, by_operator, profiled_seconds, peak, on_cuda, compiled),
        memory=_memory(events, on_cuda),
        peak=peak,
        bottleneck=bottleneck(phases, adapter.config, peak, images.device),
        notes=_notes(adapter.config, len(images), result, runs),
        images=len(images),
        adapted=int((result.evaluations > 0).sum()),
        evaluations=int(result.evaluations.sum()),
        warmup=warmup,
        device=torch.cuda.get_device_name(images.device) if on_cuda else str(images.device),
        shape=tuple(images.shape),
        config=asdict(adapter.config),
        environment=environment.describe(),
    )


def _timed(run: Callable[[], tuple[float, AdaptResult]], device: torch.device) -> tuple[list[float], float, dict[str, float], AdaptResult]:
    """Runs with the phases timed; returns all durations, the shortest one with its seconds per phase, and the last result."""
    timed: list[tuple[float, dict[str, float]]] = []
    while len(timed) < RUNS and sum(seconds for seconds, _ in timed) < LONG:
        stopwatch = Stopwatch(device)
        with listening(stopwatch):
            seconds, result = run()
        timed.append((seconds, stopwatch.clock.seconds))
    whole, seconds_by_phase = min(timed, key=lambda one: one[0])  # the run least disturbed by other work
    return [seconds for seconds, _ in timed], whole, seconds_by_phase, result


def _counted(run: Callable[[], object], compiled: bool) -> tuple[dict[str, Count], dict[str, Count]]:
    """Runs once more, eagerly, since operators fused by compilation cannot be counted; returns the counts by phase and by operator."""
    counter, by_phase, by_operator = Counter(), dict[str, Count](), dict[str, Count]()
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext(), counter, listening(counter):
        run()
    for (phase, operator), count in counter.counts.items():
        by_phase.setdefault(phase, Count()).add(count)
        by_operator.setdefault(operator, Count()).add(count)
    return by_phase, by_operator


class Stopwatch(Listener):
    """Times the phases with a clock."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.clock = Clock(device)

    def during(self, name: str) -> AbstractContextManager[None]:
        return self.clock.span(name)


class Annotator(Listener):
    """Records each phase as a span in the trace."""

    def during(self, name: str) -> torch.profiler.record_function:
        return torch.profiler.record_function(MARK + name)


def _recorded(run: Callable[[], tuple[float, AdaptResult]], on_cuda: bool, trace: Path | None) -> tuple[float, Any, list[dict[str, Any]]]:
    """Runs once under the profiler; returns the seconds, the operators, and the trace events."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with (
        torch.profiler.profile(activities=activities, profile_memory=True) as recorded,
        listening(Annotator()),
        torch.profiler.record_function(WHOLE),
    ):
        seconds, _ = run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        if trace is not None:
            shutil.copyfile(path, trace)
        return seconds, recorded.events(), json.loads(path.read_text(encoding="utf-8"))["traceEvents"]


def _kernels(events: Any, counts: dict[str, Count], whole: float, peak: Peak, on_cuda: bool, compiled: bool) -> list[Row]:
    """Makes one row per operator; its time includes the operators that it calls and that have no count of their own.

    On CUDA, the time is that of the launched kernels. The remaining time of `whole` gets a row too. If compiled code has absorbed some of
    an operator's calls, its count covers more than its time and is left out.
    """
    seconds: dict[str, float] = {}
    calls: dict[str, int] = {}
    longest: dict[str, tuple[float, str]] = {}
    for event in events:
        if event.device_type.name != "CPU":
            continue
        took = (sum(kernel.duration for kernel in event.kernels) if on_cuda else event.self_cpu_time_total) / 1e6
        owner = _owner(event, counts)
        if owner is None and not (event.kernels if on_cuda else event.name.startswith("aten::")):
            continue
        name = event.name if owner is None else owner.name
        seconds[name] = seconds.get(name, 0.0) + took
        calls[name] = calls.get(name, 0) + (event.name == name)
        for kernel in event.kernels if on_cuda else ():
            longest[name] = max(longest.get(name, (0.0, "")), (kernel.duration, kernel.name))
    seconds[IDLE if on_cuda else COMPILED if compiled else OUTSIDE] = whole - sum(seconds.values())
    rows = []
    for name, took in sorted(seconds.items(), key=lambda item: -item[1]):
        met = Count(calls=calls.get(name, 0))
        count = counts.get(name, met)
        if compiled and count.calls != met.calls:
            count = met
        rows.append(Row.of(name, took, whole, count, peak, kernel=longest.get(name, (0.0, ""))[1]))
    return rows


def _owner(event: Any, counts: dict[str, Count]) -> Any:
    """Finds the operator to whose count the event's time belongs: the nearest one with a count, or a fused one around it; else None."""
    owner, outer = None, event
    while outer is not None:
        if outer.name in counts and (owner is None or outer.name.startswith(WITHIN)):
            owner = outer
        outer = outer.cpu_parent
    return owner


def _memory(events: list[dict[str, Any]], on_cuda: bool) -> Memory:
    """Builds the memory timeline from trace events, whose times are in microseconds."""
    named = [event for event in events if event.get("cat") == "user_annotation"]
    whole = next(event for event in named if event["name"] == WHOLE)
    start = whole["ts"]
    spans = [
        Span(event["name"].removeprefix(MARK), (event["ts"] - start) / 1e6, (event["ts"] + event["dur"] - start) / 1e6)
        for event in sorted(named, key=lambda event: float(event["ts"]))
        if event["name"].startswith(MARK)
    ]
    changes = sorted(
        ((event["ts"] - start) / 1e6, event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]" and event["args"]["Device Type"] == int(on_cuda)
    )
    points, held = [(0.0, 0)], 0
    for seconds, change in changes:
        held += change
        points.append((seconds, held))
    peak_seconds, peak = max(points, key=lambda point: point[1])
    inside = [span.phase for span in spans if span.start <= peak_seconds <= span.end]
    return Memory(_thinned(points), peak, peak_seconds, inside[0] if inside else OTHER, spans)


def _thinned(points: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """Reduces the points to at most POINTS, by keeping the highest of each group of neighbours."""
    width = -(-len(points) // POINTS)
    return [max(points[i : i + width], key=lambda point: point[1]) for i in range(0, len(points), width)]


def _notes(config: AdaptConfig, images: int, result: AdaptResult, runs: list[float]) -> list[str]:
    notes = [
        "FLOPs are those of matrix products, convolutions and attention, two for a multiplication with its addition.",
        "Bytes are a lower bound: those of the operators' inputs and outputs, each once a call.",
    ]
    if config.compile != "off":
        notes[1] = "Bytes are those of eager mode's operators, inputs and outputs once a call; compiled code moves fewer."
    if config.compile == "step":
        notes.append("With compile='step' a step is one piece of code, whose phases cannot be told apart: step (compiled).")
    alone = images - int((result.evaluations > 0).sum())
    if alone:
        notes.append(f"{alone} of {images} images were left alone: precheck is {config.precheck!r}; 'off' adapts every image.")
    if max(runs) > UNSTEADY * min(runs):
        told = f"{1e3 * min(runs):,.0f} to {1e3 * max(runs):,.0f} ms"
        notes.append(f"Runs took {told}: other work disturbs this machine, and shares of its peaks are not to be relied on.")
    return notes
