"""CUDA streams: orders the work that a call leaves queued before that of the next call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StreamOrder:
    """Makes calls on several streams of a GPU run one after the other without blocking the host."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None  # stream of the last call
        self._done: torch.cuda.Event | None = None  # recorded at the end of the last call

    @contextmanager
    def within(self, device: torch.device) -> Iterator[bool]:
        """Runs a call after the previous one; yields whether the previous call ran on another stream."""
        if device.type != "cuda" or not torch.cuda.is_initialized():
            yield False
            return
        stream = torch.cuda.current_stream(device)
        if self._done is not None:
            stream.wait_event(self._done)
        moved, self._stream = self._stream is not None and stream != self._stream, stream
        try:
            yield moved
        finally:
            self._done = stream.record_event()
