"""The noise source against Random123's published known-answer vectors, and its statistics."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from dtta_fast.kernels import native
from dtta_fast.kernels.philox import MASK, normal, philox, timestep_words

pytestmark = pytest.mark.quick

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, words
KNOWN_ANSWERS = json.loads((Path(__file__).parent / "philox_known_answers.json").read_text())


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_reference_gives_the_published_words(counter, key, words, device):
    found = philox(tuple(torch.tensor(word, device=device) for word in counter), key[0] | key[1] << 32)
    assert [int(word) for word in found] == words


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_native_library_gives_the_published_words(counter, key, words):
    assert native.philox(np.array([counter]), np.array(key)).tolist() == [words]


def test_native_and_reference_agree_on_random_counters():
    counters = np.random.default_rng(0).integers(0, 2**32, (10_000, 4), dtype=np.uint32)
    seed = 0x0123456789ABCDEF
    expected = torch.stack(philox(tuple(torch.from_numpy(counters.astype(np.int64)).T), seed), dim=1)
    assert np.array_equal(native.philox(counters, np.array([seed & MASK, seed >> 32])), expected.numpy())


def test_normals_are_box_muller_of_the_documented_counters():
    """Counter (element // 4, pair, image_id, step) and a 64-bit key, by the native words and numpy's float64."""
    pairs, ids, seed, step = [5, 70_000], [3, 2**32 - 1], 0xFEDCBA9_87654321, 2**31 + 6
    found = normal(10, torch.tensor(pairs), torch.tensor(ids), seed, torch.tensor(step))
    key = np.array([seed & MASK, seed >> 32])
    for i, image_id in enumerate(ids):
        for j, pair in enumerate(pairs):
            words = native.philox(np.array([[quad, pair, image_id, step] for quad in range(3)]), key)
            uniform = (words.astype(np.float64) + 0.5) / 2**32
            radius, angle = np.sqrt(-2 * np.log(uniform[:, ::2])), 2 * np.pi * uniform[:, 1::2]
            expected = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=2).ravel()[:10]
            np.testing.assert_allclose(found[i, j].numpy(), expected, rtol=0, atol=5e-6)


def test_normals_are_normal_and_independent():
    pairs, ids = torch.arange(8), torch.tensor([0, 3, 2**32 - 1])
    drawn = [normal(40_000, pairs, ids, 7, torch.tensor(step)) for step in (0, 1)]
    flat = torch.cat([d.flatten() for d in drawn]).numpy()
    assert stats.kstest(flat, "norm").pvalue > 1e-3
    assert abs(stats.skew(flat)) < 0.01
    assert abs(stats.kurtosis(flat)) < 0.02
    # steps, images, pairs and lanes side by side: no two streams may be correlated
    streams = torch.cat([d.reshape(-1, 40_000) for d in drawn])
    lanes = streams[0].view(-1, 4).T
    for group in (streams, lanes):
        correlation = torch.corrcoef(group).fill_diagonal_(0).abs().max()
        assert correlation < 5 / group.shape[1] ** 0.5


def test_noise_depends_on_its_coordinates_alone():
    step = torch.tensor(3)
    whole = normal(37, torch.arange(6), torch.tensor([5, 9]), 1, step)
    part = normal(37, torch.arange(4, 6), torch.tensor([9]), 1, step)
    assert torch.equal(whole[1:, 4:], part)
    assert torch.equal(normal(8, torch.arange(6), torch.tensor([5, 9]), 1, step), whole[..., :8])


def test_timestep_words_are_uniform_and_share_no_word_with_the_noise():
    words = timestep_words(4096, torch.arange(16), 0, torch.tensor(0))
    assert stats.kstest(words.flatten().numpy() / 2**32, "uniform").pvalue > 1e-3
    step = torch.tensor(0)
    noise = torch.stack(torch.broadcast_tensors(*philox((torch.arange(1024), torch.arange(4)[:, None], torch.tensor(0), step), 0)))
    assert not set(words[0].tolist()) & set(noise.flatten().tolist())
