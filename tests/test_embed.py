"""The digits package, compiled: in Python and in a C++ host it gives what the engine gives, and refuses what does not fit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from dtta_fast import AdaptConfig, Adapter, embed, presets, zoo
from dtta_fast.commands import subjects
from dtta_fast.commands.cli import main
from dtta_fast.data.corruptions import DIGITS_C, corrupt
from dtta_fast.denoisers.dit import DiT
from dtta_fast.embed.manifest import KEEPER

ROOT = Path(__file__).parents[1]
COUNT = 40  # images: some are left alone, some adapted, some guarded


def shortened():
    """The digits zoo with a block for each of the two: compiling takes as long as the blocks are many, and each is compiled alike."""
    model, denoiser = zoo.load("digits")
    for stage in model.stages[1:]:
        stage.blocks = nn.Identity()
    denoiser.network.blocks = denoiser.network.blocks[:1]
    denoiser.network.sizes["depth"] = 1
    return model, denoiser


@pytest.fixture(scope="module")
def digits():
    clean, _ = zoo.example("digits")
    kinds = list(DIGITS_C.items())
    return torch.cat([corrupt(clean[i : i + 1], *kinds[i % len(kinds)], first_id=i) for i in range(COUNT)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("package")


@pytest.fixture(scope="module")
def package(folder):
    """Written by the command: FAST, batches of one."""
    path, pair = folder / "digits.pt2", shortened()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subjects, "load_pair", lambda model, denoiser: pair)
        main(["export", str(path), "--measured", "8", "--json", str(folder / "manifest.json")])
    return path


@pytest.fixture(scope="module")
def expected(digits):
    adapter = Adapter(*shortened(), presets.FAST)
    return [adapter.adapt(digits[i : i + 1], image_ids=torch.tensor([i])) for i in range(COUNT)]


@pytest.fixture(scope="module")
def measure(folder):
    """The C++ host of bench/embed."""
    build = folder / "build"
    given = [f"-DPython3_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Debug"]  # without optimization it compiles faster
    subprocess.run(["cmake", "-S", str(ROOT / "bench" / "embed"), "-B", str(build), *given], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", str(build)], check=True, capture_output=True)
    return build / "measure"


@pytest.fixture(scope="module")
def images(folder, digits):
    path = folder / "images.f32"
    digits.numpy().tofile(path)
    return path


@pytest.mark.slow
def test_the_images_take_every_way(expected):
    evaluations = {int(result.evaluations) for result in expected}
    assert {0, 12} < evaluations or {0, 60} <= evaluations
    assert any(bool(result.accepted) for result in expected)


@pytest.mark.slow
def test_python_equals_the_engine(package, digits, expected):
    loaded, calls = embed.load(package), []
    plain = loaded._program.run
    loaded._program.run = lambda name, *tensors: calls.append(name) or plain(name, *tensors)
    tolerance = loaded.manifest.tolerance
    assert 0 < tolerance < 0.05
    for i, result in enumerate(expected):
        found = loaded.adapt(digits[i : i + 1], image_ids=torch.tensor([i]))
        for name in ("outputs", "outputs_before", "loss"):
            torch.testing.assert_close(getattr(found, name), getattr(result, name), rtol=0, atol=tolerance, equal_nan=True)
        for name in ("predictions", "predictions_before", "accepted", "evaluations"):
            assert torch.equal(getattr(found, name), getattr(result, name)), (i, name)
        assert calls == calls_of(result, loaded.manifest), i
        calls.clear()


def calls_of(result, manifest):
    """The functions that a package of one image runs for an adapter's result, in order."""
    if not result.evaluations.any():  # the pre-check leaves the image alone
        return ["start", "decide"]
    answers = (int(result.evaluations) - manifest.steps * manifest.evaluations) // manifest.guard
    return ["start", *["step"] * manifest.steps, "finish", *["losses"] * answers, "decide"]


