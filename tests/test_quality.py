"""What the quality benchmark computes from answers."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from dtta_fast.metrics import calibration_error

QUALITY = Path(__file__).parents[1] / "bench" / "quality"


@pytest.fixture
def run(monkeypatch):
    monkeypatch.syspath_prepend(str(QUALITY))
    return importlib.import_module("run")


def test_calibration_error_is_the_gap_between_confidence_and_accuracy():
    confidence = torch.tensor([0.9] * 10 + [0.6] * 10)
    right = torch.tensor([1] * 7 + [0] * 3 + [1] * 6 + [0] * 4)
    assert calibration_error(confidence, right) == pytest.approx(0.1)  # ten at 0.9 right 7 times, ten at 0.6 right 6 times


def test_summary_of_answers(run):
    def rows(first: str, second: str) -> dict:
        costs = {"forwards": 4.0, "backwards": 2.0, "seconds": 0.5, "calibration_error": 0.1}
        return {"fog": {"right": first, **costs}, "snow": {"right": second, **costs}}

    source, runs = rows("1100", "1000"), [rows("1110", "1001"), rows("0110", "1011")]
    found = run.summary(runs, source, ["fog", "snow"])
    assert found["accuracy"] == pytest.approx(10 / 16)
    assert found["gain"] == pytest.approx(10 / 16 - 3 / 8)
    assert found["negative_flips"] == pytest.approx(1 / 16)
    assert found["worst"] == (pytest.approx(0.125), "fog")
    assert found["of_seeds"] == pytest.approx([5 / 8, 5 / 8])
    low, high = found["gain_interval"]
    assert low <= found["gain"] <= high
    assert found["forwards"] == 4.0


def test_what_a_method_has_learnt_goes_on_as_its_protocol_says(run):
    streams, labels = {name: torch.rand(6, 3, 4, 4) for name in ("fog", "clean")}, torch.zeros(6, dtype=torch.int64)
    seen: list[str] = []

    def make(setting):
        def answer(images, ids):
            seen.append(f"{len(images)} from {int(ids[0])}")
            return run_answer(torch.tensor([[1.0, 0.0]]).repeat(len(images), 1), 2 * len(images), 0)

        return answer, lambda: seen.append("reset")

    run_answer = importlib.import_module("methods").Answer
    method = run.Method(make, 4, "online", "x")
    rows = run.measure(method, None, streams, labels)
    assert seen == ["reset", "4 from 0", "2 from 4"] * 2
    assert rows["fog"]["right"] == "111111"
    assert rows["fog"]["forwards"] == 2
    seen.clear()
    run.measure(run.Method(make, 4, "continual", "x"), None, streams, labels)
    assert "reset" not in seen
