"""How the guard's rows are put into forwards, what it costs, and what a session does with less memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dtta_fast import Adapter, adapt, presets, zoo
from dtta_fast.core.guard import forward_rows
from dtta_fast.core.problem import Schedule
from dtta_fast.data.corruptions import corrupt
from dtta_fast.data.digits import load_digits
from dtta_fast.denoisers.calibration import _ring_sums, _rings
from dtta_fast.session.engine import Engine
from dtta_fast.session.planning import Limit
from dtta_fast.tasks import Classification

CPU = torch.device("cpu")


@pytest.mark.parametrize("most", [7, 24, 48, 100, 256])
@pytest.mark.parametrize("kind", ["few", "one"])
def test_forwards_hold_all_rows_in_few_sizes(kind, most):
    sizes = set()
    for images in range(1, 200):
        forwards = forward_rows(images, 24, most, kind)
        assert sum(forwards) >= 24 * images
        assert max(forwards) <= most
        if most >= 24:  # at most a third is filled up, and a forward more than needed never
            assert sum(forwards) - forwards[-1] < 24 * images
        if kind == "few" and most >= 24:
            assert forwards[-1] <= 24 * max(1, images * 3 // 2)
        sizes.update(forwards)
    assert len(sizes) <= (1 if kind == "one" else 2 * most.bit_length())


@pytest.fixture
def digits():
    return zoo.load("digits")


@pytest.mark.parametrize("fresh", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("kind", ["any", "few", "one"])
def test_a_guard_is_two_forwards_an_image_at_most(digits, fresh, kind, guarded):
    """Whatever the answers, and with the losses of a forward for each answer."""
    import dataclasses

    model, denoiser = digits
    engine = Engine(model, denoiser, Classification(), presets.FAST)
    images, ids = torch.rand(1, 3, 32, 32), torch.tensor([5])
    x0 = denoiser.encode(images)
    engine.program.plan(images, x0, 4)
    engine.program.problem = dataclasses.replace(engine.program.problem, row_counts=kind)
    engine.program.schedule = Schedule(guard_rows=48)
    calls: list[int] = []
    engine.program.problem.denoiser.network.register_forward_pre_hook(lambda _, given: calls.append(len(given[0])))
    before = torch.eye(10)[3][None]
    candidates = [torch.eye(10)[k if changed else 3][None] for k, changed in zip((5, 7), fresh, strict=True)]
    found = guarded(engine.program, before, candidates, x0, ids, torch.tensor(3))
    assert len(calls) <= 2
    assert found[2].item() == 24 * (1 + sum(fresh))
    engine.program.problem = dataclasses.replace(engine.program.problem, row_counts="any")
    engine.program.schedule = Schedule(guard_rows=24)
    alone = guarded(engine.program, before, candidates, x0, ids, torch.tensor(3))
    for one, other in zip(found, alone, strict=True):
        assert torch.equal(one, other)


def test_the_model_runs_once_for_the_checks_and_once_a_step(digits):
    """FAST with 3 steps: the images as they are, matched, three steps, and the answer after them."""
    model, denoiser = digits
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    session = Adapter(model, denoiser, presets.FAST)
    images = corrupt(load_digits("validation")[0][:12], "gaussian_blur", 5)
    asked = (session.adapt(images).evaluations > 0).nonzero()[0]
    calls.clear()
    session.adapt(images[asked])
    assert len(calls) == 2 + presets.FAST.steps + 1


@pytest.mark.parametrize("size", [(4, 4), (5, 8), (31, 32), (64, 48), (224, 224)])
def test_ring_sums_are_the_sums_over_whole_radii(size):
    height, width = size
    spectrum = torch.rand(3, height, width // 2 + 1, dtype=torch.float64)
    rows = torch.fft.fftfreq(height, 1 / height, dtype=torch.float64)
    radius = torch.hypot(rows[:, None], torch.arange(width // 2 + 1, dtype=torch.float64)[None])
    ring = radius.round().long().clamp(max=height // 2).flatten()
    expected = torch.zeros(3, height // 2 + 1, dtype=torch.float64).index_add_(1, ring, spectrum.flatten(1))
    torch.testing.assert_close(_ring_sums(spectrum.flatten(1), _rings(height, width, CPU)), expected)


def test_a_limit_goes_up_again_and_waits_longer_after_a_relapse():
    limit = Limit()
    assert limit.of(64) == 64
    limit.lower(16)

    def successes_until(rows: int) -> int:
        for count in range(1, 10_000):
            limit.raise_after_successes()
            if limit.of(64) >= rows:
                return count
        raise AssertionError

    first = successes_until(32)
    assert limit.of(64) == 32
    assert successes_until(64) == first
    limit.lower(32)
    assert successes_until(64) == 2 * first


def test_rows_come_back_once_there_is_memory_again(model, denoiser, images):
    from dtta_fast import AdaptConfig

    model, denoiser, images = model.float(), denoiser.float(), images.float()
    config = AdaptConfig(steps=1, pairs=6, lr=1e-2)
    most, rows = [7], []

    def short(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        rows.append(len(inputs[0]))
        if len(inputs[0]) > most[0]:
            raise torch.OutOfMemoryError("injected")

    denoiser.network.blocks[1].register_forward_pre_hook(short)
    session = Adapter(model, denoiser, config)
    session.adapt(images)
    assert max(rows[-1:]) <= 7
    most[0] = 1000
    for _ in range(200):
        last = session.adapt(images)
        if rows[-1] == 24:
            break
    for _ in range(3):
        last = session.adapt(images)
        assert rows[-1] == 24  # and stay
    torch.testing.assert_close(last.outputs, adapt(model, denoiser, images, config=config).outputs, rtol=1e-4, atol=1e-4)
