"""The command as a person runs it."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from dtta_fast import Calibration, presets, zoo
from dtta_fast.commands.cli import COMMANDS, main
from dtta_fast.commands.common import option
from dtta_fast.commands.demo import _print_dense
from dtta_fast.commands.demo_maps import CORRUPTIONS
from dtta_fast.commands.evaluate import Running, _print_summary
from dtta_fast.data.corruptions import DIGITS_C
from dtta_fast.data.digits import load_digits
from dtta_fast.denoisers.dit import DiT
from dtta_fast.runs.models import class_names

DTTA = Path(sys.executable).with_name("dtta")


@pytest.mark.quick
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


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--preset", "SLOW"], "preset is 'SLOW'"),
        (["demo", "--images", "0"], "images is 0"),
        (["demo", "--images", "501"], "images is 501"),
        (["demo", "--seed", "-1"], "seed is -1"),
        (["demo", "--picture", "maps.png"], "picture is of maps"),
        (["demo", "--task", "depth", "--html", "page.html"], "for maps, give --picture FILE"),
        (["demo", "--task", "depth", "--open-vocabulary"], "open_vocabulary is a way of classification"),
        (["demo", "--json", "nowhere/at/all.json"], "give a file in a folder that exists"),
        (["env", "--json", "."], "give a file in a folder that exists"),
        (["adapt", "0.png", "--steps", "0"], "steps is 0; allowed"),
        (["evaluate", "run", "--steps", "0"], "steps is 0; allowed"),
        (["evaluate", "run", "--batch", "0"], "batch is 0; allowed"),
        (["evaluate", "run", "--mode", "online"], "give --protocol online"),
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


@pytest.mark.slow
def test_calibrate_writes_what_the_denoiser_then_loads(tmp_path, capsys):
    denoiser, images = tmp_path / "denoiser", tmp_path / "images" / "inner"
    shutil.copytree(Path(zoo.__file__).parent / "digits" / "denoiser", denoiser)
    (denoiser / "calibration.json").unlink()
    assert DiT.from_pretrained(denoiser).calibration is None
    images.mkdir(parents=True)
    for i, image in enumerate(load_digits("train")[0][:8]):
        to_pil_image(image).save(images / f"{i:02}.png")
    (denoiser / "calibration.json").write_text("damaged")  # which is not read: it is to be written anew
    classifier = str(Path(zoo.__file__).parent / "digits" / "classifier")
    main(["calibrate", str(denoiser), str(tmp_path / "images"), "--model", classifier, "--json", str(tmp_path / "found.json")])
    printed = capsys.readouterr().out
    assert printed.startswith("wrote ")
    assert "calibration.json" in printed
    found = DiT.from_pretrained(denoiser).calibration
    assert json.loads((tmp_path / "found.json").read_text())["calibration"]["trust"] == found.trust
    again = Calibration.measure(DiT.from_pretrained(denoiser), (load_digits("train")[0][:8] * 255).round() / 255)
    assert found.typical[0] == pytest.approx(again.typical[0], abs=1e-3)
    assert found.trust > 0.5
    assert found.typical[:6] == pytest.approx(again.typical[:6], rel=0.02)
    for arguments, message in (
        (["calibrate", str(denoiser), str(tmp_path / "nowhere")], "is not a folder"),
        (["calibrate", str(denoiser), str(denoiser / "scheduler")], "holds no file"),
        (["calibrate", "some/hub-id", str(images)], "--out FILE"),
        (["calibrate", str(denoiser), str(images), "--most", "0"], "most is 0; give 1 or more"),
        (["calibrate", str(denoiser), str(images), "--device", "moon"], "device is 'moon'"),
        (["calibrate", str(denoiser), str(images), "--classes", "a, b"], "has classes of its own: leave --classes out"),
        (["calibrate", str(zoo.folder("open_vocabulary") / "diffusion"), str(images), "--out", str(tmp_path / "c.json")], "give --classes"),
    ):
        test_bad_input_is_one_line_and_status_2(capsys, arguments, message)
    (images / "00.png").write_bytes(b"no image")
    test_bad_input_is_one_line_and_status_2(capsys, ["calibrate", str(denoiser), str(images)], "00.png cannot be read as an image")


@pytest.mark.quick
def test_env_names_versions_and_backends(tmp_path, capsys):
    main(["env", "--json", str(tmp_path / "env.json")])
    found = json.loads((tmp_path / "env.json").read_text())
    assert found["native library"] == "built"
    printed = capsys.readouterr().out
    for key in ("torch", "diffusers", "timm", "ops on cpu", "ops on cuda"):
        assert f"{key} " in printed
        assert found[key] in printed


@pytest.mark.quick
def test_installed_command():
    environment = {**os.environ, "COLUMNS": "100"}
    shown = subprocess.run([DTTA, "--help"], capture_output=True, text=True, check=True, env=environment).stdout
    assert "Begin with: dtta demo." in shown
    assert "env" in shown
    assert shown.count("\n") <= 40  # a screen


def _help(capsys, name: str) -> str:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    return capsys.readouterr().out


@pytest.mark.quick
@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_help_text(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "160")
    name = command.__name__.lower()
    shown = _help(capsys, name)
    box, entries = "", []
    for line in shown.replace("│", " ").splitlines():  # a box, or without lines where the output is not a terminal's
        title = re.match(r"(?:╭─)? ([\w. -]+?) *─*╮?$", line)
        if title and not line.startswith("  "):
            box = title[1]
        elif re.match(r"  --?\w", line) or ("positional" in box and re.match(r"  [^\s─]", line)):
            entries.append(line.strip())
        elif entries and line.startswith("    "):
            entries[-1] += f"  {line.strip()}"
    assert len(entries) == len({entry.split()[0] for entry in entries}) >= 2
    for entry in entries:
        texts = " ".join(re.split(r"\s{2,}", entry)[1:])
        assert re.search(r"[A-Za-z]{3,}", re.sub(r"\((default|required)[^)]*\)", "", texts)), entry
    example = next(line for line in shown.splitlines() if line.startswith("Example: dtta "))
    assert example.split()[2] == name
    for flag in re.findall(r" (--[a-z-]+)", example):
        assert any(flag in entry for entry in entries), flag


@pytest.mark.quick
def test_of_a_flag_given_twice_the_last_counts():
    assert option(["demo", "--preset", "FAST", "--preset=DUSA"], "--preset") == "DUSA"
    assert option(["demo", "--preset=DUSA", "--preset", "FAST", "--steps"], "--preset") == "FAST"
    assert option(["demo"], "--preset") is None


@pytest.mark.quick
def test_depth_is_shown_in_its_own_units(capsys):
    record = {"seconds": 1.0, "evaluations": 4, "score_before": {"rmse": 0.5, "delta1": 0.5}, "score": {"rmse": 0.25, "delta1": 0.75}}
    running = Running(lambda: None)
    running.add([record])
    assert str(running) == "rmse 0.5000 -> 0.2500 m, delta1 50.0 -> 75.0 %, 1.000 s/image"
    scores = {name: {"before": record["score_before"][name], "after": record["score"][name], "gain": 0.0} for name in record["score"]}
    figures = {"images": 1, "errors": 0, **scores, "evaluations_per_image": 4.0, "seconds_per_image": 1.0}
    _print_summary({**figures, "groups": {"clean": figures}}, Path("run"))
    printed = " ".join(capsys.readouterr().out.split())
    assert "0.2500" in printed
    assert "25.0" not in printed
    row = {when: {"abs_rel": 0.25, "ssim": 0.5} for when in ("source", "adapted")} | {
        "evaluations_per_image": 1.0,
        "seconds_per_image": 1.0,
    }
    result = {"task": "depth", "images": 1, "preset": "DENSE", "corruptions": {"fog": {**row, "severity": 3}}, "clean": row, **row}
    _print_dense({**result, "gain_interval": [-0.01, 0.02]})
    printed = capsys.readouterr().out
    assert "0.2500" in printed
    assert "%" not in printed.replace("(95 %", "")
    assert "abs_rel: mean change −0.0100 .. +0.0200 (95 % over scenes); less is better." in printed


def test_adapt_takes_a_classifier_and_a_dit(tmp_path, capsys):
    images, labels = load_digits("validation")
    for i in range(2):
        to_pil_image(images[i]).save(tmp_path / f"{i}.png")
    paths, found = [str(tmp_path / f"{i}.png") for i in range(2)], tmp_path / "found.json"
    main(["adapt", *paths, "--precheck", "off", "--json", str(found)])
    printed, by_default = capsys.readouterr().out, json.loads(found.read_text())
    digits = zoo.folder("digits")
    own = ["--model", str(digits / "classifier"), "--denoiser", str(digits / "denoiser"), "--precheck", "off"]
    main(["adapt", *paths, *own, "--json", str(found)])
    capsys.readouterr()
    for row, again, label in zip(by_default["images"], json.loads(found.read_text())["images"], labels, strict=False):
        assert row["path"] in "".join(printed.split())
        assert list(row["after"]) == [str(k) for k in range(10)]
        assert max(row["after"], key=row["after"].__getitem__) == str(int(label))
        assert sum(row["before"].values()) == pytest.approx(1, abs=1e-5)
        assert row["evaluations"] >= presets.FAST.pairs
        assert again["after"] == row["after"]
    diffusion = str(zoo.folder("open_vocabulary") / "diffusion")
    for arguments, message in (
        (own[:2], "give your own --denoiser too"),
        ([*own[:2], "--denoiser", diffusion], "which takes prompts"),
        (["--model", "no_such_model", *own[2:4]], "model is 'no_such_model', which timm cannot load"),
        (["--calibration", paths[0]], "is not a calibration"),
    ):
        test_bad_input_is_one_line_and_status_2(capsys, ["adapt", *paths, *arguments], message)
    test_bad_input_is_one_line_and_status_2(capsys, ["adapt"], "images are missing")


def test_classes_bear_the_names_that_a_model_knows():
    model = timm.create_model("resnet18")
    names = class_names(model, 1000)
    assert names[0] == "tench, Tinca tinca"
    assert len(set(names)) == 1000  # "crane" is two classes
    assert {"crane (134)", "crane (517)"} <= set(names)
    assert class_names(timm.create_model("resnet18", num_classes=3), 3) == ["0", "1", "2"]
    own = {"label_names": ["n1", "n2"], "label_descriptions": {"n1": "a cat"}}
    assert class_names(timm.create_model("resnet18", num_classes=2, pretrained_cfg_overlay=own), 2) == ["a cat", "n2"]


@pytest.mark.slow
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


def test_adapt_command_reads_no_calibration_where_another_is_given(tmp_path):
    image, folder, own = tmp_path / "0.png", tmp_path / "diffusion", zoo.folder("open_vocabulary") / "diffusion"
    to_pil_image(load_digits("validation")[0][0]).save(image)
    shutil.copytree(own, folder)
    (folder / "calibration.json").write_text("damaged")
    main(["adapt", str(image), "--classes", "five, one", "--denoiser", str(folder), "--calibration", str(own / "calibration.json")])


def test_adapt_takes_files_folders_and_names_from_stdin(tmp_path, monkeypatch, capsys):
    images, _ = load_digits("validation")
    (tmp_path / "set" / "inner").mkdir(parents=True)
    paths = [tmp_path / "set" / "a.png", tmp_path / "set" / "inner" / "b.png"]
    for path, image in zip(paths, images[:2], strict=True):
        to_pil_image(image).save(path)
    quick = ["--steps", "1", "--pairs", "1", "--guard", "4"]

    def rows(*arguments: str) -> list[dict]:
        out = tmp_path / "found.json"
        out.unlink(missing_ok=True)
        main(["adapt", *arguments, *quick, "--json", str(out)])
        return [{key: row[key] for key in ("path", "before", "after")} for row in json.loads(out.read_text())["images"]]

    wanted = rows(*map(str, paths))
    assert [row["path"] for row in wanted] == [str(path) for path in paths]
    assert rows(str(tmp_path / "set")) == wanted
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(map(str, paths)) + "\n\n"))
    assert rows("-") == wanted
    capsys.readouterr()
    (tmp_path / "empty").mkdir()
    test_bad_input_is_one_line_and_status_2(capsys, ["adapt", str(tmp_path / "empty")], "empty is a folder without images")
    test_bad_input_is_one_line_and_status_2(capsys, ["adapt", str(paths[0]), str(tmp_path / "no.png")], "no.png does not exist")


@pytest.mark.parametrize(("arguments", "status"), [(["evaluate", "--help"], 141), (["env"], 141)])
def test_a_reader_that_has_seen_enough_is_no_error(arguments, status):
    with subprocess.Popen([DTTA, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == status


def test_demo_writes_the_report_of_its_run(tmp_path, capsys):
    page, result = tmp_path / "demo.html", tmp_path / "demo.json"
    for _ in range(2):  # a page of an earlier run may be replaced
        main(["demo", "--images", "3", "--html", str(page), "--json", str(result)])
    assert f"{page}: the images that changed most" in capsys.readouterr().out.replace("\n", "")
    text, found = page.read_text(), json.loads(result.read_text())
    row = text[text.index("Accuracy after") :]
    assert f"{100 * found['adapted_accuracy']:.1f}" in row[: row.index("</tr>")]
    assert text.count("data:image/png;base64") >= 1
    assert all(name in text for name in found["corruptions"])
