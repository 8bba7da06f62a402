"""Marks that say which part of an adaptation is under way: for a profile, and nothing where none is made."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

# in the order of an adaptation; compiled, a step is one piece whose parts no mark can tell apart
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
    """What is told of the phases of the thread that it listens to; within a phase no other one begins."""

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
        """What surrounds a phase."""
        return nullcontext()


class _Thread(threading.local):
    listener: Listener | None = None


_thread = _Thread()


def phase(name: str) -> AbstractContextManager[None]:
    """Marks a block as one of PHASES. Without a listener in this thread, and in code that torch.compile traces, it does nothing."""
    if torch.compiler.is_compiling() or _thread.listener is None:
        return nullcontext()
    return _thread.listener.phase(name)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tells `listener` of this thread's phases."""
    before, _thread.listener = _thread.listener, listener
    try:
        yield
    finally:
        _thread.listener = before
