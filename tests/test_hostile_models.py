"""Models' folders, arrays and settings that are damaged or made to harm: one clear error, and nothing random in an answer's place."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from dtta_fast import presets, zoo
from dtta_fast.commands.cli import main
from dtta_fast.data.arrays import _load_array
from dtta_fast.data.shards import _bytes
from dtta_fast.report.svg import axis
from dtta_fast.runs.config import RunConfig
from dtta_fast.runs.models import image_size, load_models

MAPS = {"segmentation": presets.DENSE, "depth": presets.DENSE}


@pytest.fixture(params=["segmentation", "depth"])
def folder(request, tmp_path) -> tuple[str, Path]:
    shutil.copytree(zoo.folder(request.param) / "model", tmp_path / "m")
    return request.param, tmp_path / "m"


def load(task: str, place: Path) -> None:
    run = RunConfig(data="map-folder", root=".", task=task, model=str(place), adapt=MAPS[task])
    load_models(run, ("a",))


def test_weights_that_a_map_model_lacks_are_named(folder):
    """The library would draw them at random, and the run would go on."""
    task, place = folder
    weights = load_file(place / "model.safetensors")
    name = sorted(weights)[0]
    del weights[name]
    save_file(weights, place / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights of a .*: "):
        load(task, place)


DAMAGE = {
    "config.json": ["[]", "5", '{"hidden_sizes": "x"}', '{"model_type": "segformer", "num_encoder_blocks": 99}', "{"],
    "preprocessor_config.json": ["[]", "{}", '{"size": 5}', '{"image_processor_type": "x"}'],
    "model.safetensors": ["", "x" * 100, "\x08" + "\0" * 7 + "{}      "],
}


@pytest.mark.parametrize(("file", "text"), [(file, text) for file, texts in DAMAGE.items() for text in texts])
def test_a_damaged_folder_of_a_map_model_is_named(folder, file, text):
    task, place = folder
    (place / file).write_text(text)

    def told() -> str:
        try:
            image_size(task, str(place))
            load(task, place)
        except ValueError as error:  # others are the libraries' own, which name no folder
            return str(error)
        return f"{place} is taken"  # as the libraries read it: what is left out has a default

    assert str(place) in told()


def test_a_pipe_in_the_place_of_a_shard_is_refused(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(ValueError, match="sample x cannot be read: it is a pipe"):
        _bytes(tmp_path / "a.tar", 0, 10, "sample x")


def test_an_array_of_no_dimension_is_named(tmp_path):
    np.save(tmp_path / "fog.npy", np.uint8(3))
    with pytest.raises(ValueError, match=r"fog\.npy cannot be read as an array: it is a single number"):
        _load_array(tmp_path / "fog.npy")


@pytest.mark.parametrize("change", [{"severities": (True,)}, {"per_class": True}, {"batch": True}, {"workers": False}])
def test_booleans_are_no_numbers(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))} is"):
        RunConfig(**change)


@pytest.mark.parametrize("field", ["lr", "denoiser_lr", "weight_decay", "guard_threshold", "momentum", "logit_scale"])
@pytest.mark.parametrize("value", [10**400, -(10**400), float("inf"), float("nan"), np.zeros(2), [1.0], "x", True])
def test_settings_that_are_no_numbers_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field} is"):
        dataclasses.replace(presets.FAST, **{field: value})


@pytest.mark.parametrize("field", ["mode", "timesteps", "chunk", "objective", "compile"])
def test_arrays_are_no_settings(field):
    with pytest.raises(ValueError, match=f"{field} is"):
        dataclasses.replace(presets.FAST, **{field: np.array(["online", "x"])})


@pytest.mark.parametrize("span", [(0.0, 5e-324), (0.0, 2e-323), (1e-300, 2e-300), (0.0, 0.0), (5e-324, 5e-324), (1e300, 1.1e300)])
def test_axes_of_tiny_and_huge_spans(span):
    found = axis(*span)
    assert found.low < found.high
    assert all(np.isfinite(tick) for tick in found.ticks)


def test_calibrate_follows_no_link_in_a_denoiser_s_folder(tmp_path, capsys):
    shutil.copytree(zoo.folder("digits") / "denoiser", tmp_path / "d")
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / "d" / "calibration.json").unlink(missing_ok=True)
    (tmp_path / "d" / "calibration.json").symlink_to(precious)
    with pytest.raises(SystemExit):
        main(["calibrate", str(tmp_path / "d"), str(tmp_path)])
    assert "is a link" in capsys.readouterr().err
    assert precious.read_text() == "mine"


def test_a_calibration_that_cannot_be_written_leaves_the_earlier_one(tmp_path, monkeypatch):
    _, denoiser = zoo.load("digits")
    path = tmp_path / "c.json"
    denoiser.calibration.save(path)
    before = path.read_text()

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        denoiser.calibration.save(path)
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["c.json"]
