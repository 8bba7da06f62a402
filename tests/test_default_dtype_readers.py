"""What is read and measured is the same under every default dtype and device of torch's, which stay as they were."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

from dtta_fast import AdaptConfig, Adapter, Calibration, zoo
from dtta_fast.core.calibrate import class_signal
from dtta_fast.core.differences import BINS, class_scores, pair_timesteps, search_losses
from dtta_fast.data.corruptions import corrupt
from dtta_fast.data.folder import read_images
from dtta_fast.data.images import open_images
from dtta_fast.data.scenes import scenes
from dtta_fast.denoisers.dit import DiT
from dtta_fast.embed.manifest import comparable, task_of, weights_digest
from dtta_fast.runtime.defaults import float32_on_cpu
from dtta_fast.runtime.pictures import read_image, read_pixels

DEFAULTS = [(torch.float16, "cpu"), (torch.float64, "cpu"), (torch.bfloat16, "meta")]
every_default = pytest.mark.parametrize("standing", DEFAULTS, ids=str)


@contextmanager
def default(dtype: torch.dtype, device: str) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
        assert (torch.get_default_dtype(), torch.get_default_device().type) == (dtype, device)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def alike(found, expected) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.dtype, one.device) == (other.dtype, other.device)
        assert torch.equal(one, other)


def read(place) -> list[torch.Tensor]:
    maps, fashion = open_images("map-folder", place / "maps", size=8), open_images("fashion-mnist", place)
    return [
        read_image(place / "set" / "a.png"),
        read_images(place / "set", 8, 2),
        read_pixels(place / "set" / "a.png", "a"),
        open_images("folder", place / "set").read(1),
        *maps[0],
        fashion.read(0),
        open_images("cifar10-c", place / "arrays").read(3),
        *zoo.example("digits"),
        *scenes("test", 1),
        corrupt(zoo.example("digits")[0][:1], "fog", 2),
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("sets")
    draw = np.random.default_rng(0)
    for folder in ("set", "maps/images", "maps/maps", "FashionMNIST/raw", "arrays"):
        (place / folder).mkdir(parents=True)
    for name in ("set/a.png", "set/b.png", "maps/images/a.png"):
        Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(place / name)
    Image.fromarray(draw.integers(1, 60_000, (12, 16), dtype=np.uint16)).save(place / "maps" / "maps" / "a.png")
    for name, array in (("images-idx3", draw.integers(0, 256, (2, 28, 28), dtype=np.uint8)), ("labels-idx1", np.array([9, 0], np.uint8))):
        head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
        for part in ("train", "t10k"):
            (place / "FashionMNIST" / "raw" / f"{part}-{name}-ubyte").write_bytes(head + array.tobytes())
    np.save(place / "arrays" / "fog.npy", draw.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8))
    np.save(place / "arrays" / "labels.npy", np.array([3]))
    return place


@every_default
def test_images(place, standing):
    expected = read(place)
    with default(*standing):
        found = read(place)
    alike(found, expected)


@pytest.mark.parametrize(("name", "standing"), [*(("digits", standing) for standing in DEFAULTS), ("segmentation", DEFAULTS[2])], ids=str)
def test_the_zoo(name, standing):
    expected = zoo.load(name)
    with default(*standing):
        found = zoo.load(name)
    for one, other in zip(found, expected, strict=True):
        assert one.state_dict().keys() == other.state_dict().keys()
        alike(one.state_dict().values(), other.state_dict().values())
    alike([found[1].process.table], [expected[1].process.table])
    assert found[1].calibration == expected[1].calibration


@every_default
def test_a_checkpoint(tmp_path, random_network, standing):
    state = random_network().state_dict()
    torch.save(state, tmp_path / "dit.pt")
    expected = DiT.from_original(tmp_path / "dit.pt", num_heads=2)
    with default(*standing):
        found = DiT.from_original(tmp_path / "dit.pt", num_heads=2)
    alike(found.state_dict().values(), expected.state_dict().values())
    alike([found.process.table], [expected.process.table])


@pytest.mark.parametrize("standing", DEFAULTS[2:], ids=str)
def test_a_calibration(process, random_network, monkeypatch, standing):
    denoiser, kept = DiT(random_network(depth=1), process), zoo.load("digits")[1].calibration
    images = zoo.example("digits")[0][:8]

    def measured() -> tuple[Calibration, list[torch.Tensor]]:
        x0, ids = denoiser.encode(images[:1]), torch.arange(1, dtype=torch.int64, device="cpu")
        generator = torch.Generator("cpu").manual_seed(0)
        margins = torch.rand(4, BINS, 2, generator=generator, dtype=torch.float64, device="cpu")
        found = [kept.match(images), kept.distance(images), kept.density(1000), class_scores(search_losses(denoiser, x0, ids))]
        found += [*class_signal(margins), pair_timesteps(denoiser, ids)]
        return Calibration.measure(denoiser, images), found

    expected = measured()
    with default(*standing):
        found = measured()
    assert dataclasses.asdict(found[0]) == dataclasses.asdict(expected[0])
    alike(found[1], expected[1])


@every_default
def test_what_a_package_is_told_by(model, denoiser, standing):
    engine = Adapter(model, denoiser, AdaptConfig(steps=1, pairs=2)).engine

    def told() -> tuple[object, ...]:
        return weights_digest(engine), task_of(engine, [2, 3, 16, 16], [2, 7]), comparable(engine.config)

    expected = told()
    with default(*standing):
        assert told() == expected


def test_the_defaults_come_back_after_an_error():
    def fails() -> None:
        with float32_on_cpu(), float32_on_cpu():
            alike([torch.empty(0)], [torch.empty(0, dtype=torch.float32, device="cpu")])
            raise ZeroDivisionError

    with default(torch.bfloat16, "meta"), pytest.raises(ZeroDivisionError):
        fails()
