"""The corrupted CIFAR-10 streams and the choice of their severities, on a few random images."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import imagecorruptions
import pytest
import torch
from torch import nn

QUALITY = Path(__file__).parents[1] / "bench" / "quality"
SEVERE = ("fog", "pixelate")  # of severity 3 in these tests; the others have severity 1


@pytest.fixture
def natural(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(QUALITY))
    module = importlib.import_module("natural")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8, generator=generator).repeat_interleave(4, 2).repeat_interleave(4, 3)
    labels = torch.arange(6)
    monkeypatch.setattr(module.cifar10, "load", lambda root, split: (pixels, labels))
    chosen = {name: {"severity": 3 if name in SEVERE else 1} for name in module.CORRUPTIONS}
    monkeypatch.setattr(module, "RESULTS", tmp_path / "cifar_severities.json")
    module.RESULTS.write_text(json.dumps({"corruptions": chosen}))
    module.streams.cache_clear()
    yield module
    module.streams.cache_clear()


def test_the_committed_severities_are_those_that_the_rule_chooses(monkeypatch):
    monkeypatch.syspath_prepend(str(QUALITY))
    module = importlib.import_module("natural")
    record = json.loads(module.RESULTS.read_text())
    assert record["target"] == module.TARGET
    assert record["images"] == module.IMAGES
    assert {name: module.nearest(found["accuracy"]) for name, found in record["corruptions"].items()} == module.severities()


def test_streams_are_the_fifteen_corruptions_and_clean_images(natural):
    found, labels = natural.streams(Path("root"), "test", 4)
    assert list(found) == [*imagecorruptions.get_corruption_names(), "clean"]
    assert labels.tolist() == [0, 1, 2, 3]
    pixels = natural.cifar10.load(Path("root"), "test")[0][:4]
    assert torch.equal(found["clean"], pixels.float() / 255)
    for name, images in found.items():
        assert images.shape == (4, 3, 32, 32)
        assert images.dtype == torch.float32
        assert 0 <= images.min() <= images.max() <= 1
        assert name == "clean" or not torch.equal(images, found["clean"])
        if name in SEVERE:
            assert torch.equal(images, natural.corrupt(found["clean"], name, 3))


def test_an_image_is_corrupted_alike_however_many_are_asked_for(natural):
    few, many = (natural.streams(Path("root"), "test", count)[0] for count in (2, 6))
    for name, images in few.items():
        assert torch.equal(images, many[name][:2]), name
    assert natural.streams(Path("root"), "test", 2)[0] is few


@pytest.mark.parametrize(
    ("one", "other", "severity"),
    [
        ([0.9, 0.8, 0.7, 0.5, 0.3], [0.7, 0.6, 0.5, 0.3, 0.1], 3),
        ([0.9, 0.9, 0.8, 0.8, 0.7], [0.9, 0.9, 0.9, 0.9, 0.9], 5),  # every severity is too mild
        ([0.4, 0.3, 0.2, 0.1, 0.1], [0.3, 0.2, 0.1, 0.1, 0.1], 1),  # every severity is too harsh
        ([0.75, 0.75, 0.25, 0.2, 0.1], [0.75, 0.75, 0.25, 0.2, 0.1], 1),  # two severities are equally near
    ],
)
def test_the_severity_is_the_one_nearest_to_the_target(natural, one, other, severity):
    assert natural.nearest({"one": one, "other": other}) == severity


def test_the_choice_is_of_all_models_and_recorded(natural, monkeypatch, capsys):
    pixels, _ = natural.cifar10.load(Path("root"), "validation")
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)) for _ in natural.cifar_classifiers.NAMES]
    clean = models[0](natural.cifar_classifiers.normalised(pixels)).argmax(
        1
    )  # the labels, so that the first model is right on clean images
    monkeypatch.setattr(natural.cifar10, "load", lambda root, split: {"validation": (pixels, clean)}[split])
    monkeypatch.setattr(
        natural.cifar_classifiers, "load", lambda name: dict(zip(natural.cifar_classifiers.NAMES, models, strict=True))[name]
    )
    monkeypatch.setattr(natural, "IMAGES", 5)
    monkeypatch.setattr("sys.argv", ["natural.py", "--root", "root"])
    natural.main()
    record = json.loads(natural.RESULTS.read_text())
    assert record["images"] == 5
    assert record["clean"]["resnet"] == 1
    assert list(record["corruptions"]) == list(natural.CORRUPTIONS)
    assert natural.severities() == {name: natural.nearest(found["accuracy"]) for name, found in record["corruptions"].items()}
    severe = (natural.corrupt(pixels[:5] / 255, "fog", 4) * 255).round().byte()
    expected = [natural.cifar_classifiers.accuracy(model, severe, clean[:5]) for model in models]
    assert [values[3] for values in record["corruptions"]["fog"]["accuracy"].values()] == expected
    assert "clean: resnet 100.0%, convnext " in capsys.readouterr().out
