"""Sessions whose batches shrink: a pre-check lets any number of images through."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dtta_fast import AdaptConfig, Adapter, adapt, presets, zoo
from dtta_fast.data.corruptions import corrupt
from dtta_fast.data.digits import load_digits
from dtta_fast.runtime import clock
from dtta_fast.session import adapter as adapter_module
from dtta_fast.tasks import Classification


@pytest.mark.slow
def test_a_deadline_holds_where_the_pre_check_lets_fewer_through(monkeypatch):
    """On a clock that only the denoiser moves: 50 ms a forward. warmup() knows batches of 8; 5 of these images ask for adaptation."""
    model, denoiser = zoo.load("digits")
    now = [0.0]
    for module in (adapter_module, clock):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    denoiser.network.register_forward_pre_hook(lambda *_: now.__setitem__(0, now[0] + 0.05))
    clean = load_digits("validation")[0][:30]
    usual = clean[denoiser.calibration.distance(clean) <= denoiser.calibration.limit][:3]
    images = torch.cat([usual, corrupt(clean[:5], "gaussian_blur", 5)])
    adapter = Adapter(model, denoiser, presets.FAST.replace(steps=20, precheck="statistics", guard=0, guard_threshold=0.0))
    adapter.warmup(images)
    began = now[0]
    result = adapter.adapt(images, deadline_ms=420)
    assert int((result.evaluations > 0).sum()) == 5
    assert result.steps_run == 8
    assert now[0] - began == pytest.approx(0.4)


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "adam8bit"])
def test_a_smaller_batch_adapts_in_the_storage_of_a_larger_one(model, denoiser, images, optimizer):
    model, denoiser, images = model.float(), denoiser.float(), images.float()
    config = AdaptConfig(steps=2, pairs=4, lr=1e-2, optimizer=optimizer)
    adapter = Adapter(model, denoiser, config)
    whole = adapter.adapt(images)
    held = adapter.engine.program._storage  # of several images, and of one
    storage = [p.data_ptr() for p in held[False].theta.values()]
    part = adapter.adapt(images[:2])
    torch.testing.assert_close(part.outputs, whole.outputs[:2], rtol=1e-3, atol=1e-4)
    if optimizer != "adam8bit":  # whose scales belong to blocks of all images
        assert [p.data_ptr() for p in held[False].theta.values()] == storage
        again = adapter.adapt(images)
        assert [p.data_ptr() for p in held[False].theta.values()] == storage
        torch.testing.assert_close(again.outputs, whole.outputs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("objective", ["embedding_mix", "noise_mix"])
def test_classes_that_cannot_occur_take_no_part(model, denoiser, images, objective):
    """A table and logits of the chosen classes alone give the same losses; the others' logits do not matter."""
    config = AdaptConfig(steps=2, pairs=2, lr=1e-2, objective=objective)
    subset = [5, 0, 3]
    found = adapt(model, denoiser, images, config=config, task=Classification(subset=subset))
    assert set(found.predictions.tolist()) <= set(subset)
    assert found.evaluations.tolist() == [2 * 2 * (3 if objective == "noise_mix" else 1)] * 4
    head = model.get_classifier()
    with torch.no_grad():
        others = [k for k in range(len(head.weight)) if k not in subset]
        head.bias[others] += 1e6
    again = adapt(model, denoiser, images, config=config, task=Classification(subset=subset))
    torch.testing.assert_close(again.loss, found.loss)
    assert torch.equal(again.predictions, found.predictions)
    classified = adapt(
        model,
        denoiser,
        images,
        config=config.replace(method="diffusion_classifier", objective="embedding_mix"),
        task=Classification(subset=subset),
    )
    assert set(classified.predictions.tolist()) <= set(subset)
    assert classified.evaluations.tolist() == [2 * 2 * 3] * 4


@pytest.mark.parametrize("wrong", [[], [1, 1], [-1, 2], [99]])
def test_a_subset_that_is_none(model, denoiser, images, wrong):
    with pytest.raises(ValueError, match="subset"):
        adapt(model, denoiser, images, config=AdaptConfig(steps=1), task=Classification(subset=wrong))


def test_explicit_timesteps_leave_the_noise_as_the_config_says(model, denoiser, images):
    config = AdaptConfig(steps=1, pairs=4, antithetic=True)
    timesteps = torch.tensor([100, 100, 700, 700]).expand(4, 1, 4)
    drawn = adapt(model, denoiser, images, config=config, timesteps=timesteps)
    plain = adapt(model, denoiser, images, config=config.replace(antithetic=False), timesteps=timesteps)
    assert not torch.allclose(drawn.loss, plain.loss)
    with pytest.raises(ValueError, match="timesteps has 3 pairs with antithetic"):
        adapt(model, denoiser, images, config=config, timesteps=timesteps[:, :, :3])


def test_a_warm_up_whose_deadline_leaves_no_step_is_no_error(model, denoiser, images):
    adapter = Adapter(model.float(), denoiser.float(), AdaptConfig(steps=2, pairs=2, guard=2))
    assert set(adapter.warmup(images.float(), deadline_ms=1e-3)) == {"cold", "warm"}
