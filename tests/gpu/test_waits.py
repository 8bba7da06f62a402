"""The host never waits for the GPU inside a step or a guard, and at most twice in a call."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from dtta_fast import AdaptConfig, Adapter, Calibration, presets
from dtta_fast.core.guard import held_out_losses
from dtta_fast.core.step import State, adaptation_step
from dtta_fast.session.loop import Batch
from dtta_fast.tasks import Classification

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu")]
CONFIG = AdaptConfig(steps=2, pairs=4, guard=4, lr=1e-2)
SUBSET = Classification(subset=[4, 0, 2, 6, 5])

STEPS = {
    "adam": {},
    "sgd, l1": {"optimizer": "sgd", "loss": "l1"},
    "adamw, decay": {"optimizer": "adamw", "weight_decay": 0.1},
    "float32": {"precision": "fp32"},
    "float16": {"precision": "fp16"},
    "calibrated, scaled": {"timesteps": "calibrated", "logit_scale": 6.0},
    "uniform, opposite noises": {"timesteps": "uniform", "antithetic": True},
    "drawn classes": {"top_k": 2, "drawn_classes": 2},
    "noise mixing": {"objective": "noise_mix", "top_k": 2, "drawn_classes": 1},
    "norm": {"parameters": "norm"},
    "logits": {"parameters": "logits"},
    "lora": {"parameters": "lora", "denoiser_parameters": "lora"},
    "denoiser adapts": {"denoiser_parameters": "all", "optimizer": "sgd"},
    "online": {"mode": "online", "denoiser_parameters": "all"},
}


@contextmanager
def sync_debug_mode(mode: str) -> Iterator[None]:
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def parts(model, denoiser, moved) -> list[Any]:
    """A ConvNeXt, a calibrated DiT and images on the GPU, in float32. Pre-checks leave some of the images alone."""
    denoiser, generator = denoiser.float(), torch.Generator().manual_seed(2)
    contrast, mean = (torch.tensor(values)[:, None, None, None] for values in ([0.2, 0.1, 1.0], [0.15, 0.9, 0.5]))
    images = (torch.rand(3, 3, 16, 16, generator=generator) - 0.5) * contrast + mean
    measured = Calibration.measure(denoiser, torch.rand(16, 3, 16, 16, generator=generator))
    denoiser.calibration = dataclasses.replace(measured, signal=(0.1, 0.3, 0.4, 0.2), spread=(0.3, 0.3, 0.3, 0.4))
    return moved("cuda", torch.float32, model, denoiser, images)


def started(session: Adapter, images: Tensor) -> tuple[State, Batch]:
    """A state to step and its batch, as a call has them."""
    session.engine.refresh()
    state, batch = session.engine.program.begin(session.crop(images), torch.arange(len(images), device=images.device))
    return state, batch


def assert_no_waits(session: Adapter, images: Tensor) -> None:
    """Asserts it of a step and of the guard's forwards, after two warm-up rounds."""
    state, batch = started(session, images)
    program = session.engine.program
    problem, x0, image_ids = program.problem, batch.x0, batch.image_ids
    losses = []
    for mode in ("default", "default", "error"):
        torch.cuda.synchronize()
        with sync_debug_mode(mode):
            losses.append(adaptation_step(problem, program.schedule, state, batch.inputs, x0, image_ids))
            conditions = problem.task.decision(program.forward(state, batch.inputs), problem.denoiser)
            losses.append(held_out_losses(problem, program.schedule, conditions, x0, image_ids, state.step))
    assert all(bool(loss.isfinite().all()) for loss in losses)
    assert int(state.step) == 3


@pytest.mark.parametrize("change", STEPS)
def test_a_step_and_a_guard_never_wait(parts, vit, change):
    model, denoiser, images = parts
    model = vit.float().to("cuda") if change == "lora" else model
    task = SUBSET if "classes" in change or change == "noise mixing" else Classification()
    assert_no_waits(Adapter(model, denoiser, CONFIG.replace(**STEPS[change]), task), images)


@pytest.mark.parametrize("kind", ["segmentation", "depth"])
def test_a_step_and_a_guard_on_maps_never_wait(request, moved, kind):
    model, denoiser, task = request.getfixturevalue(kind)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    *modules, images = moved("cuda", torch.float32, model, denoiser, images)
    assert_no_waits(Adapter(*modules, CONFIG, task), images)


@contextmanager
def counted_waits() -> Iterator[Callable[[], int]]:
    """Counts the operators that wait, and also explicit waits, which torch does not warn of."""
    explicit: list[str] = []

    def count_calls(patch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        plain = getattr(owner, name)

        def wait(*args: Any, **kwargs: Any) -> Any:
            explicit.append(name)
            return plain(*args, **kwargs)

        patch.setattr(owner, name, wait)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught, sync_debug_mode("warn"):
        warnings.simplefilter("always")
        for owner in (torch.cuda, torch.cuda.Event, torch.cuda.Stream):
            count_calls(patch, owner, "synchronize")
        yield lambda: len(explicit) + sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def test_waits_are_counted():
    """The counter notices an operator that waits and an explicit wait."""
    numbers = torch.arange(3, device="cuda")
    with counted_waits() as waits:
        numbers + numbers
        assert waits() == 0
        int(numbers[1])
        numbers.cpu()
        assert waits() == 2
        torch.cuda.synchronize()
        assert waits() == 3


CALLS = {
    "plain": CONFIG,
    "without a guard": CONFIG.replace(guard=0),
    "PAPER": presets.PAPER.replace(pairs=8),
    "FAST": presets.FAST,
    "ONLINE": presets.ONLINE,
    "DENSE": presets.DENSE,
    "DUSA": presets.DUSA,
}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_waits_twice_at_most(parts, call):
    *modules, images = parts
    session = Adapter(*modules, CALLS[call])
    for _ in range(3):
        session.adapt(images)
    torch.cuda.synchronize()
    with counted_waits() as waits:
        result = session.adapt(images)
        assert waits() <= 2
    assert int(result.evaluations.sum()) > 0  # no pre-check left all of them alone
