"""Wall time by phase, and how long a step is expected to take."""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from dtta_fast.runtime import phases


class Clock:
    """Seconds by phase. On CUDA they are those of the device's own timeline: nothing waits for it before `seconds` is read."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[tuple[str, Any, Any]] = []

    def now(self) -> float:
        """Gives time.perf_counter() once the device has finished this thread's work."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the block's time to the phase, and marks it for a profile."""
        with self.span(name), nullcontext() if name == "adapt" else phases.phase(name):  # the parts of "adapt" have marks of their own
            yield

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Adds the block's time to `name`."""
        start = self._mark()
        try:
            yield
        finally:
            self._spans.append((name, start, self._mark()))

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by phase, once the device has finished."""
        found: dict[str, float] = {}
        for name, start, end in self._spans:
            found[name] = found.get(name, 0.0) + self._between(start, end)
        return found

    def __getstate__(self) -> dict[str, Any]:
        # events belong to their process: a copy holds seconds
        return {"_device": torch.device("cpu"), "_spans": [(name, 0.0, seconds) for name, seconds in self.seconds.items()]}

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _between(self, start: Any, end: Any) -> float:
        if self._device.type != "cuda":
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000


class Durations:
    """Seconds of the last runs. The very first, which may compile, is left out."""

    def __init__(self) -> None:
        self._first = True
        self._last: deque[float] = deque(maxlen=16)

    @property
    def expected(self) -> float:
        """The upper quartile in seconds, which one slow run does not move; 0 where nothing is known."""
        return sorted(self._last)[3 * len(self._last) // 4] if self._last else 0.0

    @contextmanager
    def timed(self, clock: Clock, wanted: bool) -> Iterator[None]:
        """Notes the block's time if it is wanted: it takes a wait for the device."""
        start = clock.now() if wanted else 0.0
        yield
        if wanted:
            self.note(clock.now() - start)
        self._first = False

    def note(self, seconds: float) -> None:
        """Adds a run."""
        if not self._first:
            self._last.append(seconds)
        self._first = False


@dataclass
class Pace:
    """How long a batch takes: its steps, the forward after the last one, and the guard, where it has something to compare."""

    step: Durations = field(default_factory=Durations)
    end: Durations = field(default_factory=Durations)
    guard: Durations = field(default_factory=Durations)


class Paces:
    """A session's paces: one for each number of images at once, and of pairs where they are given."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int | None], Pace] = {}

    def of(self, images: int, pairs: int | None) -> Pace:
        """The pace of so many images; at first that of the next larger number, since a pre-check lets any number through."""
        if (images, pairs) not in self._known:
            larger = sorted(count for count, given in self._known if count > images and given == pairs)
            self._known[images, pairs] = copy.deepcopy(self._known[larger[0], pairs]) if larger else Pace()
        return self._known[images, pairs]

    def clear(self) -> None:
        """Forgets all of them."""
        self._known.clear()
