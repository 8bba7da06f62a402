"""Stage 2, the tests: the folder tests/gpu by pytest, in a process of its own, stopped a little before the stage is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from bench.gpu_stages.recording import Record, Setting

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests" / "gpu"
GRACE = 5.0  # seconds that pytest has to end in, after it was interrupted
TAIL = 12  # lines of a failure that are kept
SMALL = FOLDER / "test_kernels.py::test_add_noise"  # of a tiny run: CI runs the whole folder anyway


def run(setting: Setting, record: Record) -> None:
    """Counts, and of each failure its name and its last lines. The output is in the log."""
    record.measure("tests", "tests/gpu", lambda: tests(setting.tiny, record.left - GRACE))


def tests(tiny: bool, seconds: float) -> dict[str, Any]:
    """What pytest says within that time; the tests hold the CPU against the GPU, and a CPU may have no compiled ops."""
    environment = {name: value for name, value in os.environ.items() if name != "DTTA_FAST_STRICT"}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # the tests need none, and importing those that are installed takes seconds
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        options = ("--import-mode=importlib", "-p", "no:cacheprovider", "-v", "--tb=short", "-m", "gpu", f"--junit-xml={report}")
        command = [sys.executable, "-m", "pytest", *options, str(SMALL if tiny else FOLDER)]
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored, and so would pytest
        process = subprocess.Popen(command, cwd=FOLDER, env=environment)
        try:
            process.wait(timeout=max(seconds, 1.0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # it then writes its report of the tests that ran
            process.wait(timeout=GRACE - 1)
            return {"stopped after": seconds, **read(report)}
        if process.returncode not in (0, 1):
            raise RuntimeError(f"pytest ended with exit code {process.returncode}; its output is in the log")
        return read(report)


def read(report: Path) -> dict[str, Any]:
    """Of a junit file."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failures, skipped = [], []
    for case in cases:
        name = f"{str(case.get('classname')).rpartition('.')[2]}::{case.get('name')}"
        for kind in ("failure", "error"):
            for found in case.findall(kind):
                failures.append({"name": name, "lines": (found.text or "").strip().splitlines()[-TAIL:]})
        skipped += [{"name": name, "reason": found.get("message")} for found in case.findall("skipped")]
    failed = len({failure["name"] for failure in failures})
    slowest = sorted(cases, key=lambda case: -float(case.get("time", 0)))[:5]
    return {
        "passed": len(cases) - failed - len(skipped),
        "failed": failed,
        "skipped": len(skipped),
        "seconds": sum(float(case.get("time", 0)) for case in cases),
        "failures": failures,
        "skips": skipped,
        "slowest": {str(case.get("name")): float(case.get("time", 0)) for case in slowest},
    }
