"""Outputs that are not finite are never an answer, for any method and mode."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dtta_fast import AdaptConfig, Adapter, adapt
from dtta_fast.tasks import Classification

CONFIG = AdaptConfig(steps=2, pairs=4, lr=1e-2)


@pytest.fixture
def floats(model, denoiser, images):
    return model.float(), denoiser.float(), images.float()


class Masked(nn.Module):
    """Gives some classes no probability at all."""

    def __init__(self, model: nn.Module, value: float = -torch.inf) -> None:
        super().__init__()
        self.model, self.value = model, value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = self.model(x)
        return torch.cat([outputs[:, :5], torch.full_like(outputs[:, 5:], self.value)], dim=1)


@pytest.mark.parametrize("method", ["diffusion_classifier", "posterior"])
def test_methods_that_train_nothing_fall_back_on_the_model(floats, method):
    model, denoiser, images = floats
    for weight in denoiser.network.parameters():
        weight.data.mul_(1e4)  # beyond float16
    found = adapt(model, denoiser, images, config=AdaptConfig(method=method, steps=1, pairs=2, precision="fp16"))
    assert torch.equal(found.outputs, found.outputs_before)
    assert torch.equal(found.predictions, found.predictions_before)
    assert not found.accepted.any()


@pytest.mark.parametrize("guard", [0, 4])
@pytest.mark.parametrize("deadline_ms", [None, 1e-6, 1e6])
def test_an_online_state_that_gives_infinity_is_not_kept(floats, guard, deadline_ms):
    model, denoiser, images = floats
    session = Adapter(model, denoiser, CONFIG.replace(mode="online", lr=1e18, guard=guard))
    for _ in range(3):
        found = session.adapt(images, deadline_ms=deadline_ms)
        assert found.outputs.isfinite().all()
        assert found.outputs_before.isfinite().all()
    assert session.state_dict() == {}
    assert torch.equal(found.outputs, found.outputs_before)
    assert not found.accepted.any()


@pytest.mark.parametrize("guard", [0, 4])
@pytest.mark.parametrize("deadline_ms", [None, 1e-6])
def test_images_that_an_online_state_cannot_answer_get_the_source_s_answers(floats, guard, deadline_ms):
    """A finite state whose outputs overflow, as one may load it."""
    model, denoiser, images = floats
    source = adapt(model, denoiser, images, config=CONFIG.replace(method="diffusion_classifier", steps=1)).outputs_before
    session = Adapter(model, denoiser, CONFIG.replace(mode="online", guard=guard))
    session.adapt(images)
    state = session.state_dict()
    for weight in state["theta"].values():
        weight.fill_(3e38)
    session.load_state_dict(state)
    found = session.adapt(images, deadline_ms=deadline_ms)
    assert torch.equal(found.outputs, source)
    assert torch.equal(found.outputs_before, source)
    assert not found.accepted.any()
    assert all(
        torch.equal(p, state["theta"][name]) for name, p in session.state_dict()["theta"].items()
    )  # what was loaded stays, until reset()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_state_that_is_not_finite_is_refused(floats, value):
    model, denoiser, images = floats
    session = Adapter(model, denoiser, CONFIG.replace(mode="online"))
    session.adapt(images)
    state = session.state_dict()
    next(iter(state["theta"].values())).view(-1)[0] = value
    with pytest.raises(ValueError, match="state holds NaN or infinity"):
        Adapter(model, denoiser, CONFIG.replace(mode="online")).load_state_dict(state)


@pytest.mark.parametrize("objective", ["embedding_mix", "noise_mix"])
@pytest.mark.parametrize("guard", [0, 4])
def test_masked_classes_take_no_part_and_the_others_adapt(floats, objective, guard):
    model, denoiser, images = floats
    config = CONFIG.replace(objective=objective, guard=guard)
    found = adapt(Masked(model), denoiser, images, config=config)
    low = adapt(Masked(model, -1e4), denoiser, images, config=config)
    assert found.accepted.any()
    assert torch.equal(found.accepted, low.accepted)
    assert (found.outputs[:, :5] - found.outputs_before[:, :5]).abs().max() > 0.01
    torch.testing.assert_close(found.outputs[:, :5], low.outputs[:, :5], rtol=1e-4, atol=1e-4)
    assert (found.outputs[:, 5:] == -torch.inf).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_model_that_gives_no_numbers_is_refused(floats, value):
    model, denoiser, images = floats
    with pytest.raises(ValueError, match=r"model returns NaN or infinity for images \[0, 1, 2, 3\]"):
        adapt(Masked(model, value), denoiser, images, config=CONFIG)


def test_masked_logits_cannot_be_scaled(floats):
    model, denoiser, images = floats
    with pytest.raises(ValueError, match="logit_scale"):
        adapt(Masked(model), denoiser, images, config=CONFIG.replace(logit_scale=10.0))


def test_a_deadline_that_leaves_no_step_accepts_nothing(floats):
    from dtta_fast.denoisers.calibration import Calibration

    model, denoiser, images = floats
    denoiser.calibration = Calibration.measure(
        denoiser, torch.rand(16, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    )
    for config in (CONFIG, CONFIG.replace(guard=4), CONFIG.replace(guard=4, match="both"), CONFIG.replace(match="both")):
        session = Adapter(model, denoiser, config)
        session.warmup(images)
        found = session.adapt(images, deadline_ms=1e-6)
        assert found.steps_run == 0
        assert not found.accepted.any()
        with torch.no_grad():
            seen = denoiser.calibration.match(images) if config.match == "both" else images
            stands = model(Classification().normalise(model, seen))
        torch.testing.assert_close(found.outputs, stands)
        assert not found.evaluations.any()
