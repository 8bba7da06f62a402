"""The engine that ours is measured against does the same work: equal losses and equal logits on the same draws, in float32."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch

from dtta_fast import AdaptConfig, adapt

pytestmark = pytest.mark.quick


def naive_engine():
    path = Path(__file__).parents[1] / "bench" / "naive.py"
    spec = importlib.util.spec_from_file_location("naive", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Naive


@pytest.mark.parametrize("denoiser_parameters", ["frozen", "all"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_naive_and_engine_agree(model, denoiser, images, optimizer, denoiser_parameters):
    model, denoiser, images = model.float(), denoiser.float(), images[:1].float()
    config = AdaptConfig(
        steps=3, pairs=20, optimizer=optimizer, lr=1e-3, denoiser_lr=1e-3, denoiser_parameters=denoiser_parameters, chunk=15
    )
    generator = torch.Generator().manual_seed(0)
    timesteps = torch.randint(0, 1000, (1, 3, 20), generator=generator)
    noise = torch.randn(1, 3, 20, 3, 16, 16, generator=generator)
    ours = adapt(model, denoiser, images, config=config, timesteps=timesteps, noise=noise)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    naive = naive_engine()(copy.deepcopy(model), copy.deepcopy(denoiser), config)
    for _ in range(2):  # the second image starts from the source again
        logits, losses = naive.adapt((images - mean) / std, 2 * images - 1, timesteps[0], noise[0])
        torch.testing.assert_close(ours.loss[0], torch.tensor(losses), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.outputs, logits, rtol=1e-3, atol=1e-3)
    assert float((ours.outputs - ours.outputs_before).abs().max()) > 1e-2


def test_settings_that_the_naive_engine_lacks_are_refused(model, denoiser):
    with pytest.raises(ValueError, match=r"logit_scale is 5\.0; the naive engine knows steps"):
        naive_engine()(model, denoiser, AdaptConfig(optimizer="sgd", logit_scale=5.0))