@pytest.mark.slow
def test_cpp_equals_the_engine(package, measure, images, folder, expected):
    """The same answers, by the same calls in the same order as in Python."""
    manifest, traces = embed.load(package).manifest, set()
    tolerance = json.loads((folder / "manifest.json").read_text())["tolerance"]
    run = subprocess.run([measure, "outputs", package, images], check=True, capture_output=True, text=True)
    rows = json.loads(run.stdout)
    assert len(rows) == COUNT
    for i, (row, result) in enumerate(zip(rows, expected, strict=True)):
        for name in ("outputs", "outputs_before", "loss"):
            theirs, ours = torch.tensor(row[name]), getattr(result, name)[0]
            if name == "loss" and not len(theirs):  # left alone: the batch made no step
                assert not bool(result.evaluations)
                continue
            torch.testing.assert_close(theirs, ours, rtol=0, atol=tolerance)
        assert row["predictions"] == result.predictions.tolist(), i
        assert row["evaluations"] == result.evaluations.tolist(), i
        assert row["accepted"] == result.accepted.int().tolist(), i
        assert row["calls"] == calls_of(result, manifest), i
        traces.add(tuple(row["calls"]))
    assert len(traces) >= 3  # left alone, adapted, and guarded


@pytest.mark.slow
def test_cpp_refuses_bad_input_and_lives(package, measure, images):
    run = subprocess.run([measure, "refusals", package, images], check=True, capture_output=True, text=True)
    found = json.loads(run.stdout)
    told = {row["what"]: (row["code"], row["message"]) for row in found["told"]}
    bad_file, misfit, bad_argument = 0, 1, 2
    for what, part in {
        "width": "images is [1, 3, 32, 33]; this package takes [1, 3, 32, 32]",
        "channels": "images is [1, 1, 32, 32]",
        "batch": "images is [2, 3, 32, 32]",
        "null": "without pixels",
        "range": "images holds 200",
        "nan": "images holds",
        "deadline 0": "deadline_ms is 0; give a positive number",
        "deadline -5": "deadline_ms is -5",
        "deadline nan": "deadline_ms is",
        "id": "image_ids holds 4294967296",
        "ids": "image_ids has 2 entries",
    }.items():
        assert told[what][0] == bad_argument, what
        assert part in told[what][1], what
    assert told["weights"][0] == misfit
    assert "0123456789abcdef was expected" in told["weights"][1]
    assert told["missing"][0] == bad_file
    assert told["state"][0] == bad_argument
    assert "this one is episodic" in told["state"][1]
    assert found["alive"]  # four threads got what one got before


@pytest.mark.slow
def test_cpp_under_deadlines(package, measure, folder, digits):
    """One that has passed makes no step and answers as before; a far one makes them all."""
    alone = folder / "one.f32"
    digits[11:12].numpy().tofile(alone)  # one that is adapted
    run = subprocess.run([measure, "deadlines", package, alone, "0.001", "1e9"], check=True, capture_output=True, text=True)
    rows = json.loads(run.stdout)
    assert {row["steps"] for row in rows if row["deadline_ms"] < 1} == {0}
    assert {row["steps"] for row in rows if row["deadline_ms"] > 1} == {presets.FAST.steps}


@pytest.mark.slow
def test_the_documented_commands_build_and_run_the_example_host(package, tmp_path, expected):
    """All of docs/embedding.md's, but for the export, which made this package."""
    assert len((ROOT / "examples" / "cpp" / "main.cpp").read_text().splitlines()) < 100
    block = (ROOT / "docs" / "embedding.md").read_text().split("```sh\n")[1].split("```")[0].splitlines()
    assert block[0] == "dtta export digits.pt2"
    shutil.copy(package, tmp_path / "digits.pt2")
    commands = "\n".join(block[1:]).replace("examples/", f"{ROOT}/examples/")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    run = subprocess.run(["bash", "-ec", commands], check=True, capture_output=True, text=True, cwd=tmp_path, env=environment)
    for i, result in enumerate(expected[:12]):
        before, after = int(result.predictions_before), int(result.predictions)
        assert f"image {i}: class {before} before, {after} after" in run.stdout
    images = tmp_path / "digits.f32"
    build = tmp_path / "host"
    wrong = subprocess.run([build / "host", package, images, "0"], check=False, capture_output=True, text=True)
    assert (wrong.returncode, wrong.stderr.strip()) == (
        2,
        "host: deadline_ms is 0; give a positive number of milliseconds, counted from the call",
    )


