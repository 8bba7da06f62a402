"""Wall time per phase and the expected duration of a step."""

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
    """Measures seconds per phase. On CUDA it uses the device's own timeline, and the host does not wait until `seconds` is read."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[tuple[str, Any, Any]] = []

    @property
    def waits(self) -> bool:
        """Returns whether now() has to wait for the device."""
        return self._device.type == "cuda"

    def now(self) -> float:
        """Returns time.perf_counter() after the device has finished this thread's work."""
        if self.waits:
            torch.cuda.current_stream(self._device).synchronize()
        return time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the block's time to the phase and marks the block for a profile."""
        with self.span(name), nullcontext() if name == "adapt" else phases.phase(name):  # the parts of "adapt" have their own marks
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
        """Returns the seconds per phase after the device has finished."""
        found: dict[str, float] = {}
        for name, start, end in self._spans:
            found[name] = found.get(name, 0.0) + self._between(start, end)
        return found

    def __getstate__(self) -> dict[str, Any]:
        # CUDA events belong to their process, so a copy stores seconds
        return {"_device": torch.device("cpu"), "_spans": [(name, 0.0, seconds) for name, seconds in self.seconds.items()]}

    def _mark(self) -> Any:
        if not self.waits:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _between(self, start: Any, end: Any) -> float:
        if not self.waits:
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000


class Durations:
    """Stores the durations of the last runs in seconds. The very first run, which may compile, is left out."""

    def __init__(self) -> None:
        self._first = True
        self._last: deque[float] = deque(maxlen=16)

    @property
    def expected(self) -> float:
        """Returns the upper quartile in seconds, which is robust to a single slow run; 0 without any measurement."""
        return sorted(self._last)[3 * len(self._last) // 4] if self._last else 0.0

    @contextmanager
    def timed(self, clock: Clock, wanted: bool) -> Iterator[None]:
        """Records the block's time if `wanted`; this requires waiting for the device."""
        start = clock.now() if wanted else 0.0
        yield
        if wanted:
            self.note(clock.now() - start)
        self._first = False

    def note(self, seconds: float) -> None:
        """Adds the duration of a run."""
        if not self._first:
            self._last.append(seconds)
        self._first = False


@dataclass
class Pace:
    """Durations of the parts of a batch: its steps, the forward after the last step, and the guard when it has something to compare."""

    step: Durations = field(default_factory=Durations)
    end: Durations = field(default_factory=Durations)
    guard: Durations = field(default_factory=Durations)


class Paces:
    """Stores a session's paces: one per number of simultaneous images and, if given, number of pairs."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int | None], Pace] = {}

    def of(self, images: int, pairs: int | None) -> Pace:
        """Returns the pace for a number of images. A new one starts as that of the next larger number: a pre-check can pass any number."""
        if (images, pairs) not in self._known:
            larger = sorted(count for count, given in self._known if count > images and given == pairs)
            self._known[images, pairs] = copy.deepcopy(self._known[larger[0], pairs]) if larger else Pace()
        return self._known[images, pairs]

    def clear(self) -> None:
        """Forgets all paces."""
        self._known.clear()
