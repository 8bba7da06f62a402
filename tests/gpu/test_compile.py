"""Compiled sessions agree with eager ones, and a warm session never compiles again, whatever the guard has to compare."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from dtta_fast import AdaptConfig, Adapter

pytestmark = pytest.mark.gpu
CONFIG = AdaptConfig(steps=2, pairs=4, guard=3, optimizer="sgd", lr=0.3)

# Largest difference from eager float32, as a share of one step's effect on the logits. It is float32's rounding, or bfloat16's as in
# test_precision.py.
RUNGS = {
    "regional, bf16": ({"compile": "regional", "precision": "bf16"}, 0.05),
    "step, fp32": ({"compile": "step", "precision": "fp32"}, 1e-3),
}


@pytest.fixture(autouse=True)
def _quick_on_a_cpu(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Leaves out code generation on a CPU, where it takes a minute. tests/test_engine.py runs it there."""
    torch._dynamo.reset()
    if device == "cpu":
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


def effect_of_a_step(session: Adapter, images: Tensor) -> Tensor:
    """The change that one step makes to the outputs, before any guard."""
    engine = session.engine
    engine.refresh()
    with engine.context():
        program = engine.program
        state, batch = program.begin(images, torch.arange(len(images), device=images.device))
        program.step(state, batch, 0)
        return (program.forward(state, batch.inputs) - batch.before).double().cpu()


@pytest.mark.parametrize("rung", RUNGS)
def test_compiled_sessions(mlp, small_denoiser, images, moved, device, rung):
    change, tolerance = RUNGS[rung]
    *modules, there = moved(device, torch.float32, mlp, small_denoiser, images)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(compilation failed|one by one)")
        session = Adapter(*modules, CONFIG.replace(**change))
        session.warmup(there)
    assert counters["stats"]["unique_graphs"] > 0
    counters.clear()
    asked = set()
    for first in range(0, 40, 4):
        result = session.adapt(there, image_ids=torch.arange(first, first + 4, device=device))
        asked.add(int((result.evaluations > CONFIG.steps * CONFIG.pairs).sum()))
    assert len(asked) > 1  # the guard met different numbers of changed answers
    found = effect_of_a_step(session, there)
    assert counters["stats"]["unique_graphs"] == 0
    assert not counters["graph_break"]
    expected = effect_of_a_step(Adapter(*modules, CONFIG.replace(precision="fp32")), there)
    assert expected.norm() > 1e-2
    assert (found - expected).norm() < tolerance * expected.norm()
