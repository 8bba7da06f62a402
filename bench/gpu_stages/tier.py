"""Stage 2, the tests: the folder tests/gpu by pytest, recorded test by test, so that a crash or the stage's end loses none that ran."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from bench.gpu_stages.recording import Record, Setting

FOLDER = Path(__file__).resolve().parents[2] / "tests" / "gpu"
SMALL = FOLDER / "test_kernels.py::test_add_noise"  # of a tiny run: CI runs the whole folder anyway
LINES = 12  # of a failure that are kept; the log has them all
LAST = 2.0  # seconds before the stage's end, when no more tests are begun
FINE = (0, 1, 2)  # exit codes of pytest: all passed, some failed, stopped early


def run(setting: Setting, record: Record) -> None:
    """Counts, and of each failure its name and its last lines."""
    os.environ.pop("DTTA_FAST_STRICT", None)  # tests compare with the CPU, which may have no compiled ops
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # the tests need none, and importing those that are installed takes seconds
    import pytest

    os.chdir(FOLDER)
    options = ("--import-mode=importlib", "-p", "no:cacheprovider", "-v", "--tb=short", "-m", "gpu")
    code = int(pytest.main([*options, str(SMALL if setting.tiny else FOLDER)], plugins=[Recorder(record)]))
    if code not in FINE:
        record.put("tests", "pytest", {"error": f"exit code {code}; its output is in the log"})


class Recorder:
    """A plugin of pytest's."""

    def __init__(self, record: Record) -> None:
        self._record, self._session = record, None
        self._found: dict[str, Any] = {"collected": 0, "passed": 0, "failed": 0, "skipped": 0, "failures": [], "skips": [], "seconds": {}}

    def pytest_collectreport(self, report: Any) -> None:
        """A file that cannot be imported counts as a failure."""
        if report.failed:
            self._failed(report)

    def pytest_collection_finish(self, session: Any) -> None:
        self._session, self._found["collected"] = session, len(session.items)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Notes the outcome of a test's set-up, call and tear-down."""
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
