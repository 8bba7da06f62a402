"""Folders of images as people have them: class orders, file formats, and files that are no images."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

from dtta_fast import presets, zoo
from dtta_fast.data.digits import load_digits
from dtta_fast.data.folder import image_files, natural_key, open_folder
from dtta_fast.runs import models
from dtta_fast.runs.config import RunConfig
from dtta_fast.runs.evaluate import evaluate
from dtta_fast.runs.models import outputs_by_name
from dtta_fast.runtime.pictures import FORMATS, read_image

OFF = presets.FAST.replace(steps=1, pairs=1, guard=0, guard_threshold=0.0, match="off", precheck="off", lr=1e-9, timesteps="uniform")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def digits_folder(root, names) -> None:
    """Writes five digits of each class to the folder of that class; names are in the order of the digits."""
    images, labels = load_digits("validation")
    for k, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i, image in enumerate(images[labels == k][:5]):
            Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()).save(root / name / f"{i}.png")


@pytest.mark.parametrize("names", [tuple(str(k) for k in range(1, 11)), NUMBERS])
def test_class_names_give_the_model_s_order(names, tmp_path):
    digits_folder(tmp_path / "data", names)
    run = RunConfig(data="folder", root=str(tmp_path / "data"), adapt=OFF, batch=50)
    with pytest.warns(UserWarning, match=r"would be if the classes were numbered differently"):
        assert evaluate(run, tmp_path / "unknown")["accuracy_before"] < 0.3
    given = RunConfig(data="folder", root=str(tmp_path / "data"), adapt=OFF, batch=50, classes=names)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(numbered|order).*")
        found = evaluate(given, tmp_path / "given")
    assert found["accuracy_before"] > 0.9
    assert found["classes"] == sorted(names)


def test_string_and_natural_order_differ_and_nothing_decides(tmp_path):
    digits_folder(tmp_path / "data", [str(k) for k in range(1, 11)])
    run = RunConfig(data="folder", root=str(tmp_path / "data"), adapt=OFF, batch=50, per_class=1)
    with pytest.warns(UserWarning, match=r"class 1 is '10'; in natural order, which timm uses, it is '2'"):
        evaluate(run, tmp_path / "run")


def test_a_model_s_own_names_give_its_order(tmp_path):
    model = zoo.load_model("digits")
    save_for_hf(model, tmp_path / "model", model_args=dict(model.pretrained_cfg.get("model_args") or {}))
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": NUMBERS}
    order = [NUMBERS.index(name) for name in sorted(NUMBERS)]
    assert outputs_by_name(model, (), sorted(NUMBERS)) == order
    assert outputs_by_name(model, ("a", "b"), sorted(NUMBERS)) == order
    assert outputs_by_name(model, NUMBERS[::-1], sorted(NUMBERS)) == [9 - k for k in order]
    assert outputs_by_name(model, (), ("cat", "dog")) is None
    model.pretrained_cfg = {**model.pretrained_cfg, "label_descriptions": {name: f"digit {name}" for name in NUMBERS}}
    assert outputs_by_name(model, (), [f"digit {name}" for name in NUMBERS]) == list(range(10))
    assert outputs_by_name(timm.create_model("resnet18", num_classes=10), (), NUMBERS) is None


def test_names_that_are_prompts_stay_prompts(monkeypatch):
    seen: list[list[str]] = []
    model = zoo.load_model("digits")
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": ("n02", "n01")}
    monkeypatch.setattr(models, "_model", lambda *_: (model, None))
    monkeypatch.setattr(models, "_denoiser", lambda _, names: seen.append(names) or zoo.load("digits")[1])
    assert models.load_models(RunConfig(classes=("a goldfish", "a tench")), ["n01", "n02"]).outputs == [1, 0]
    assert models.load_models(RunConfig(), ["n01", "n02"]).outputs == [1, 0]
    assert models.load_models(RunConfig(classes=("n01", "n02")), ["n01", "n02"]).outputs == [0, 1]
    assert seen == [["a goldfish", "a tench"], ["n02", "n01"], ["n01", "n02"]]


def test_natural_order():
    names = ["x10", "Zebra", "10", "apple", "2", "x2", "1"]
    assert sorted(names, key=natural_key) == ["1", "2", "10", "apple", "x2", "x10", "Zebra"]
    assert sorted(["a1b10", "a1b9", "a"], key=natural_key) == ["a", "a1b9", "a1b10"]


def test_integers_of_unknown_range_are_refused(tmp_path):
    Image.fromarray(np.full((8, 8), 200, dtype=np.int32)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match="32-bit integers, of no known range"):
        read_image(tmp_path / "x.tif")


@pytest.mark.parametrize("suffix", ["tif", "png"])
def test_sixteen_bits_are_scaled(suffix, tmp_path):
    Image.fromarray(np.full((8, 8), 51400, dtype=np.uint16)).save(tmp_path / f"x.{suffix}")
    assert torch.allclose(read_image(tmp_path / f"x.{suffix}"), torch.tensor(200 / 255))


def test_all_files_that_can_be_read_are_listed(tmp_path):
    image = Image.new("RGB", (8, 8), (200, 0, 0))
    names = ["a.ppm", "b.gif", "c.jfif", "d.pgm", "e.PNG", "f.jpe", *(["g.avif"] if "AVIF" in FORMATS else []), "h.apng", "i.mpo"]
    for name in names:
        kind = {"ppm": "PPM", "gif": "GIF", "pgm": "PPM", "PNG": "PNG", "avif": "AVIF", "apng": "PNG", "mpo": "MPO"}.get(
            name.split(".")[1], "JPEG"
        )
        (image.convert("L") if name.endswith("pgm") else image).save(tmp_path / name, kind)
    for folder in ("__MACOSX", "@eaDir", ".cache", "lost+found"):
        (tmp_path / folder).mkdir()
        image.save(tmp_path / folder / "x.png")
    (tmp_path / "notes.txt").write_text("no picture")
    data = open_folder(tmp_path)
    assert data.labels is None
    assert list(data.names) == names
    assert all(data[i].shape == (3, 8, 8) for i in range(len(data)))


def test_pictures_in_other_formats_are_counted(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "x.heic").write_bytes(b"")
    (tmp_path / "y.dng").write_bytes(b"")
    for name, kind in (("w", "PNG"), ("z", "JPEG")):
        Image.new("RGB", (8, 8)).save(tmp_path / name, kind)
    (tmp_path / "LICENSE").write_text("no picture")
    with pytest.warns(UserWarning, match=r"4 pictures are in a format that is not read, or without an extension, such as w; convert"):
        assert image_files(tmp_path) == ["a.png", "b.png"]
