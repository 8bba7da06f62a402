"""Which backend serves, what it allocates, and what it does with tensors that are not contiguous."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from dtta_fast.kernels import Pairs, add_noise, backends, denoising_loss, denoising_loss_and_gradient, mix_condition, native, reference

TABLE = torch.rand(10, 5, generator=torch.Generator().manual_seed(0))


def draws(pairs: int) -> dict[str, object]:
    return {
        "table": TABLE,
        "timesteps": torch.arange(2 * pairs).view(2, pairs) % 10,
        "image_ids": torch.tensor([3, 9]),
        "seed": 5,
        "step": torch.tensor(1),
    }


@pytest.fixture
def fresh_choice():
    clear = backends.serving.cache_clear  # a test may have put another function there
    clear()
    yield
    clear()


@pytest.fixture
def without_library(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    backends.serving.cache_clear()
    yield
    backends.serving.cache_clear()


def test_without_the_library_plain_torch_serves_and_says_so(without_library, monkeypatch):
    x0 = torch.randn(2, 3, 4, 5)
    backend, reason = backends.serving("cpu")
    assert backend == "torch"
    assert "pip install" in reason
    given = draws(3)
    expected = reference.add_noise(Pairs(x0, **given), torch.float32)
    assert torch.equal(add_noise(Pairs(x0, **given)), expected)
    monkeypatch.setenv("DTTA_FAST_STRICT", "1")
    with pytest.raises(RuntimeError, match="DTTA_FAST_STRICT=1"):
        add_noise(Pairs(x0, **given))
    assert add_noise(Pairs(x0.double(), **given)).dtype == torch.float64  # plain torch's everywhere


def test_the_native_library_serves_the_cpu():
    assert backends.serving("cpu")[0] == "native"
    assert backends.choose(torch.float32, torch.zeros(1)) is native


def test_a_portable_build_on_x86_leaves_the_ops_to_torch(monkeypatch):
    monkeypatch.setattr(native, "instruction_set", lambda: "portable")
    for machine, backend in (("x86_64", "torch"), ("arm64", "native")):
        monkeypatch.setattr(backends.platform, "machine", lambda machine=machine: machine)
        backends.serving.cache_clear()
        assert backends.serving("cpu")[0] == backend
    backends.serving.cache_clear()


def test_a_library_of_another_build_is_refused(monkeypatch):
    monkeypatch.setattr(native, "ABI_VERSION", native.ABI_VERSION + 1)
    native.library.cache_clear()
    backends.serving.cache_clear()
    backend, reason = backends.serving("cpu")
    assert backend == "torch"
    assert "older build" in reason
    native.library.cache_clear()
    backends.serving.cache_clear()


def test_the_backward_of_a_mixture_checks_what_it_is_given():
    logits, table = torch.randn(2, 4), torch.randn(4, 3)
    mixed, weights, chosen = torch.ops.dtta_fast.mix_condition(logits, table, 2, None, False)
    run = torch.ops.dtta_fast.mix_condition_backward
    expected = run(mixed, logits, table, weights, chosen, None, False, True)
    strided = run(mixed, logits, table, weights, chosen.T.contiguous().T, None, False, True)
    assert all(torch.equal(a, b) for a, b in zip(expected, strided, strict=True))
    for name, wrong in (("upstream", mixed[:, :1]), ("upstream", mixed.double()), ("weights", weights.double()), ("chosen", chosen.int())):
        given = {"upstream": mixed, "weights": weights, "chosen": chosen, name: wrong}
        with pytest.raises(ValueError, match=f"{name} is"):
            run(given["upstream"], logits, table, given["weights"], given["chosen"], None, False, True)


def allocated(run) -> int:
    """Bytes that `run` takes from torch's CPU allocator, whether it gives them back or not."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        kept = run()
    del kept
    events = found.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0)


def test_nothing_large_is_allocated_beside_the_results():
    """Under 1 % of x_t: no noise, no copy, nothing kept for the backward pass."""
    x0, given = torch.randn(2, 4, 64, 64), draws(90)
    x_t = add_noise(Pairs(x0, **given))
    prediction = torch.randn_like(x_t).requires_grad_()
    upstream = torch.ones(2, 90)
    size = x_t.numel() * x_t.element_size()
    assert size <= allocated(lambda: add_noise(Pairs(x0, **given))) < 1.01 * size
    assert allocated(lambda: denoising_loss(prediction, Pairs(x0, **given))) < 0.01 * size
    assert allocated(lambda: denoising_loss_and_gradient(prediction.detach(), upstream, Pairs(x0, **given))) < 1.01 * size
    loss = denoising_loss(prediction, Pairs(x0, **given))
    assert allocated(lambda: torch.autograd.grad(loss.sum(), prediction)) < 1.01 * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_strided_tensors_give_what_contiguous_ones_give(dtype):
    generator = torch.Generator().manual_seed(1)
    x0 = torch.randn(2, 6, 6, 3, generator=generator, dtype=dtype).permute(0, 3, 1, 2)
    prediction = torch.randn(8, 6, 6, 6, generator=generator, dtype=dtype).to(memory_format=torch.channels_last)
    given = {**draws(8), "timesteps": draws(8)["timesteps"][:, ::2]}
    assert not x0.is_contiguous()
    assert not prediction.is_contiguous()
    results = []
    for layout in (lambda x: x, torch.Tensor.contiguous):
        leaf = layout(prediction).requires_grad_()
        loss = denoising_loss(leaf, Pairs(layout(x0), **{**given, "timesteps": layout(given["timesteps"])}))
        results.append((add_noise(Pairs(layout(x0), **given)), loss, torch.autograd.grad(loss.sum(), leaf)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    logits, table = torch.randn(7, 2, generator=generator, dtype=dtype).T, torch.randn(4, 7, generator=generator, dtype=dtype).T
    assert torch.equal(mix_condition(logits, table), mix_condition(logits.contiguous(), table.contiguous()))


def test_gpus_are_triton_s_where_there_is_one(monkeypatch, fresh_choice):
    pytest.importorskip("triton")
    assert backends.serving("cuda")[0] == "triton"
    monkeypatch.setattr(backends, "serving", lambda device: ("triton", "as on a GPU"))
    assert backends.choose(torch.float32, torch.zeros(1)).__name__ == "dtta_fast.kernels.triton.launchers"


def test_other_devices_and_a_missing_triton_are_torch_s(monkeypatch, fresh_choice):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert backends.serving("cuda") == ("torch", "Triton is not installed: pip install triton")
    assert backends.serving("mps") == ("torch", "there are no kernels for mps devices")


def test_a_library_without_an_abi_is_another_build_s():
    assert not native._matches(object())


def test_calls_that_the_library_cannot_take_are_named(monkeypatch):
    with pytest.raises(ValueError, match="name is 'avx1024', which this processor or build does not have"):
        native.use_instruction_set("avx1024")
    with pytest.raises(ValueError, match=r"counters has shape \(3,\) and key \(2,\); give \[N, 4\] and \[2\]"):
        native.philox(np.zeros(3), np.zeros(2))
    monkeypatch.setattr(native, "library", lambda: None)
    with pytest.raises(RuntimeError, match="pip install"):
        native.instruction_set()


def test_an_unknown_code_of_the_library_is_told():
    with pytest.raises(RuntimeError, match="refused the call with code 99"):
        native._ran(99)