@pytest.mark.slow
def test_an_online_package_of_other_models(process, random_network, measure, tmp_path):
    """Two images in a call, no guard, LoRA in the denoiser: a stream in both hosts, and its state taken from call to call."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.GELU(), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 7)).eval()
    denoiser = DiT(random_network(depth=1), process)
    config = AdaptConfig(steps=1, pairs=2, mode="online", optimizer="sgd", lr=0.1, denoiser_parameters="lora", denoiser_lr=0.1, lora_rank=2)
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    path, floats = tmp_path / "online.pt2", tmp_path / "images.f32"
    manifest = embed.export(model, denoiser, (images * 255).to(torch.uint8), path, config=config, batch=2)
    images.numpy().tofile(floats)
    adapter, package = Adapter(model, denoiser, config), embed.load(path)
    run = subprocess.run([measure, "outputs", path, floats], check=True, capture_output=True, text=True)
    for i, row in enumerate(json.loads(run.stdout)):
        part, ids = images[2 * i : 2 * i + 2], torch.arange(2 * i, 2 * i + 2)
        expected, found = adapter.adapt(part, image_ids=ids), package.adapt(part, image_ids=ids)
        for theirs in (found.outputs, torch.tensor(row["outputs"]).reshape(2, -1)):
            torch.testing.assert_close(theirs, expected.outputs, rtol=0, atol=max(manifest.tolerance, 1e-4))
        assert row["evaluations"] == expected.evaluations.tolist() == found.evaluations.tolist() == [2, 2]
        assert row["calls"] == ["start", "step", "finish", "decide"]
    run = subprocess.run([measure, "stream", path, floats], check=True, capture_output=True, text=True)
    told = json.loads(run.stdout)
    assert (told["again"], told["moves"], told["fresh"]) == (1, 1, 1)
    assert "state is not of this package" in told["damaged"]


def changed(package, target, **values):
    """A copy of the package whose manifest says something else."""
    with zipfile.ZipFile(package) as read, zipfile.ZipFile(target, "w") as written:
        for entry in read.infolist():
            content = read.read(entry)
            if f"/{KEEPER}/" in entry.filename and entry.filename.endswith("_metadata.json"):
                content = json.dumps({**json.loads(content), **values}).encode()
            written.writestr(entry.filename.replace(Path(entry.filename).parts[0], Path(target).stem, 1), content)
    return target


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"torch": "2.9.0"}, r"compiled by torch 2\.9\.0, and this is"),
        ({"device": "cuda"}, "it is for device 'cuda'"),
        ({"instructions": "sse2 avx2048f"}, "its code may take avx2048f, which this processor does not have"),
        ({"capability": "AVX2048"}, "its code takes AVX2048, and this processor has"),
        ({"format": "0"}, "is of format 0, and this version reads 2"),
        ({"steps": "many"}, "has a damaged manifest"),
    ],
)
def test_packages_that_do_not_fit_here(package, measure, images, tmp_path, values, message):
    """Refused by both hosts, before any of their code is loaded."""
    other = changed(package, tmp_path / "other.pt2", **values)
    with pytest.raises(ValueError, match=message):
        embed.load(other)
    run = subprocess.run([measure, "outputs", other, images], check=False, capture_output=True, text=True)
    assert run.returncode == 2
    assert "format '0'" in run.stderr or message.split(",")[0].replace("\\", "") in run.stderr


@pytest.mark.slow
def test_packages_of_other_adapters(package):
    model, denoiser = shortened()
    embed.load(package, Adapter(model, denoiser, presets.FAST.replace(compile="off", memory_budget=10**9)))
    with pytest.raises(ValueError, match="steps is 3 in it, and 4 in the adapter"):
        embed.load(package, Adapter(model, denoiser, presets.FAST.replace(steps=4)))
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-6
    with pytest.raises(ValueError, match="its weights have fingerprint"):
        embed.load(package, Adapter(model, denoiser, presets.FAST))


@pytest.mark.slow
def test_files_that_are_no_packages(package, measure, images, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        embed.load(tmp_path / "none.pt2")
    cut = tmp_path / "cut.pt2"
    cut.write_bytes(package.read_bytes()[: package.stat().st_size // 2])
    empty, words = tmp_path / "empty.pt2", tmp_path / "words.pt2"
    empty.touch()
    words.write_text("no archive")
    other = tmp_path / "other_archive.pt2"
    with zipfile.ZipFile(other, "w") as written:
        written.writestr("other_archive/archive_format", "pt2")
    for path in (cut, empty, words, other):
        with pytest.raises(ValueError, match="is not a package of an adaptation"):
            embed.load(path)
        run = subprocess.run([measure, "outputs", path, images], check=False, capture_output=True, text=True)
        assert (run.returncode, "is not a package of an adaptation" in run.stderr) == (2, True), run.stderr


@pytest.mark.slow
def test_bad_input_in_python(package, digits):
    loaded = embed.load(package)
    first = loaded.adapt(digits[9:10]).outputs
    for images, keywords, message in (
        (digits[:2], {}, r"images has shape \(2, 3, 32, 32\); this package takes \[1, 3, 32, 32\]"),
        (digits[:1, :, :31], {}, "this package takes"),
        (digits[:1] * 300, {}, "images has values from"),
        (digits[:1], {"deadline_ms": 0}, "deadline_ms is 0; give a positive number"),
        (digits[:1], {"image_ids": torch.tensor([-1])}, "image_ids"),
    ):
        with pytest.raises(ValueError, match=message):
            loaded.adapt(images, **keywords)
    torch.testing.assert_close(loaded.adapt(digits[9:10]).outputs, first, rtol=0, atol=loaded.manifest.tolerance)


class Undecided(nn.Module):
    """Looks at a value to decide what to do, which no graph can."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x) if float(x.mean()) > -100 else self.model(-x)


