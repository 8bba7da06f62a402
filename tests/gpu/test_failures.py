"""A failing call leaves nothing behind, on the device or in torch, and a session gets by with less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dtta_fast import AdaptConfig, Adapter, adapt

pytestmark = pytest.mark.gpu
CONFIG = AdaptConfig(steps=3, pairs=6, lr=1e-2, guard=3)


def process_state() -> dict[str, Any]:
    """The process-wide and thread-wide state of torch that a host may depend on."""
    cuda, mha = torch.backends.cuda, torch.backends.mha
    return {
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "transforms": torch._C._functorch.get_dynamic_layer_stack_depth(),
        "modes": torch._C._len_torch_function_stack(),
        "attention": (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()),
        "fastpath": mha.get_fastpath_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "products": (cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()),
        "random": torch.random.get_rng_state().tolist(),
        "device": torch.cuda.current_device() if torch.cuda.is_available() else None,
    }


# the forward that fails: the call's first, one of the first step, or one of a later step
@pytest.mark.parametrize(
    ("part", "call", "error"),
    [
        ("model", 1, RuntimeError),
        ("model", 2, KeyboardInterrupt),
        ("model", 4, RuntimeError),
        ("denoiser", 1, KeyboardInterrupt),
        ("denoiser", 2, RuntimeError),
        ("denoiser", 4, KeyboardInterrupt),
    ],
)
def test_an_exception_leaves_nothing_behind(vit, denoiser, images, moved, device, untouched, part, error, call):
    *modules, there = moved(device, torch.float32, vit, denoiser, images)
    calls = -1000

    def fail(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error("injected")

    failing = modules[0].blocks[1] if part == "model" else modules[1].network.blocks[1]
    failing.register_forward_pre_hook(fail)
    session = Adapter(*modules, CONFIG.replace(precision="fp32", chunk=3))
    expected, before = session.adapt(there), process_state()
    calls = 0
    with untouched(*modules), pytest.raises(error, match="injected"):
        session.adapt(there)
    assert process_state() == before
    calls = -1000
    again = session.adapt(there)
    torch.testing.assert_close(again.outputs, expected.outputs, rtol=1e-4, atol=1e-4)
    assert torch.equal(again.evaluations, expected.evaluations)


def test_memory_that_runs_out_once_costs_an_attempt(vit, denoiser, images, moved, device, monkeypatch):
    """The call begins again with half the rows; the answer is the same."""
    *modules, there = moved(device, torch.float64, vit, denoiser, images)
    plain = adapt(*modules, there, config=CONFIG)
    session, forward, rows, refused = Adapter(*modules, CONFIG), type(denoiser).forward, [], []

    def full_once(self: nn.Module, x_t: Tensor, *inputs: Tensor) -> Tensor:
        if len(x_t) > 12 and not refused:
            refused.append(len(x_t))
            raise torch.OutOfMemoryError("injected")
        if refused and torch.is_grad_enabled():
            rows.append(len(x_t))
        found: Tensor = forward(self, x_t, *inputs)
        return found

    monkeypatch.setattr(type(denoiser), "forward", full_once)
    found = session.adapt(there)
    assert refused
    assert max(rows) <= refused[0] // 2
    torch.testing.assert_close(found.outputs, plain.outputs, rtol=1e-6, atol=1e-8)
    assert torch.equal(found.evaluations, plain.evaluations)


def test_memory_that_never_suffices_is_the_caller_s(vit, denoiser, images, moved, device):
    *modules, there = moved(device, torch.float32, vit, denoiser, images)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("injected")

    handle = modules[1].network.blocks[1].register_forward_pre_hook(full)
    session = Adapter(*modules, CONFIG)
    with pytest.raises(torch.OutOfMemoryError, match="injected"):
        session.adapt(there)
    handle.remove()
    found = Adapter(*modules, CONFIG).adapt(there)
    assert bool(found.outputs.isfinite().all())


def test_images_with_nan_are_named(vit, denoiser, images, moved, device):
    """Wrong values raise an error that names them, and the next call works."""
    *modules, there = moved(device, torch.float32, vit, denoiser, images)
    session = Adapter(*modules, CONFIG)
    wrong = there.clone()
    wrong[1, 0, 3, 4] = torch.nan
    with pytest.raises(ValueError, match="images holds NaN or infinity"):
        session.adapt(wrong)
    with pytest.raises(ValueError, match=r"images has values from "):
        session.adapt(there * 3)
    with pytest.raises(ValueError, match="image_ids lies in"):
        session.adapt(there, image_ids=torch.tensor([0, 1, 2, -1], device=device))
    assert bool(session.adapt(there).outputs.isfinite().all())


def test_an_adaptation_that_diverges_is_refused(vit, denoiser, images, moved, device):
    *modules, there = moved(device, torch.float32, vit, denoiser, images)
    result = adapt(*modules, there, config=CONFIG.replace(optimizer="sgd", lr=1e30))
    assert not result.accepted.any()
    assert torch.equal(result.outputs, result.outputs_before)


def test_tensors_on_two_devices_are_named(vit, denoiser, images, moved, device, gpu):
    *modules, there = moved(device, torch.float32, vit, denoiser, images)
    with pytest.raises(ValueError, match="images is on cpu and the model on cuda"):
        adapt(*modules, there.cpu(), config=CONFIG)
    with pytest.raises(ValueError, match="image_ids is on cpu"):
        adapt(*modules, there, config=CONFIG, image_ids=torch.arange(4))
    with pytest.raises(ValueError, match="denoiser is on cpu and model on cuda"):
        adapt(modules[0], modules[1].cpu(), there, config=CONFIG)
