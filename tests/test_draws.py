"""Timesteps: in range, covering it, and a function of their coordinates."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from dtta_fast.core.draws import Draws

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("kind", ["uniform", "stratified"])
@pytest.mark.parametrize(("low", "high"), [(0, 1000), (200, 700), (5, 6)])
def test_timesteps_are_in_range_and_uniform(kind, low, high):
    drawn = Draws(0, 6, kind, low, high).timesteps(torch.arange(4000), torch.tensor(2))
    assert drawn.shape == (4000, 6)
    assert drawn.dtype == torch.int64
    assert int(drawn.min()) >= low
    assert int(drawn.max()) < high
    if high - low > 1:
        counts = torch.bincount(((drawn.flatten() - low) * 10) // (high - low), minlength=10)
        assert stats.chisquare(counts.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("pairs", [1, 3, 4, 180, 700])
def test_stratified_covers_every_part(pairs):
    low, high = 200, 700
    drawn = Draws(3, pairs, "stratified", low, high).timesteps(torch.arange(50), torch.tensor(0))
    edges = low + torch.arange(pairs + 1) * (high - low) / pairs
    assert (drawn >= edges[:-1].floor()).all()
    assert (drawn < edges[1:].ceil()).all()


def test_an_image_s_timesteps_are_its_own():
    draws = Draws(11, 5, "uniform", 0, 1000)
    ids, step = torch.tensor([4, 8, 15]), torch.tensor(1)
    together = draws.timesteps(ids, step)
    assert torch.equal(together[2:], draws.timesteps(ids[2:], step))
    assert not torch.equal(together, draws.timesteps(ids, step + 1))
    assert not torch.equal(together, Draws(12, 5, "uniform", 0, 1000).timesteps(ids, step))
