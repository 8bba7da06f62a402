"""Runs by several processes, and runs from the shell."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from dtta_fast import presets
from dtta_fast.commands.cli import main
from dtta_fast.data.scenes import scenes
from dtta_fast.runs import scale
from dtta_fast.runs.config import RunConfig
from dtta_fast.runs.evaluate import evaluate
from dtta_fast.runs.folder import read_records

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[1]
SMALL = presets.FAST.replace(steps=1, guard=4, precheck="off")
RUN = RunConfig(corruptions=("contrast", "brightness"), per_class=1, batch=4, device="cpu", adapt=SMALL)
FLAT = {"corruptions": ["contrast", "brightness"], "per_class": 1, "batch": 4, "device": "cpu", "steps": 1, "guard": 4, "precheck": "off"}
EXACT = ("image_id", "batch", "path", "group", "label", "prediction", "prediction_before", "accepted", "evaluations")


def assert_same_records(first: Path, second: Path) -> None:
    """Word for word but for the seconds and rounding: matrix products on one thread add up in another order than on two."""
    ours, theirs = (list(read_records(folder / "records.jsonl")) for folder in (first, second))
    assert [[record[key] for key in EXACT] for record in ours] == [[record[key] for key in EXACT] for record in theirs]
    for key in ("loss", "confidence", "confidence_before"):
        values = [torch.tensor([record[key] for record in some], dtype=torch.float64) for some in (ours, theirs)]
        torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "alone"
    evaluate(RUN, folder)
    return folder


@pytest.mark.slow
def test_ray_s_workers_give_the_records_of_one_process(alone, tmp_path):
    """Also where the run was begun by one process: its batches are not done again."""
    folder = tmp_path / "run"
    folder.mkdir()
    lines = (alone / "records.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "records.jsonl").write_bytes(b"".join(lines[:6]))
    (folder / "config.json").write_bytes((alone / "config.json").read_bytes())
    new: list[int] = []
    found = evaluate(RUN, folder, scale="ray", advance=lambda records: new.append(len(records)))
    assert found["images"] == 20
    assert sum(new) == 20
    assert_same_records(folder, alone)
    kept = (folder / "records.jsonl").read_bytes().splitlines(keepends=True)
    assert kept[:4] == lines[:4]  # to the seconds


class Deadly:
    """Ends the process that unpickles it, as an image would that takes all of a worker's memory."""

    def __reduce__(self):
        return os._exit, (1,)


@pytest.mark.slow
def test_a_batch_that_ends_every_worker_ends_the_run(tmp_path, monkeypatch):
    """The error names it, after as many attempts as are made."""
    import ray

    whole = scale.fetch
    monkeypatch.setattr(scale, "fetch", lambda data, number, ids: Deadly() if number == 1 else whole(data, number, ids))
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        with pytest.raises(ray.exceptions.RayError, match=f"batch 1 ended the process that adapted to it {1 + scale.RETRIES} times"):
            evaluate(RUN, tmp_path / "run", scale="ray")
    finally:
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.mark.slow
def test_torchrun_s_processes_share_a_run(alone, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = tmp_path / "run.yaml"
    settings.write_text(json.dumps(FLAT))
    command = [BIN / "torchrun", "--nproc-per-node=2", f"--master-port={port}", "--no-python", BIN / "dtta"]
    command += ["evaluate", tmp_path / "run", "--settings", settings]
    shown = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert shown.returncode == 0, shown.stderr
    assert "error % [brightness5]" in shown.stdout
    assert_same_records(tmp_path / "run", alone)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json", "lock", "records.jsonl", "summary.json"]


@pytest.mark.slow
def test_an_imagenet_c_tree_from_the_shell(tmp_path, capsys):
    """The commands of the documentation, with a broken file in the tree; then the report."""
    subprocess.run([sys.executable, ROOT / "examples" / "imagenet_c_tree.py", tmp_path], check=True, capture_output=True)
    broken = sorted((tmp_path / "imagenet-c" / "fog" / "3").rglob("*.JPEG"))[3]
    broken.write_bytes(broken.read_bytes()[:200])
    arguments = ["evaluate", str(tmp_path / "run"), "--data", "imagenet-c", "--root", str(tmp_path / "imagenet-c")]
    arguments += ["--model", str(tmp_path / "classifier"), "--denoiser", str(tmp_path / "dit"), "--match", "off", "--precheck", "off"]
    arguments += ["--timesteps", "stratified", "--pairs", "2", "--guard", "2", "--batch", "4", "--json", str(tmp_path / "summary.json")]
    main(arguments)
    shown = capsys.readouterr().out
    assert "24 images, 1 failed" in shown
    assert "error % [gaussian_noise5]: " in shown
    found = list(read_records(tmp_path / "run" / "records.jsonl"))
    assert [record["label"] for record in found[:6]] == [0, 0, 7, 7, 999, 999]
    failed = [record for record in found if "error" in record]
    assert [record["path"] for record in failed] == [broken.relative_to(tmp_path / "imagenet-c").as_posix()]
    assert "prediction" not in failed[0]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["images"], summary["errors"]) == (24, 1)
    assert set(summary["groups"]) == {"fog3", "fog5", "gaussian_noise3", "gaussian_noise5"}
    assert len(summary["classes"]) == 1000
    main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "report.html")])
    assert broken.name in (tmp_path / "report.html").read_text()


