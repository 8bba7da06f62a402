"""Memory on the GPU: what stays allocated, what a budget bounds, and what happens when it really runs out."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from dtta_fast import AdaptConfig, Adapter, adapt
from dtta_fast.denoisers.dit import DiT

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu")]
CONFIG = AdaptConfig(steps=2, pairs=4, lr=1e-2, guard=3)
MEBIBYTE = 2**20


def allocated() -> int:
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


@pytest.mark.parametrize("change", [{}, {"mode": "online", "denoiser_parameters": "all"}], ids=["episodic", "online"])
def test_memory_is_flat_over_200_images(mlp, small_denoiser, images, moved, change):
    *modules, there = moved("cuda", torch.float32, mlp, small_denoiser, images)
    session = Adapter(*modules, CONFIG.replace(**change))

    def run(batches: int) -> tuple[int, int]:
        """Bytes allocated afterwards, and at most."""
        torch.cuda.reset_peak_memory_stats()
        for i in range(batches):
            ids = torch.arange(4 * i, 4 * i + 4, device="cuda")
            session.adapt(there, image_ids=ids)
            if i % 5 == 0:
                session.adapt(there[: 1 + i % 3], image_ids=ids[: 1 + i % 3])  # smaller batches too
        return allocated(), torch.cuda.max_memory_allocated()

    settled, most = run(12)
    after, most_after = run(50)
    assert after == settled
    assert most_after <= 1.02 * most


def test_a_session_gives_back_what_it_took(mlp, small_denoiser, images, moved):
    *modules, there = moved("cuda", torch.float32, mlp, small_denoiser, images)
    config = CONFIG.replace(denoiser_parameters="all")
    adapt(*modules, there, config=config)  # the libraries' workspaces stay allocated
    before = allocated()
    for _ in range(3):
        adapt(*modules, there, config=config)
    assert allocated() == before


@pytest.fixture
def wide(random_network, process) -> DiT:
    """A DiT whose activations take most of the memory, with weights so small that float32 gives the same in any order of sums."""
    denoiser = DiT(random_network(hidden_size=128, depth=4, num_heads=4, patch_size=1), process)
    for parameter in denoiser.parameters():
        nn.init.normal_(parameter, std=0.08)
    return denoiser


@pytest.mark.parametrize("denoiser_parameters", ["frozen", "all"])
def test_a_budget_holds(mlp, wide, images, moved, denoiser_parameters):
    *modules, there = moved("cuda", torch.float32, mlp, wide, images)
    config = CONFIG.replace(pairs=32, guard=0, denoiser_parameters=denoiser_parameters)
    peaks = []
    for budget in (120 * MEBIBYTE, 360 * MEBIBYTE):
        session = Adapter(*modules, config.replace(memory_budget=budget))
        session.adapt(there[:1])  # the libraries' workspaces are no part of the budget
        before = allocated()
        torch.cuda.reset_peak_memory_stats()
        session.adapt(there)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        assert peaks[-1] <= budget
    assert peaks[0] < peaks[1]  # a larger budget is used


def test_memory_that_really_runs_out(mlp, wide, images, moved, difference):
    """The allocator refuses what a forward of all rows takes: the call ends with fewer, and the answer is the same."""
    *modules, there = moved("cuda", torch.float32, mlp, wide, images)
    config = CONFIG.replace(pairs=64, chunk=64, guard=0, precision="fp32", optimizer="sgd", lr=0.02, memory_budget=2**40)
    torch.cuda.reset_peak_memory_stats()
    before = allocated()
    plain = adapt(*modules, there, config=config)
    taken = torch.cuda.max_memory_allocated() - before
    assert taken > 200 * MEBIBYTE
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    failures = torch.cuda.memory_stats()["num_ooms"]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + taken // 2) / total)
    try:
        found = adapt(*modules, there, config=config)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.cuda.memory_stats()["num_ooms"] > failures
    assert difference(found, plain) < 1e-3
