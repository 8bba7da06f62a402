"""Wall time by phase, and how long a step is expected to take."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch

from dtta_fast.runtime import phases


class Clock:
    """Seconds by phase; a phase ends when the device has finished its work."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}

    def now(self) -> float:
        """time.perf_counter() once the device has finished."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the block's time to the phase."""
        start = self.now()
        with nullcontext() if name == "adapt" else phases.phase(name):  # whose parts have marks of their own
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - start


class Durations:
    """Of the last runs but the very first, which may compile."""

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
        """Of one more run."""
        if not self._first:
            self._last.append(seconds)
        self._first = False


@dataclass
class Pace:
    """Of a batch's steps, of the forward after the last one, and of the guard, where it has something to compare."""

    step: Durations = field(default_factory=Durations)
    end: Durations = field(default_factory=Durations)
    guard: Durations = field(default_factory=Durations)
