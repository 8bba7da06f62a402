"""The digits and their corruptions: fixed splits, and images that depend on their own name and number alone."""

from __future__ import annotations

import gzip

import numpy as np
import pytest
import torch
from sklearn import datasets

from dtta_fast import zoo
from dtta_fast.data import fashion
from dtta_fast.data.corruptions import DIGITS_C, corrupt
from dtta_fast.data.digits import SPLITS, load_digits
from dtta_fast.data.fashion import load_fashion
from dtta_fast.metrics import bootstrap_interval, confusion, depth_errors


def test_splits_share_no_image_and_cover_all():
    rows = np.random.default_rng(0).permutation(1797)
    parts = [set(rows[part]) for part in SPLITS.values()]
    assert sum(len(part) for part in parts) == 1797 == len(set().union(*parts))
    sizes = {split: load_digits(split)[0].shape for split in SPLITS}
    assert sizes == {"test": (500, 3, 32, 32), "validation": (300, 3, 32, 32), "train": (997, 3, 32, 32)}


def test_rendering_keeps_the_digit():
    images, labels = load_digits("test")
    assert images.dtype == torch.float32
    assert 0 <= float(images.min()) < float(images.max()) <= 1
    assert torch.equal(images[:, 0], images[:, 2])
    digits = datasets.load_digits()
    row = np.random.default_rng(0).permutation(1797)[7]
    assert int(labels[7]) == digits.target[row]
    small = torch.nn.functional.interpolate(images[7:8, :1], (8, 8), mode="area")[0, 0]
    assert np.corrcoef(small.numpy().ravel(), digits.images[row].ravel())[0, 1] > 0.98


@pytest.mark.parametrize("name", DIGITS_C)
def test_corruptions_are_seeded_by_image(name):
    images = load_digits("validation")[0][:4]
    np.random.seed(3)  # noqa: NPY002
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    whole = corrupt(images, name, DIGITS_C[name])
    assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    assert torch.equal(corrupt(images[2:], name, DIGITS_C[name], first_id=2), whole[2:])
    assert whole.shape == images.shape
    assert float((whole - images).abs().mean()) > 0.01
    assert torch.equal((whole * 255).round() / 255, whole)


def test_the_source_is_in_the_band_that_digits_c_was_chosen_for():
    model, _ = zoo.load("digits")
    images, labels = load_digits("validation")
    with torch.no_grad():
        assert float((model(images * 2 - 1).argmax(1) == labels).float().mean()) > 0.97
        for name, severity in DIGITS_C.items():
            accuracy = float((model(corrupt(images, name, severity) * 2 - 1).argmax(1) == labels).float().mean())
            assert 0.38 < accuracy <= 0.9, name  # gaussian blur stands at 39.0 %
    assert len(DIGITS_C) >= 10


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="split is 'all'"):
        load_digits("all")
    with pytest.raises(ValueError, match="name is 'rain'"):
        corrupt(torch.zeros(1, 3, 32, 32), "rain", 1)
    with pytest.raises(ValueError, match="severity is 6"):
        corrupt(torch.zeros(1, 3, 32, 32), "fog", 6)


def test_bootstrap_interval_is_the_textbook_s():
    """Of a mean of 400 values: 1.96 standard errors to both sides."""
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    low, high = bootstrap_interval(values)
    error = float(values.std()) / 20
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.08)
    assert (high + low) / 2 == pytest.approx(float(values.mean()), abs=0.1 * error)


def idx(array: np.ndarray) -> bytes:
    """The files' format: two zero bytes, 8 for bytes, dimensions, sizes, values."""
    return bytes([0, 0, 8, array.ndim]) + b"".join(int(size).to_bytes(4, "big") for size in array.shape) + array.tobytes()


def test_fashion_is_read_from_a_folder_of_archives(tmp_path):
    generator = np.random.default_rng(0)
    images, labels = generator.integers(0, 256, (12, 28, 28), dtype=np.uint8), generator.integers(0, 10, 12, dtype=np.uint8)
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        for part, rows in (("train", slice(0, 9)), ("t10k", slice(9, 12))):
            (tmp_path / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(idx(array[rows])))
    found, truth = load_fashion("test", tmp_path)
    assert found.shape == (3, 3, 32, 32)
    assert torch.equal(truth, torch.from_numpy(labels[9:]).long())
    assert torch.equal(found[:, 1, 2:-2, 2:-2], torch.from_numpy(images[9:]).float() / 255)
    assert float(found[..., :2, :].sum() + found[..., -2:].sum()) == 0
    assert len(load_fashion("train", tmp_path)[0]) == 9
    with pytest.raises(ValueError, match="split is 'all'; choose one of train"):
        load_fashion("all", tmp_path)


def test_fashion_says_where_its_files_come_from(monkeypatch, tmp_path):
    monkeypatch.setattr(fashion, "DEBIAN", tmp_path)
    with pytest.raises(FileNotFoundError, match="apt install dataset-fashion-mnist"):
        load_fashion("test")


def test_bytes_are_counted_as_what_they_are():
    labels = torch.tensor([[[0, 99], [149, 255]]], dtype=torch.uint8)
    counts = confusion(labels.clone(), labels, 150)
    assert counts.sum() == 3
    assert [int(counts[0, k, k]) for k in (0, 99, 149)] == [1, 1, 1]


def test_the_errors_of_a_depth_map_do_not_depend_on_its_batch():
    generator = torch.Generator().manual_seed(0)
    depth = torch.rand(2, 16, 16, generator=generator) * torch.tensor([1.0, 9.0])[:, None, None] + 0.5
    guess = depth + 0.1 * torch.rand(depth.shape, generator=generator)
    together = depth_errors(guess, depth)
    for k in range(2):
        for name, values in depth_errors(guess[k : k + 1], depth[k : k + 1]).items():
            assert float(values) == pytest.approx(float(together[name][k]), rel=1e-9), name
