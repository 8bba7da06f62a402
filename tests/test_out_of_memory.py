"""What a session does where memory runs out: fewer rows at once, and an error that names what asks for too much."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from dtta_fast import AdaptConfig, Adapter, adapt
from dtta_fast.core import step
from dtta_fast.session import engine as engine_module

LINUX = (
    "[enforce fail at alloc_cpu.cpp:125] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes. "
    "Error code 12 (Cannot allocate memory): injected"
)
CONFIG = AdaptConfig(steps=3, pairs=6, lr=1e-2, guard=3)


@pytest.fixture
def floats(model, denoiser, images):
    return model.float(), denoiser.float(), images.float()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("injected"), RuntimeError("DefaultCPUAllocator: not enough memory: injected"), RuntimeError(LINUX)]
)
def test_out_of_memory_halves_the_rows(floats, error):
    model, denoiser, images = floats
    plain = adapt(model, denoiser, images, config=CONFIG)
    failures: list[int] = []

    def full(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if len(inputs[0]) > 7:
            failures.append(len(inputs[0]))
            raise error

    denoiser.network.blocks[1].register_forward_pre_hook(full)
    adapter = Adapter(model, denoiser, CONFIG)
    torch.testing.assert_close(adapter.adapt(images).outputs, plain.outputs, rtol=1e-3, atol=1e-3)
    assert 1 <= len(failures) <= 3
    adapter.adapt(images)
    assert len(failures) <= 3  # it has learnt
    denoiser.network.blocks[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(type(error), match="injected"):
        adapt(model, denoiser, images, config=CONFIG)


@pytest.mark.parametrize("mode", ["episodic", "online"])
def test_images_that_do_not_fit_through_the_model_at_once_run_in_parts(floats, mode):
    model, denoiser, images = floats
    images = torch.cat([images, images.flip(-1)])[:6]
    config = CONFIG.replace(mode=mode, memory_budget=2**28)
    plain = adapt(model, denoiser, images, config=config)
    failures: list[int] = []

    def full(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if len(inputs[0]) > 4 and not torch.is_grad_enabled():
            failures.append(len(inputs[0]))
            raise torch.OutOfMemoryError("injected")

    model.stages[0].register_forward_pre_hook(full)
    adapter = Adapter(model, denoiser, config)
    torch.testing.assert_close(adapter.adapt(images).outputs, plain.outputs, rtol=1e-3, atol=1e-3)
    assert failures == [6]
    adapter.adapt(images)
    assert failures == [6]  # it has learnt


def test_out_of_memory_before_the_first_step_is_the_caller_s(floats, monkeypatch):
    model, denoiser, images = floats

    def full(_: nn.Module, images: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(type(denoiser), "encode", full)
    with pytest.raises(torch.OutOfMemoryError, match="injected"):
        adapt(model, denoiser, images, config=CONFIG)


def test_a_failed_rebuild_is_made_again(floats, monkeypatch):
    """Weights were replaced, and memory ran out while the copies were made anew: the next call sees the new weights all the same."""
    model, denoiser, images = floats
    session = Adapter(model, denoiser, CONFIG.replace(guard=0))
    session.adapt(images)
    model.stem[0].weight = nn.Parameter(model.stem[0].weight.detach() * 1.5)
    whole = engine_module.private_denoiser

    def fail(*arguments):
        monkeypatch.setattr(engine_module, "private_denoiser", whole)
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(engine_module, "private_denoiser", fail)
    with pytest.raises(torch.OutOfMemoryError):
        session.adapt(images)
    fresh = adapt(model, denoiser, images, config=CONFIG.replace(guard=0))
    torch.testing.assert_close(session.adapt(images).outputs_before, fresh.outputs_before, rtol=1e-4, atol=1e-4)


def test_out_of_memory_before_a_later_call_s_plan_is_the_caller_s(floats, monkeypatch):
    session = Adapter(*floats[:2], CONFIG.replace(guard=0))
    rows = session.adapt(floats[2])
    monkeypatch.setattr(type(floats[1]), "encode", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("injected")))
    with pytest.raises(torch.OutOfMemoryError):
        session.adapt(floats[2])
    monkeypatch.undo()
    assert torch.equal(session.adapt(floats[2]).outputs, rows.outputs)


def test_out_of_memory_is_no_failure_of_vmap(floats, monkeypatch):
    session, tried = Adapter(*floats[:2], CONFIG.replace(guard=0)), []
    plain = step.forward

    def once(*arguments):
        tried.append(True)
        if len(tried) == 3:  # after the check of the outputs, and a look at one image alone
            raise torch.OutOfMemoryError("injected")
        return plain(*arguments)

    monkeypatch.setattr(step, "forward", once)
    session.engine.program._forward = once
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session.adapt(floats[2])
    assert len(tried) > 3
    assert not session.engine.program.problem.loop


def full_above(denoiser: nn.Module, rows: int) -> list[int]:
    """Memory that holds `rows` rows of the denoiser and no more; the list is of the forwards that asked for more."""
    failures: list[int] = []

    def full(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if len(inputs[0]) > rows:
            failures.append(len(inputs[0]))
            raise torch.OutOfMemoryError("injected")

    denoiser.network.blocks[1].register_forward_pre_hook(full)
    return failures


def test_noise_mixing_ends_with_the_error_where_one_pair_does_not_fit(floats):
    model, denoiser, images = floats
    failures = full_above(denoiser, 2)  # a pair of one image takes a row for each of seven classes
    with pytest.raises(torch.OutOfMemoryError, match="injected"):
        adapt(model, denoiser, images, config=CONFIG.replace(objective="noise_mix"))
    assert len(failures) < 20


def test_noise_mixing_fits_into_what_holds_one_pair(floats):
    model, denoiser, images = floats
    config = CONFIG.replace(objective="noise_mix", guard=0)
    plain = adapt(model, denoiser, images, config=config)
    failures = full_above(denoiser, 7)
    torch.testing.assert_close(adapt(model, denoiser, images, config=config).outputs, plain.outputs, rtol=1e-3, atol=1e-3)
    assert failures


def test_an_online_batch_that_does_not_fit_is_split_and_makes_one_update(floats):
    model, denoiser, images = floats
    config = CONFIG.replace(mode="online", guard=0, optimizer="sgd")
    plain = adapt(model, denoiser, images, config=config)
    small = adapt(model, denoiser, images, config=config.replace(memory_budget=2 * 10**6))
    failures = full_above(denoiser, 2)
    found = adapt(model, denoiser, images, config=config)
    assert failures
    for other in (found, small):
        assert other.loss.shape == plain.loss.shape
        torch.testing.assert_close(other.outputs, plain.outputs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(other.loss, plain.loss, rtol=1e-4, atol=1e-5)


def test_an_online_session_survives_memory_that_is_short_for_a_while(floats):
    """One failure in each of four calls, down to a single row, and then one more, which nothing smaller can answer. Every other call
    answers, and the state is that of a session that had the memory."""
    model, denoiser, images = floats
    config = CONFIG.replace(mode="online", guard=0, optimizer="sgd")
    undisturbed = Adapter(model, denoiser, config)
    expected = [undisturbed.adapt(images).outputs for _ in range(7)]
    due = []

    def fail(*_: object) -> None:
        if due:
            due.pop()
            raise torch.OutOfMemoryError("injected")

    denoiser.network.blocks[1].register_forward_pre_hook(fail)
    session = Adapter(model, denoiser, config)
    for call in range(7):
        due[:] = [True] if call < 4 else []
        torch.testing.assert_close(session.adapt(images).outputs, expected[call], rtol=1e-3, atol=1e-3)
        if call == 3:
            assert session.engine.program.schedule.together == 1
            due[:] = [True]
            with pytest.raises(torch.OutOfMemoryError):
                session.adapt(images)


def test_the_diffusion_classifier_keeps_to_the_rows_that_fit(floats):
    model, denoiser, images = floats
    config = AdaptConfig(method="diffusion_classifier", steps=2, pairs=5)
    plain = adapt(model, denoiser, images, config=config)
    failures = full_above(denoiser, 4)  # fewer than a class has pairs
    torch.testing.assert_close(adapt(model, denoiser, images, config=config).outputs, plain.outputs, rtol=1e-3, atol=1e-2)
    assert failures
