"""Sessions that replay CUDA graphs agree with eager ones; tests/test_graphs.py shows on a CPU that recordings know no values."""

from __future__ import annotations

import warnings

import pytest
import torch

from dtta_fast import AdaptConfig, Adapter

pytestmark = pytest.mark.gpu
CONFIG = AdaptConfig(steps=2, pairs=4, guard=3, optimizer="adam", lr=0.01, precision="fp32")
CASES = {
    "one image": ({}, 1),
    "several": ({}, 4),
    "all weights": ({"denoiser_parameters": "all", "optimizer": "sgd", "lr": 0.3}, 2),
    "online, bf16": ({"mode": "online", "precision": "bf16"}, 3),
    "chunks": ({"chunk": 2, "timesteps": "stratified", "antithetic": True}, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_replays_agree_with_plain_calls(mlp, small_denoiser, images, moved, device, gpu, case):
    change, count = CASES[case]
    *modules, there = moved(device, torch.float32, mlp, small_denoiser, images)
    plain, recorded = (Adapter(*modules, CONFIG.replace(**change, compile=kind)) for kind in ("off", "graphs"))
    kept = []
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(recording one failed|one by one)")
        for first in range(0, 5 * count, count):
            given, ids = there[:count].roll(first, dims=3), torch.arange(first, first + count, device=device)
            kept.append([session.adapt(given, image_ids=ids) for session in (plain, recorded)])
    assert not recorded.engine.program._graphs.failed  # type: ignore[attr-defined]
    for expected, found in kept:  # a later replay writes to no result
        torch.testing.assert_close(found.outputs, expected.outputs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-4, atol=1e-5)
        assert torch.equal(found.accepted, expected.accepted)
        assert torch.equal(found.evaluations, expected.evaluations)


def test_a_model_that_reads_a_value_runs_as_it_is(mlp, small_denoiser, images, moved, device, gpu):
    class Reading(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) * (2 if float(x.detach().mean()) > -100 else 1)

    model, denoiser, there = moved(device, torch.float32, Reading(), small_denoiser, images)
    session = Adapter(model, denoiser, CONFIG.replace(compile="graphs"))
    with pytest.warns(UserWarning, match="Going on without graphs"):
        found = session.adapt(there[:1])
    expected = Adapter(model, denoiser, CONFIG).adapt(there[:1])
    torch.testing.assert_close(session.adapt(there[:1]).outputs, expected.outputs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.outputs, expected.outputs, rtol=1e-4, atol=1e-5)
