"""Runs over data sets: what is recorded, and that nothing is lost, done twice or left out, whenever a run ends."""

from __future__ import annotations

import dataclasses
import importlib
import json
import multiprocessing
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from dtta_fast import Adapter, presets, zoo
from dtta_fast.runs.config import RunConfig
from dtta_fast.runs.evaluate import evaluate
from dtta_fast.runs.folder import RunFolder, read_records
from dtta_fast.runs.streams import batches_of
from dtta_fast.runs.worker import open_data
from dtta_fast.tasks import Classification

DTTA = Path(sys.executable).with_name("dtta")
SMALL = presets.FAST.replace(steps=1, guard=4, precheck="off")
evaluate_module = importlib.import_module("dtta_fast.runs.evaluate")
worker_module = importlib.import_module("dtta_fast.runs.worker")
RUN = RunConfig(corruptions=("contrast", "brightness"), per_class=1, batch=4, adapt=SMALL)
FLAT = {"corruptions": ["contrast", "brightness"], "per_class": 1, "adapt": {"steps": 1, "guard": 4, "precheck": "off"}}
ONLINE = RunConfig(corruptions=("contrast", "brightness"), per_class=1, batch=4, protocol="online", adapt=presets.ONLINE)


def records(folder: Path) -> list[dict]:
    """Without the seconds, which no two runs share."""
    return [{key: value for key, value in record.items() if key != "seconds"} for record in read_records(folder / "records.jsonl")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    evaluate(RUN, folder)
    return folder


@pytest.fixture(scope="module")
def finished_online(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "online"
    evaluate(ONLINE, folder)
    return folder


def test_records_are_what_an_adapter_gives(finished):
    data, found = open_data(RUN), records(finished)
    assert [record["group"] for record in found] == ["contrast3"] * 10 + ["brightness5"] * 10
    assert sorted(record["label"] for record in found[:10]) == list(range(10))
    assert [data.names[record["image_id"]] for record in found] == [record["path"] for record in found]
    part = [record for record in found if record["batch"] == 1]
    images = torch.stack([data.read(record["image_id"]) for record in part])
    adapter = Adapter(*zoo.load("digits"), SMALL)
    result = adapter.adapt(images, image_ids=torch.tensor([record["image_id"] for record in part]))
    assert [record["prediction"] for record in part] == result.predictions.tolist()
    assert [record["prediction_before"] for record in part] == result.predictions_before.tolist()
    assert [record["evaluations"] for record in part] == result.evaluations.tolist()
    assert [record["accepted"] for record in part] == result.accepted.tolist()
    torch.testing.assert_close(torch.tensor([record["loss"] for record in part]), result.loss, rtol=1e-4, atol=1e-6)
    best = result.outputs.softmax(1).max(1).values
    torch.testing.assert_close(torch.tensor([record["confidence"] for record in part]), best, rtol=1e-4, atol=1e-5)
    assert all(record["top"][0] == [record["prediction"], record["confidence"]] and len(record["top"]) == 5 for record in part)


def test_the_summary_adds_up(finished):
    found, whole = records(finished), json.loads((finished / "summary.json").read_text())
    right = [record["prediction"] == record["label"] for record in found]
    assert whole["accuracy"] == pytest.approx(sum(right) / 20)
    assert whole["groups"]["brightness5"]["accuracy"] == pytest.approx(sum(right[10:]) / 10)
    assert whole["evaluations_per_image"] == pytest.approx(sum(record["evaluations"] for record in found) / 20)
    assert whole["interval"][0] <= whole["accuracy"] <= whole["interval"][1]
    assert RunConfig.from_description(whole["config"]) == RUN
    assert whole["environment"]["torch"] in torch.__version__
    assert {"start", "load", "encode", "adapt", "guard", "write"} <= set(whole["seconds"])


@pytest.mark.slow
def test_20_kills_at_random_points_leave_the_records_of_one_run(finished, tmp_path):
    """Processes that are killed without a word; each goes on in the folder of the last one, which was reading, adapting or writing.

    Every second one is killed at a random time, the others soon after they have written; one that was faster has ended its run.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dtta_fast.runs.evaluate", "timm", "sklearn.datasets", "imagecorruptions", "dtta_fast.denoisers.dit"])
    draw, kills, rounds, lost = random.Random(0), 0, 0, 0
    folder = tmp_path / "0"
    for name in ("first", "timed"):  # the first one waits for the imports of the process that all are forked from
        start = time.perf_counter()
        whole = context.Process(target=evaluate, args=(RUN, tmp_path / name))
        whole.start()
        whole.join()
        takes = time.perf_counter() - start
        assert whole.exitcode == 0
    while kills < 20:
        process = context.Process(target=evaluate, args=(RUN, folder))
        process.start()
        path = folder / "records.jsonl"
        if kills % 2:
            process.join(draw.uniform(0.05, 0.95) * takes)
        else:
            held = path.stat().st_size if path.is_file() else 0
            while process.is_alive() and not (path.is_file() and path.stat().st_size > held):
                time.sleep(0.002)
            process.join(draw.uniform(0, 0.2) * takes)
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            kills += 1
            lost += path.is_file() and path.stat().st_size > 0 and not (folder / "summary.json").is_file()
        else:
            assert process.exitcode == 0
            assert records(folder) == records(finished)
            rounds += 1
            folder = tmp_path / str(rounds)
    evaluate(RUN, folder)
    assert records(folder) == records(finished)
    assert lost > 3  # some of them had begun to write


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.6, 0.99])
def test_a_file_cut_anywhere_goes_on_to_the_same_records(finished, tmp_path, keep):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "summary.json").unlink()
    text = (finished / "records.jsonl").read_bytes()
    (folder / "records.jsonl").write_bytes(text[: int(keep * len(text))])
    done: list[int] = []
    evaluate(RUN, folder, advance=lambda some: done.extend(record["image_id"] for record in some))
    assert records(folder) == records(finished)
    assert done == [record["image_id"] for record in records(finished)]


def test_only_whole_batches_count(tmp_path):
    """Every cut of the file's last batch gives the batches before it, and none of its lines."""
    batches = [[3, 4], [5, 6]]
    data = SimpleNamespace(names=["ü"] * 7, groups=["a"] * 7)
    of_image = {"path": "ü", "group": "a", "label": None, "error": "it is torn"}
    lines = [{"image_id": i, "batch": number, **of_image} for number, ids in enumerate(batches) for i in ids]
    with RunFolder(tmp_path / "run", {"a": 1}, batches, data) as folder:
        folder.append(0, lines[:2])
        folder.append(1, lines[2:])
    path = tmp_path / "run" / "records.jsonl"
    text = path.read_bytes()
    second = text.index(b"\n", text.index(b"\n") + 1) + 1
    for cut in range(second, len(text)):
        path.write_bytes(text[:cut])
        with RunFolder(tmp_path / "run", {"a": 1}, batches, data) as folder:
            assert folder.remaining() == [1]
            assert path.read_bytes() == text[:cut]
            folder.append(1, lines[2:])
        assert path.read_bytes() == text


class Stop(Exception):
    pass


@pytest.mark.parametrize("lines_lost", [0, 1, 4])
def test_an_online_run_goes_on_with_its_state(finished_online, tmp_path, lines_lost):
    """Also where the state of a batch was written and its records were not."""
    folder, seen = tmp_path / "run", []

    def advance(some):
        seen.append(some)
        if len(seen) == 2:
            raise Stop

    with pytest.raises(Stop):
        evaluate(ONLINE, folder, advance=advance)
    lines = (folder / "records.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 8
    (folder / "records.jsonl").write_bytes(b"".join(lines[: 8 - lines_lost]))
    evaluate(ONLINE, folder)
    assert records(folder) == records(finished_online)
    assert [path.name for path in sorted(folder.glob("state-*"))] == ["state-00000004.safetensors", "state-00000005.safetensors"]


@pytest.mark.parametrize("batch", [4, 5])
def test_images_are_added_to_an_online_run_that_has_ended(tmp_path, batch):
    """To its last batch, or in one of their own; what comes is what a run of all of them gives."""
    data, root = open_data(RUN), tmp_path / "data"
    for k in range(11):
        (root / str(k % 10)).mkdir(parents=True, exist_ok=True)
        if k < 10:
            Image.fromarray(data[k].permute(1, 2, 0).numpy()).save(root / str(k) / "a.png")
    run = dataclasses.replace(ONLINE, data="folder", root=str(root), corruptions=(), per_class=None, batch=batch)
    evaluate(run, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    shutil.copy(root / "0" / "a.png", root / "9" / "b.png")
    held = (root / "0" / "a.png").read_bytes()
    Image.new("RGB", (32, 32), 9).save(root / "0" / "a.png")
    with pytest.raises(ValueError, match="has other pixels now"):
        evaluate(run, tmp_path / "run")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    (root / "0" / "a.png").write_bytes(held)
    assert evaluate(run, tmp_path / "run")["images"] == 11
    evaluate(run, tmp_path / "whole")
    assert records(tmp_path / "run") == records(tmp_path / "whole")


@pytest.mark.parametrize(("rank", "world", "name"), [("0", "0", "RANK"), ("x", "1", "RANK"), ("0", "-1", "WORLD_SIZE"), ("", "", "RANK")])
def test_variables_of_torchrun_that_make_no_sense_are_named(tmp_path, monkeypatch, rank, world, name):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ValueError, match=rf"^{name} of the environment is "):
        evaluate(RUN, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_online_run_does_not_go_on_from_a_damaged_state(tmp_path):
    folder = tmp_path / "run"

    def advance(some):
        raise Stop

    with pytest.raises(Stop):
        evaluate(ONLINE, folder, advance=advance)
    path = folder / "state-00000000.safetensors"
    held = path.read_bytes()
    path.write_bytes(held[: len(held) // 2] + bytes(400_000) + held[len(held) // 2 + 400_000 :])
    before = (folder / "records.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"state-00000000.safetensors, the state after batch 0, cannot be read: its checksum"):
        evaluate(ONLINE, folder)
    assert (folder / "records.jsonl").read_bytes() == before


def test_what_an_online_run_has_learnt_goes_on_as_its_protocol_says(finished_online, tmp_path):
    """online begins each corruption anew, continual does not."""
    continual = evaluate(RunConfig.from_description({**ONLINE.described(), "protocol": "continual"}), tmp_path / "run")
    assert continual["config"]["protocol"] == "continual"
    first, second = (records(folder) for folder in (finished_online, tmp_path / "run"))
    assert first[:10] == second[:10]
    assert [record["loss"] for record in first[10:]] != [record["loss"] for record in second[10:]]
    data, adapter = open_data(ONLINE), Adapter(*zoo.load("digits"), ONLINE.adapt)
    ids = [record["image_id"] for record in first[10:14]]
    result = adapter.adapt(torch.stack([data.read(i) for i in ids]), image_ids=torch.tensor(ids))
    torch.testing.assert_close(torch.tensor([record["loss"] for record in first[10:14]]), result.loss, rtol=1e-4, atol=1e-6)


def test_what_is_no_number_is_told_and_the_run_goes_on(monkeypatch, tmp_path):
    """A model that fails on one image: its record says so, the others are what they were."""
    load = worker_module.load_models

    def damaged(*arguments):
        found = load(*arguments)
        found.model.register_forward_hook(lambda _, inputs, outputs: outputs.where(inputs[0].mean((1, 2, 3))[:, None] < darkest, torch.nan))
        return found

    data = open_data(RUN)
    means = sorted(float((data.read(i).float() / 255 * 2 - 1).mean()) for i in [i for batch in batches_of(RUN, data)[:3] for i in batch])
    darkest = (means[-1] + means[-2]) / 2
    monkeypatch.setattr(worker_module, "load_models", damaged)
    run = RunConfig.from_description({**RUN.described(), "data": {**RUN.described()["data"], "corruptions": ["contrast"]}})
    run = dataclasses.replace(run, adapt=presets.FAST.replace(steps=1, guard=0, guard_threshold=0.0, precheck="off", match="off"))
    found = evaluate(run, tmp_path / "run")
    assert [record["error"] for record in records(tmp_path / "run") if "error" in record] == ["the model's outputs for it are not finite"]
    assert (found["images"], found["errors"]) == (10, 1)


def test_records_of_another_config_are_refused(finished):
    before = (finished / "records.jsonl").read_bytes()
    other = RunConfig.from_description({**RUN.described(), "batch": 5, "adapt": {**RUN.described()["adapt"], "lr": 0.1}})
    with pytest.raises(ValueError, match=r"another config: adapt.lr: 0.0005 / 0.1; batch: 4 / 5"):
        evaluate(other, finished)
    assert (finished / "records.jsonl").read_bytes() == before


def test_two_runs_into_one_folder(finished):
    data = open_data(RUN)
    with (
        RunFolder(finished, RUN.described(), batches_of(RUN, data), data),
        pytest.raises(ValueError, match="is being written to by another run"),
    ):
        evaluate(RUN, finished)


def test_a_damaged_line_is_named(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    lines = (folder / "records.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "records.jsonl").write_bytes(b"".join([*lines[:3], b"{broken\n", *lines[3:]]))
    with pytest.raises(ValueError, match=r"records.jsonl, line 4, is not a record"):
        evaluate(RUN, folder)
    (folder / "records.jsonl").write_bytes(b"".join(lines).replace(b'"accepted": true', b'"accepted": 1', 1))
    with pytest.raises(ValueError, match=r"records.jsonl, line \d+, is not a record: accepted is '1': Expected `bool`"):
        evaluate(RUN, folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is damaged"):
        evaluate(RUN, folder)


@pytest.mark.slow
def test_a_full_disk_loses_nothing(finished, tmp_path):
    """The kernel refuses to let a file grow over a size: what was written stands, and the run goes on where there is room again."""
    folder, settings = tmp_path / "run", tmp_path / "run.yaml"
    size = (finished / "records.jsonl").stat().st_size // 2
    settings.write_text(json.dumps({**FLAT, "batch": 4}))  # JSON is YAML
    command = [DTTA, "evaluate", str(folder), "--settings", str(settings)]
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    )
    assert ended.returncode == 2
    assert "records.jsonl cannot be written: File too large; its" in ended.stderr
    kept = records(folder)
    assert kept == records(finished)[: len(kept)]
    assert 0 < len(kept) < 20
    assert len(kept) % 4 in (0, 2)
    evaluate(RUN, folder)
    assert records(folder) == records(finished)


class Other:
    """A data set, changed: pixels of one image, or another of its lists."""

    def __init__(self, data, **changes):
        self._data, self._changes = data, changes

    def __getattr__(self, name):
        return self._changes[name] if name in self._changes else getattr(self._data, name)

    def __len__(self):
        return len(self._data)

    def __getitem__(self, i):
        return 255 - self._data[i] if i == self._changes.get("dark") else self._data[i]


def test_a_data_set_that_has_changed_loses_no_records(finished, monkeypatch):
    before, data = (finished / "records.jsonl").read_bytes(), open_data(RUN)
    i = records(finished)[7]["image_id"]
    for change, message in (
        ({"dark": i}, rf"image {i}, 'contrast/3#{i}', has other pixels now; .* restore the data set, or name another folder"),
        ({"labels": [9 - label for label in data.labels]}, r"records.jsonl, line 1: label is \d for image \d+, and \d in the data set"),
        ({"names": [f"{i}.png" for i in range(len(data))]}, r"line 1, holds image \d+ in batch 0, where the data set has|path is"),
        ({"groups": ["fog1"] * len(data)}, r"where the data set has \[\d+, \d+, \d+, \d+\]|group is"),
    ):
        monkeypatch.setattr(evaluate_module, "open_data", lambda run, change=change: Other(data, **change))
        with pytest.raises(ValueError, match=message):
            evaluate(RUN, finished)
        assert (finished / "records.jsonl").read_bytes() == before


def test_a_finished_run_is_told_again_from_its_records(finished, tmp_path):
    """What somebody wrote over the summary's figures is not believed, and what is not a summary is named."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    whole = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**whole, "accuracy": 0.99}))
    found = evaluate(RUN, folder)
    assert found == whole
    (folder / "summary.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"summary.json is damaged: Object missing required field `images`"):
        evaluate(RUN, folder)
    assert (folder / "summary.json").read_text() == '{"a": 1}'


def test_beginning_again_loses_nothing_to_a_wrong_model(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="model is 'no_such_model'"):
        evaluate(dataclasses.replace(RUN, model="no_such_model"), folder, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    other = dataclasses.replace(RUN, corruptions=("contrast",))
    assert evaluate(other, folder, overwrite=True)["images"] == 10
    assert records(folder) == records(finished)[:10]


def test_several_processes_do_not_begin_again(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="overwrite is True with 2 processes"):
        evaluate(RUN, tmp_path / "run", overwrite=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "depth"}, "they do not go together"),
        ({"data": "map-folder", "root": "."}, "they do not go together"),
        ({"data": "no-such-set"}, "name is 'no-such-set'"),
        ({"model": "no_such_model"}, "model is 'no_such_model'"),
        ({"corruptions": ("rain",)}, "rain"),
    ],
)
def test_bad_settings_leave_nothing_behind(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        evaluate(RunConfig(**{"corruptions": ("contrast",), "per_class": 1, "adapt": SMALL, **change}), tmp_path / "run")
    left = [*(tmp_path / "run").iterdir()] if (tmp_path / "run").exists() else []
    assert not [path for path in left if path.stat().st_size]  # an empty lock at most: nothing that stands in the way


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"protocol": "online"},
            r"mode is 'episodic' with protocol 'online', which takes 'online': set protocol to episodic, and leave mode out",
        ),
        ({"adapt": presets.ONLINE}, r"set protocol to online, or continual"),
        ({"task": "zero_shot", "classes": ("cat, dog",)}, r"classes has 'cat, dog', with a comma in it: give each class an argument"),
        ({"batch": 0}, "batch is 0"),
        ({"per_class": 0}, "per_class is 0"),
        ({"task": "captioning"}, "task is 'captioning'; allowed: classification"),
        ({"corruptions": "brightness"}, "corruptions is 'brightness'; allowed: a list"),
        ({"root": "x" * 300}, r"root is 'x{40}'..., which has a part of 300 bytes; give a path of up to 255 bytes between slashes"),
        ({"model": "hf-hub:a/" + "ü" * 200}, r"model is 'hf-hub:a/ü+'..., which has a part of 400 bytes"),
        ({"denoiser": "/".join(["x" * 200] * 30)}, r"denoiser is 'x+'..., which has 6029 bytes"),
        ({"calibration": "a\0b"}, r"calibration is 'a\\x00b', which has a zero byte in it"),
    ],
)
def test_a_wrong_setting_names_itself(change, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(**change)


def test_where_a_run_cannot_write(tmp_path):
    (tmp_path / "file").touch()
    for wrong in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="where a file is in the way"):
            evaluate(RUN, wrong)
    with pytest.raises(ValueError, match=r"protocol is 'online' with several workers, and its state goes"):
        evaluate(ONLINE, tmp_path / "run", scale="ray")
    with pytest.raises(ValueError, match="scale is 'slurm'; allowed: none, ray"):
        evaluate(RUN, tmp_path / "run", scale="slurm")


def test_classes_that_are_not_the_model_s_are_refused(tmp_path):
    for k in range(3):
        (tmp_path / "data" / str(7 + k)).mkdir(parents=True)
        Image.new("RGB", (32, 32), (80 * k, 0, 0)).save(tmp_path / "data" / str(7 + k) / "0.png")
    run = RunConfig(data="folder", root=str(tmp_path / "data"), adapt=SMALL)
    with pytest.raises(ValueError, match="the data set has 3 classes and the model 10"):
        evaluate(run, tmp_path / "run")
    with pytest.raises(ValueError, match="classes names 2, and the data set has 3"):
        evaluate(dataclasses.replace(run, task="zero_shot", classes=("a", "b")), tmp_path / "other")


def test_outputs_that_mean_one_class_add_up():
    """As ObjectNet's: outputs 4 and 2 are class 0, output 7 is class 1; the others cannot occur."""
    worker = object.__new__(evaluate_module.Worker)
    worker._class_of, worker.data, worker._task = {4: 0, 7: 1, 2: 0}, SimpleNamespace(classes=("a", "b")), Classification(subset=[2, 4, 7])
    logits = torch.tensor([[9.0, 9, 1, 9, 1, 9, 9, 1.5, 9, 9]])
    found = worker._classes(SimpleNamespace(outputs=logits, outputs_before=-logits))[0]
    shares = torch.tensor([1.0, 1.0, 1.5]).softmax(0)
    assert found["prediction"] == 0
    assert found["top"] == [[0, pytest.approx(float(shares[:2].sum()), rel=1e-5)], [1, pytest.approx(float(shares[2]), rel=1e-5)]]