def test_a_folder_of_maps(tmp_path):
    """Scores of segmentation by the zoo's models, on files that a user would have."""
    made = scenes("test", 3)
    for kind in ("images", "maps"):
        (tmp_path / "data" / kind).mkdir(parents=True)
    (tmp_path / "data" / "classes.txt").write_text("\n".join(["floor", "wall", "sphere", "box", "cylinder", "cone"]))
    for i in range(3):
        Image.fromarray((made.images[i].permute(1, 2, 0) * 255).round().byte().numpy()).save(tmp_path / "data" / "images" / f"{i}.png")
        Image.fromarray(made.labels[i].byte().numpy()).save(tmp_path / "data" / "maps" / f"{i}.png")
    adapt = presets.DENSE.replace(steps=1, guard=2, precheck="off")
    found = evaluate(RunConfig(data="map-folder", root=str(tmp_path / "data"), task="segmentation", batch=2, adapt=adapt), tmp_path / "run")
    records = list(read_records(tmp_path / "run" / "records.jsonl"))
    assert found["mean_iou"]["after"] == pytest.approx(sum(record["score"]["mean_iou"] for record in records) / 3)
    assert 0.2 < found["mean_iou"]["before"] < 1
    assert 4 <= records[0]["evaluations"] <= 4 + 3 * 2


def test_running_figures_reach_tensorboard(alone, tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("records.jsonl", "config.json"):
        (folder / name).write_bytes((alone / name).read_bytes())
    (tmp_path / "run.yaml").write_text(json.dumps(FLAT))
    main(["evaluate", str(folder), "--settings", str(tmp_path / "run.yaml"), "--track", "tensorboard"])
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    last = events.Scalars("accuracy")[-1]
    summary = json.loads((folder / "summary.json").read_text())
    assert (last.step, last.value) == (20, pytest.approx(summary["accuracy"]))
    assert "all" in capsys.readouterr().out


def test_a_tracker_that_is_missing_is_told_before_the_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("dtta_fast.runs.tracking.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["evaluate", str(tmp_path / "run"), "--track", "trackio"])
    assert "pip install 'dtta-fast[trackio]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_running_figures_reach_wandb(tmp_path, monkeypatch):
    """Offline, which is how it runs without an account."""
    from dtta_fast.runs.tracking import tracker

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    sent = tracker("wandb", tmp_path / "run", {"batch": 4})
    sent.log(20, {"accuracy": 0.75})
    sent.close()
    sys.modules["wandb"].teardown()  # its service may still be writing when a run is finished
    written = list(tmp_path.rglob("*.wandb"))
    assert len(written) == 1
    assert b"accuracy" in written[0].read_bytes()


def test_a_real_stereo_pair_s_depth(tmp_path):
    """scikit-image's motorcycle: its measured disparity as depth, f B / (d + offset), by the calibration of Middlebury's quarter size."""
    left, _, disparity = data.stereo_motorcycle()
    known = np.isfinite(disparity)
    metres = 994.978 * 0.193001 / (np.where(known, disparity, 1.0) + 31.086)
    for kind in ("images", "maps"):
        (tmp_path / "data" / kind).mkdir(parents=True)
    Image.fromarray(left).save(tmp_path / "data" / "images" / "motorcycle.png")
    Image.fromarray((metres * known * 1000).round().astype(np.uint16)).save(tmp_path / "data" / "maps" / "motorcycle.png")
    run = RunConfig(data="map-folder", root=str(tmp_path / "data"), task="depth", batch=1, adapt=presets.DENSE.replace(precheck="off"))
    found = evaluate(run, tmp_path / "run")
    (record,) = read_records(tmp_path / "run" / "records.jsonl")
    assert 2.0 < float(metres[known].mean()) < 6.0  # the motorcycle stands some metres away
    assert record["evaluations"] <= 40
    assert len(record["loss"]) == 3
    assert 0 < record["score"]["abs_rel"] < 2
    assert found["abs_rel"]["before"] == pytest.approx(record["score_before"]["abs_rel"])