@pytest.mark.slow
def test_a_model_that_cannot_be_exported_leaves_nothing_behind(model, denoiser, tmp_path):
    images = torch.rand(2, 3, 16, 16)
    target = tmp_path / "model.pt2"
    target.write_text("an older one")
    config = AdaptConfig(steps=1, pairs=2)
    with pytest.raises(ValueError, match="'start', one of the adaptation's functions, cannot be exported"):
        embed.export(Undecided(model.float()), denoiser.float(), images, target, config=config)
    assert target.read_text() == "an older one"
    assert os.listdir(tmp_path) == ["model.pt2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.onnx"], "path is 'model.onnx'; give a file ending in .pt2"),
        (["m.pt2", "--parameters", "logits", "--precheck", "off"], "parameters is 'logits', which cannot be exported"),
        (["m.pt2", "--batch", "0"], "batch is 0; give a whole number of at least 1"),
        (["m.pt2", "--batch", "4", "--measured", "2"], "measured is 2; give batch = 4 or more"),
        (["m.pt2", "--model", "resnet18"], "model is 'resnet18', and the denoiser is the digits zoo's"),
    ],
)
def test_bad_arguments_of_the_command(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["export", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_host_without_the_package_is_told(tmp_path):
    """Of a Python that has no dtta_fast, CMake says what to give."""
    if shutil.which("cmake") is None:
        pytest.fail("cmake is missing: pip install cmake")
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')
    bare.chmod(0o755)
    command = ["cmake", "-S", str(ROOT / "dtta_fast" / "embed" / "cpp"), "-B", str(tmp_path / "build"), f"-DPython3_EXECUTABLE={bare}"]
    run = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode != 0
    assert "a Python that has dtta_fast" in " ".join(run.stderr.split())
