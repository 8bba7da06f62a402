"""Stage 2, the tests: runs tests/gpu with pytest and records each test as it ends, so that a crash or a timeout loses no results."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from bench.gpu_stages.recording import Record, Setting

FOLDER = Path(__file__).resolve().parents[2] / "tests" / "gpu"
SMALL = FOLDER / "test_kernels.py::test_add_noise"  # for a tiny run; CI runs the whole folder anyway
LINES = 12  # last lines to keep of a failure; the log has all of them
LAST = 2.0  # seconds before the stage's end; after that, no test starts
FINE = (0, 1, 2)  # pytest's exit codes: all passed, some failed, stopped early


def run(setting: Setting, record: Record) -> None:
    """Records how many tests passed, failed and were skipped, and the name and last lines of each failure."""
    os.environ.pop("DTTA_FAST_STRICT", None)  # the tests compare with the CPU, which may have no compiled ops
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # the tests need no plugins, and importing the installed ones takes seconds
    import pytest

    os.chdir(FOLDER)
    options = ("--import-mode=importlib", "-p", "no:cacheprovider", "-v", "--tb=short", "-m", "gpu")
    code = int(pytest.main([*options, str(SMALL if setting.tiny else FOLDER)], plugins=[Recorder(record)]))
    if code not in FINE:
        record.put("tests", "pytest", {"error": f"exit code {code}; its output is in the log"})


class Recorder:
    """A pytest plugin that records the outcome of each test."""

    def __init__(self, record: Record) -> None:
        self._record, self._session = record, None
        self._found: dict[str, Any] = {"collected": 0, "passed": 0, "failed": 0, "skipped": 0, "failures": [], "skips": [], "seconds": {}}

    def pytest_collectreport(self, report: Any) -> None:
        """Counts a file that cannot be imported as a failure."""
        if report.failed:
            self._failed(report)

    def pytest_collection_finish(self, session: Any) -> None:
        self._session, self._found["collected"] = session, len(session.items)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Records the outcome of a test's set-up, call and tear-down."""
        if report.failed:
            self._failed(report)
        elif report.skipped:
            self._found["skipped"] += 1
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
            self._found["skips"].append({"name": report.nodeid, "reason": reason[:200]})
        elif report.when == "call":
            self._found["passed"] += 1
        if report.when == "call":
            self._found["seconds"][report.nodeid] = report.duration
        self._record.put("tests", "tests/gpu", self._found)
        if self._record.left < LAST:
            self._session.shouldstop = "the stage has no time left"

    def _failed(self, report: Any) -> None:
        self._found["failed"] += 1
        self._found["failures"].append({"name": report.nodeid, "lines": report.longreprtext.strip().splitlines()[-LINES:]})
        self._record.put("tests", "tests/gpu", self._found)
