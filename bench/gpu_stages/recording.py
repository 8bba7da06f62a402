"""The record of what a stage has measured so far, a file that is rewritten after each measurement."""

from __future__ import annotations

import json
import math
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

NEEDS_GPU = "needs a GPU"
DIGITS = 5  # significant ones of a number in the file


def rounded(value: Any) -> Any:
    """Nested lists and dictionaries with their numbers rounded; a number that is not finite becomes its name, since JSON has none."""
    if isinstance(value, dict):
        return {str(key): rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else str(value)
    return value


def write_json(path: Path, value: Any) -> None:
    """Replaces the file in one step: a reader, or a kill, never meets half of it."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(rounded(value), indent=1) + "\n")
    os.replace(new, path)


@dataclass(frozen=True)
class Setting:
    """Where a stage runs. out: the folder for traces. tiny: small models and few repetitions, to test the stages on a CPU."""

    device: torch.device
    tiny: bool
    out: Path


class Record:
    """The measurements of a stage, which ends at time.time() `end`."""

    def __init__(self, path: Path, end: float, about: dict[str, Any]) -> None:
        self._path, self._end = path, end
        self._found: dict[str, Any] = {"about": about, "measured": {}}
        self._write()

    def _write(self) -> None:
        write_json(self._path, self._found)

    @property
    def left(self) -> float:
        """Seconds until the stage is stopped."""
        return self._end - time.time()

    def put(self, group: str, name: str, value: Any) -> None:
        """Keeps a value as measured[group][name]."""
        self._found["measured"].setdefault(group, {})[name] = value
        self._write()

    def measure(self, group: str, name: str, work: Callable[[], Any], takes: float = 0.0) -> Any:
        """Keeps what `work` returns. An error is kept in its place, with the traceback in the log, and the stage goes on.

        takes: seconds that it will take. Where fewer are left it is not begun, and the record says so.

        Returns:
            What it returned, or None.

        Raises:
            RuntimeError: the GPU does not answer after an error, so nothing that followed would run.
        """
        if self.left < takes:
            self.put(group, name, {"left out": f"takes about {takes:.0f} s, and {max(self.left, 0):.0f} s were left"})
            return None
        begun = time.monotonic()
        try:
            found = work()
        except Exception as error:
            traceback.print_exc()
            self.put(group, name, {"error": first_line(error)})
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return None
        self.put(group, name, found)
        print(f"{group}, {name}: {time.monotonic() - begun:.1f} s", flush=True)
        return found

    def needs_gpu(self, group: str, name: str) -> None:
        """Notes that only a GPU can do this."""
        self.put(group, name, {"left out": NEEDS_GPU})


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:400]}" if lines else type(error).__name__
