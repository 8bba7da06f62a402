"""The command as a person runs it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from dtta_fast import Calibration, zoo
from dtta_fast.cli import main
from dtta_fast.data.corruptions import DIGITS_C
from dtta_fast.data.digits import load_digits
from dtta_fast.demo_dense import CORRUPTIONS
from dtta_fast.denoisers.dit import DiT

DTTA = Path(sys.executable).with_name("dtta")


def test_demo_prints_a_table_and_writes_its_result(tmp_path, capsys):
    path = tmp_path / "demo.json"
    main(["demo", "--images", "6", "--seed", "3", "--json", str(path)])
    printed = capsys.readouterr().out
    result = json.loads(path.read_text())
    assert (result["benchmark"], result["preset"], result["images"], result["config"]["seed"]) == ("digits-C", "FAST", 6, 3)
    assert set(result["corruptions"]) == set(DIGITS_C)
    keys = ("source_accuracy", "matched_accuracy", "adapted_accuracy", "evaluations_per_image", "seconds_per_image")
    rows = result["corruptions"].values()
    assert result["gain_interval"][0] <= result["adapted_accuracy"] - result["source_accuracy"] <= result["gain_interval"][1]
    for key in keys:
        assert result[key] == pytest.approx(sum(row[key] for row in rows) / len(DIGITS_C))
        assert key in result["clean"]
    for name, row in result["corruptions"].items():
        assert name in printed
        assert row["seconds_per_image"] > 0
        settings = result["config"]
        assert 0 <= row["evaluations_per_image"] <= settings["steps"] * settings["pairs"] + 3 * settings["guard"]
    assert result["evaluations_per_image"] > 0
    main(["demo", "--images", "6", "--seed", "3", "--json", str(path)])
    again = json.loads(path.read_text())
    assert [row["adapted_accuracy"] for row in again["corruptions"].values()] == [row["adapted_accuracy"] for row in rows]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--preset", "SLOW"], "preset is 'SLOW'"),
        (["demo", "--images", "0"], "images is 0"),
        (["demo", "--images", "501"], "images is 501"),
        (["demo", "--seed", "-1"], "seed is -1"),
        (["demo", "--picture", "maps.png"], "picture is of maps"),
        (["demo", "--task", "depth", "--open-vocabulary"], "open_vocabulary is a way of classification"),
        (["demo", "--json", "nowhere/at/all.json"], "give a file in a folder that exists"),
        (["env", "--json", "."], "give a file in a folder that exists"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out


def test_calibrate_writes_what_the_denoiser_then_loads(tmp_path, capsys):
    denoiser, images = tmp_path / "denoiser", tmp_path / "images" / "inner"
    shutil.copytree(Path(zoo.__file__).parent / "digits" / "denoiser", denoiser)
    (denoiser / "calibration.json").unlink()
    assert DiT.from_pretrained(denoiser).calibration is None
    images.mkdir(parents=True)
    for i, image in enumerate(load_digits("train")[0][:12]):
        to_pil_image(image).save(images / f"{i:02}.png")
    main(["calibrate", str(denoiser), str(tmp_path / "images")])
    assert "calibration.json: written" in capsys.readouterr().out
    found = DiT.from_pretrained(denoiser).calibration
    again = Calibration.measure(DiT.from_pretrained(denoiser), (load_digits("train")[0][:12] * 255).round() / 255)
    assert found.mean == pytest.approx(again.mean, abs=1e-3)
    assert found.power[:6] == pytest.approx(again.power[:6], rel=0.02)
    for arguments, message in (
        (["calibrate", str(denoiser), str(tmp_path / "nowhere")], "is no folder"),
        (["calibrate", str(denoiser), str(denoiser / "scheduler")], "holds no file"),
        (["calibrate", "some/hub-id", str(images)], "--out FILE"),
    ):
        test_bad_input_is_one_line_and_status_2(capsys, arguments, message)
    (images / "00.png").write_bytes(b"no image")
    test_bad_input_is_one_line_and_status_2(capsys, ["calibrate", str(denoiser), str(images)], "00.png is no image")


def test_env_names_versions_and_backends(tmp_path, capsys):
    main(["env", "--json", str(tmp_path / "env.json")])
    found = json.loads((tmp_path / "env.json").read_text())
    assert found["native library"] == "built"
    printed = capsys.readouterr().out
    for key in ("torch", "diffusers", "timm", "ops on cpu", "ops on cuda"):
        assert f"{key} " in printed
        assert found[key] in printed


def test_installed_command():
    shown = subprocess.run([DTTA, "--help"], capture_output=True, text=True, check=True).stdout
    assert "demo" in shown
    assert "env" in shown


@pytest.mark.parametrize("task", ["segmentation", "depth"])
def test_demo_of_maps_prints_a_table_and_draws(task, tmp_path, capsys):
    result, picture = tmp_path / "demo.json", tmp_path / "maps.png"
    main(["demo", "--task", task, "--images", "2", "--json", str(result), "--picture", str(picture)])
    found = json.loads(result.read_text())
    assert (found["benchmark"], found["task"], found["preset"]) == ("scenes-C", task, "DENSE")
    assert set(found["corruptions"]) == set(CORRUPTIONS[task])
    change = found["adapted"][found["score"]] - found["source"][found["score"]]
    assert found["gain_interval"][0] - 1e-6 <= change <= found["gain_interval"][1] + 1e-6
    assert all(row["evaluations_per_image"] <= 40 for row in found["corruptions"].values())
    assert "defocus_blur" in capsys.readouterr().out
    with Image.open(picture) as image:
        assert image.size == (5 * (2 * 64 + 4) + 4, len(CORRUPTIONS[task]) * (2 * 64 + 4) + 4)
