"""Lets threads take turns on one object."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Turns:
    """Gives one thread at a time its turn, and refuses nested turns.

    A process forked during a thread's turn starts with no turn taken, since that thread does not exist there. A copy starts the same way.
    """

    def __init__(self) -> None:
        self._start()
        self._broken_off = False
        _ALL.add(self)

    def _start(self) -> None:
        self._lock, self._busy = threading.RLock(), False

    def __reduce__(self) -> tuple[Any, ...]:
        return Turns, ()

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Takes a turn; yields whether the previous turn was cut off by a fork.

        Raises:
            RuntimeError: this thread already has its turn, for example because a signal handler makes a call.
        """
        with self.several():
            self._busy = True
            broken_off, self._broken_off = self._broken_off, False
            try:
                yield broken_off
            finally:
                self._busy = False

    @contextmanager
    def several(self) -> Iterator[None]:
        """Blocks other threads during several turns of this one. Raises the same error as alone()."""
        lock = self._lock
        with lock:
            if self._busy:
                raise RuntimeError("the Adapter is in a call of this thread already, as in a signal handler; make the call after that one")
            yield

    def _forked(self) -> None:
        self._broken_off = self._broken_off or self._busy
        self._start()


_ALL: weakref.WeakSet[Turns] = weakref.WeakSet()  # all instances in this process, reset in forked children


def _after_fork() -> None:
    for turns in list(_ALL):
        turns._forked()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_after_fork)
