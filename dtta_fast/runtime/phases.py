"""Marks the current phase of an adaptation for a profile; without a profile, the marks do nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

# in the order of an adaptation; a compiled step is a single unit whose parts cannot be marked separately
PHASES = (
    "encode",
    "restore",
    "classifier",
    "noising",
    "denoiser forward",
    "loss",
    "denoiser backward",
    "optimizer",
    "step (compiled)",
    "guard",
)
OTHER = "other"


class Listener:
    """Receives the phases of the thread that it listens to. Phases do not nest: inside a phase, no other one begins."""

    def __init__(self) -> None:
        self.current = OTHER

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self.current != OTHER:
            yield
            return
        self.current = name
        try:
            with self.during(name):
                yield
        finally:
            self.current = OTHER

    def during(self, name: str) -> AbstractContextManager[object]:
        """Returns the context that surrounds a phase."""
        return nullcontext()


class _Thread(threading.local):
    listener: Listener | None = None


_thread = _Thread()


def phase(name: str) -> AbstractContextManager[None]:
    """Marks a block as one of PHASES. Does nothing without a listener in this thread or in code traced by torch.compile."""
    if torch.compiler.is_compiling() or _thread.listener is None:
        return nullcontext()
    return _thread.listener.phase(name)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Sends this thread's phases to `listener`."""
    before, _thread.listener = _thread.listener, listener
    try:
        yield
    finally:
        _thread.listener = before
