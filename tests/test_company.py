"""An image's result does not depend on what runs beside it, nor on what ran before."""

from __future__ import annotations

import warnings

import pytest
import torch

from dtta_fast import AdaptConfig, Adapter, presets, zoo
from dtta_fast.data.corruptions import corrupt
from dtta_fast.runtime import compiling
from dtta_fast.session.program import ModuleProgram
from dtta_fast.tasks import Classification

CONFIG = AdaptConfig(steps=2, pairs=4, lr=1e-2, guard=3, match="both", precheck="answer")


@pytest.fixture
def floats(model, denoiser, images):
    from dtta_fast.denoisers.calibration import Calibration

    denoiser.calibration = Calibration.measure(
        denoiser, torch.rand(16, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    )
    return model.float(), denoiser.float(), images.float()


@pytest.mark.parametrize("compile", ["off", "regional"])
def test_the_pre_check_s_images_are_left_alone_whatever_runs_beside_them(floats, monkeypatch, compile):
    """Compiled code takes whole batches: what it computes for images that were not to be adapted is not part of the result.

    Here the batches alone are those of compiled code; that its numbers agree is held by the ladder of test_engine.py.
    """
    model, denoiser, images = floats
    monkeypatch.setattr(compiling, "compile_regions", lambda _: None)
    monkeypatch.setattr(compiling, "compiled", lambda function: function)
    monkeypatch.setattr(ModuleProgram, "asked", lambda self, batch, crop: crop.mean((1, 2, 3)) > threshold)
    threshold = float(images.mean((1, 2, 3)).median())
    wanted = images.mean((1, 2, 3)) > threshold
    assert 0 < wanted.sum() < len(images)
    session = Adapter(model, denoiser, CONFIG.replace(compile=compile))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(compilation failed|one by one)")
        together = session.adapt(images)
    alone = [Adapter(model, denoiser, CONFIG).adapt(images[i : i + 1], image_ids=torch.tensor([i])) for i in range(len(images))]
    for i, own in enumerate(alone):
        assert bool(together.accepted[i]) == bool(own.accepted[0])
        assert int(together.evaluations[i]) == int(own.evaluations[0])
        torch.testing.assert_close(together.outputs[i], own.outputs[0], rtol=1e-3, atol=1e-3)
        if not wanted[i]:
            with torch.no_grad():  # the answer to the matched image stands
                seen = denoiser.calibration.match(images[i : i + 1]) if CONFIG.match == "both" else images[i : i + 1]
                stands = model(Classification().normalise(model, seen))[0]
            torch.testing.assert_close(together.outputs[i], stands, rtol=1e-3, atol=1e-3)
            assert not together.accepted[i]
            assert together.evaluations[i] == 0
            assert together.loss[i].isnan().all()
        else:
            assert not together.loss[i].isnan().any()


def test_a_call_is_equal_to_the_bit_whatever_was_called_before():
    """Storage that a larger batch has left is laid out as new storage is."""
    model, denoiser = zoo.load("digits")
    blurred = corrupt(zoo.example("digits")[0][:3], "gaussian_blur", 5)
    config = presets.FAST.replace(precheck="off", steps=2, guard=0, guard_threshold=0.0)
    ids = torch.tensor([7, 8, 9])
    fresh = {count: Adapter(model, denoiser, config).adapt(blurred[:count], image_ids=ids[:count]) for count in (1, 2, 3)}
    session = Adapter(model, denoiser, config)
    for count in (3, 1, 2, 1):
        found = session.adapt(blurred[:count], image_ids=ids[:count])
        assert torch.equal(found.outputs, fresh[count].outputs), count
        assert torch.equal(found.loss, fresh[count].loss), count
