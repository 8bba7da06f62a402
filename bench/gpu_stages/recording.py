"""Records what a stage has measured so far, in a file that is rewritten after each measurement."""

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
DIGITS = 5  # significant digits of a number in the file


def rounded(value: Any) -> Any:
    """Rounds the numbers in nested lists and dictionaries. Infinities and NaN become strings, because JSON does not have them."""
    if isinstance(value, dict):
        return {str(key): rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else str(value)
    return value


def write_json(path: Path, value: Any) -> None:
    """Replaces the file atomically: there is never half a file, not even if the process is killed."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(rounded(value), indent=1) + "\n")
    os.replace(new, path)


@dataclass(frozen=True)
class Setting:
    """How a stage runs. out: the folder for traces. tiny: small models and few repetitions, to test the stages on a CPU."""

    device: torch.device
    tiny: bool
    out: Path


class Record:
    """The measurements of a stage that ends when time.time() reaches `end`."""

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
        """Records a value as measured[group][name]."""
        self._found["measured"].setdefault(group, {})[name] = value
        self._write()

    def measure(self, group: str, name: str, work: Callable[[], Any], takes: float = 0.0) -> Any:
        """Records what `work` returns. If it raises, the error is recorded instead, the log gets the traceback, and the stage goes on.

        takes: the seconds that `work` is expected to take. If fewer are left, it does not start, and the record says so.

        Returns:
            What `work` returned, or None.

        Raises:
            RuntimeError: the GPU does not respond after an error, so nothing after it would run.
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
        """Records that this measurement needs a GPU."""
        self.put(group, name, {"left out": NEEDS_GPU})


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:400]}" if lines else type(error).__name__
