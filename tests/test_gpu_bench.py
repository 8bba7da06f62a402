"""bench/gpu.py in its tiny form, its tables, and what it does with a stage that fails or hangs."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "bench"


def loaded(name: str):
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What a tiny run of all stages wrote."""
    out = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, str(BENCH / "gpu.py"), "--tiny", "--minutes", "60", "--out", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=out, timeout=3600)
    log = (out / "gpu.log").read_text()[-4000:] if (out / "gpu.log").is_file() else ""
    assert run.returncode == 0, f"{run.stdout[-3000:]}\n{run.stderr[-3000:]}\n{log}"
    return out


@pytest.fixture
def results(folder) -> dict:
    return json.loads((folder / "gpu.json").read_text())


@pytest.mark.slow
def test_every_stage_ends_and_its_files_can_travel(folder, results):
    assert results["tiny"] is True
    assert {name: stage["status"] for name, stage in results["stages"].items()} == {stage.module: "done" for stage in loaded("gpu").STAGES}
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"gpu.json", "gpu.log", "trace_dit.json.gz", "trace_stable_diffusion.json.gz"}
    assert max(path.stat().st_size for path in files) < 16 * 2**20
    assert results["environment"]["torch"] == torch.__version__.partition("+")[0]


@pytest.mark.slow
def test_calls_are_adapted_and_guarded_and_told_with_their_evaluations(results):
    calls = results["stages"]["engine"]["measured"]["calls"].values()
    assert {(call["preset"], call["precision"]) for call in calls} == {
        ("FAST", "bf16"), ("FAST", "tf32"), ("FAST", "fp32"), ("PAPER", "bf16")
    }  # fmt: skip
    for call in calls:
        assert all(math.isfinite(loss) for loss in call["loss"])
        assert call["seconds"]["samples"]
        assert call["step"]["median"] < call["seconds"]["median"]
        if call["preset"] == "FAST":  # 3 steps of 4 pairs, and 24 pairs for each of 2 or 3 answers
            assert set(call["evaluations"]) <= {12 + 48, 12 + 72}
            assert call["guarded"] == call["images"]
            a_row = results["stages"]["engine"]["measured"]["models"]["flops a row"]
            guard = sum(call["evaluations"]) - 12 * call["images"]
            assert call["flops"] == 12 * call["images"] * a_row["to the condition"] + guard * a_row["forward"]


@pytest.mark.slow
def test_naive_and_engine_did_the_same_work(results):
    turns = results["stages"]["against_naive"]["measured"]["turns"].values()
    for work in ("recipe", "steps"):
        ways = {(turn["engine"], turn["precision"]): turn for turn in turns if turn["work"] == work and turn["images"] == 1}
        assert len(ways) == 6
        losses = {way: turn["loss"][0] for way, turn in ways.items()}  # before the first update
        assert losses["engine", "fp32"] == pytest.approx(losses["naive", "fp32"], rel=1e-3)
        assert losses["engine", "bf16"] == pytest.approx(losses["naive", "fp32"], rel=2e-2)
        assert losses["naive", "bf16"] == pytest.approx(losses["naive", "fp32"], rel=2e-2)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_what_only_a_gpu_can_do_is_named(results):
    stages = {name: stage["measured"] for name, stage in results["stages"].items()}
    needs = {"left out": "needs a GPU"}
    assert all(found == needs for label, found in stages["ceilings"]["products"].items() if label.startswith("fp8"))
    assert set(stages["step"]["graphs"]) == {"step", "guard of 2 answers", "guard of 3 answers"}
    for found in stages["step"]["graphs"].values():
        assert found["graph"] == needs
        assert found["eager twice the same"]
    assert stages["machine"]["card"]["idle"] == needs
    assert "refused" in stages["ceilings"]["attention"]["cuDNN, 1 rows"]


@pytest.mark.slow
def test_what_broke_once_is_fine_here(results):
    broke = results["stages"]["machine"]["measured"]["broke once"]
    assert {name: found["fine"] for name, found in broke.items()} == {
        "sgd update": True,
        "adam update": True,
        "adamw update": True,
        "ViT under vmap, 2 images, float32": True,
    }
    tests = results["stages"]["tier"]["measured"]["tests"]["tests/gpu"]
    assert tests["passed"] == tests["collected"] > 0


@pytest.mark.slow
def test_tables_refuse_a_tiny_run(results, tmp_path):
    tables = loaded("gpu_tables")
    (tmp_path / "gpu_x.json").write_text(json.dumps(results))
    for table in (tables.short, tables.full):
        with pytest.raises(ValueError, match=r"gpu_x\.json was written by bench/gpu\.py --tiny"):
            table(tmp_path)


@pytest.mark.slow
def test_tables_say_what_the_file_says(results, tmp_path):
    tables = loaded("gpu_tables")
    assert tables.short(tmp_path) == tables.full(tmp_path) == "Not measured yet: no GPU has run `python bench/gpu.py`."
    stages = results["stages"]
    calls = {label: call for label, call in stages["engine"]["measured"]["calls"].items() if call["precision"] == "bf16"}
    one, two, paper = calls["FAST, 1 images, bf16"], calls["FAST, 2 images, bf16"], calls["PAPER, 1 images, bf16"]
    two["images"] = 16  # as without --tiny
    one["seconds"] = {"median": 0.0831, "samples": [0.0831] * 99 + [0.25]}
    one |= {"launches": 9612, "busy": 0.42, "peak bytes": 3 * 2**30, "flops": 21 * 10**12}
    stages["engine"]["measured"]["peak"]["bf16"]["flops"] = 790 * 10**12
    graph = stages["step"]["measured"]["graphs"]["step"]
    graph |= {"capturable": True, "bit for bit the same": False, "largest difference": 3e-4, "launches": 2300, "graph": {"median": 0.008}}
    graph["eager"]["median"] = 0.016
    results |= {"tiny": False, "device": "NVIDIA X100", "commit": "0123456789abcdef", "changed since": False}
    (tmp_path / "gpu_x100.json").write_text(json.dumps(results))

    short = [line.split(" | ") for line in tables.short(tmp_path).splitlines()[2:]]
    turns = {label: turn["seconds"]["median"] for label, turn in stages["against_naive"]["measured"]["turns"].items()}
    engine = turns["steps, engine, bf16, 1 images"]
    ratios = [f"{turns[f'steps, naive, {precision}, 1 images'] / engine:.1f}" for precision in ("fp32", "tf32", "bf16")]
    rate, share = f"{21 / 0.0831:.0f}", f"{21 / 0.0831 / 790:.0%} |"
    assert short[0] == ["| NVIDIA X100", "FAST, 1 image a call", "p50 83.1 ms, p99 84.8 ms", "84", *ratios, rate, share]
    assert short[1][1:3] == ["FAST, 16 images a call", f"{1e3 * two['seconds']['median'] / 16:.1f} ms"]
    assert short[2][1:3] == ["PAPER, 1 image a call", f"{paper['seconds']['median']:.2f} s"]

    full = tables.full(tmp_path)
    assert "### NVIDIA X100" in full
    assert "commit 0123456789; " in full
    assert "| FAST | 1 | bf16 | off | 83.1 | p50 83.1, p99 84.8 (100) | 84 |" in full
    assert f"| 9,612 | 42% | {rate} | {share[:-2]} | 3.0 |" in full
    assert "| step | yes | no, by 3.0e-04 | 2,300 | 16.00 | 8.00 | 2.0 |" in full
    products = stages["ceilings"]["measured"]["products"].values()
    median = next(one["seconds"]["median"] for one in products if (one.get("k"), one.get("n")) == (4608, 1152))
    assert f"| 32 | 4608 to 1152 | {1e6 * median:.1f} |" in full
    attention = "ceilings | done"
    row = next(line for line in full.splitlines() if line.startswith(f"| {attention}"))
    assert "attention, cuDNN, 1 rows: RuntimeError: No viable backend" in row


def test_without_a_gpu_it_measures_nothing(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    run = subprocess.run([sys.executable, str(BENCH / "gpu.py"), "--out", str(tmp_path / "out")], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "bench/gpu.py: there is no GPU here; --tiny tests the program on a CPU\n"
    assert not (tmp_path / "out").exists()


def test_an_unknown_stage_is_refused(tmp_path):
    run = subprocess.run(
        [sys.executable, str(BENCH / "gpu.py"), "--out", str(tmp_path), "--stages", "1,12"], capture_output=True, text=True
    )
    assert run.returncode == 2
    assert "stages is '1,12'; give numbers from 1 to 9, such as 1,3" in run.stderr


def test_a_stage_that_fails_is_noted_with_what_it_had(tmp_path):
    gpu = loaded("gpu")
    results = {"device": None, "environment": {}, "minutes": 9}
    found = gpu.staged(gpu.Stage("nonsense", 60, "no module of that name"), 600.0, tmp_path, True, results)
    assert (found["status"], found["measured"]) == ("failed", {})
    assert found["error"] == "ModuleNotFoundError: No module named 'bench.gpu_stages.nonsense'"
    assert results["environment"]["torch"] == torch.__version__.partition("+")[0]  # written before it failed
    left_out = gpu.staged(gpu.Stage("machine", 60, "no time for it"), 5.0, tmp_path, True, results)
    assert (left_out["status"], left_out["error"]) == ("left out", "5 s were left of 9 minutes")


@pytest.mark.slow
def test_a_stage_that_hangs_is_ended_with_its_children(tmp_path):
    script = (
        "import pathlib, subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
        "pathlib.Path(sys.argv[1]).write_text(str(child.pid)); time.sleep(600)"
    )
    with (tmp_path / "log").open("wb") as log:
        assert loaded("gpu").run([sys.executable, "-c", script, str(tmp_path / "pid")], 10.0, log) == "stopped"
    child = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not running(child):
            return
        time.sleep(0.1)
    pytest.fail("its child goes on")


def running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{process}/stat")
    return not state.is_file() or state.read_text().rpartition(")")[2].split()[0] != "Z"  # not waited for, by whoever inherited it


def test_a_record_keeps_what_was_measured_before_an_error(tmp_path):
    loaded("source_tree").use()
    from bench.gpu_stages.recording import Record

    record = Record(tmp_path / "stage.json", time.time() + 3600, {"device": "x"})

    def broken() -> None:
        raise RuntimeError("CUDA said no\nand more")

    assert record.measure("group", "first", lambda: {"median": 1 / 3, "samples": [math.nan]}) is not None
    assert record.measure("group", "second", broken) is None
    assert record.measure("group", "third", lambda: 1, takes=7200.0) is None
    assert record.measure("group", "fourth", lambda: 2) == 2
    assert json.loads((tmp_path / "stage.json").read_text()) == {
        "about": {"device": "x"},
        "measured": {
            "group": {
                "first": {"median": 0.33333, "samples": ["nan"]},
                "second": {"error": "RuntimeError: CUDA said no"},
                "third": {"left out": "takes about 7200 s, and 3600 s were left"},
                "fourth": 2,
            }
        },
    }


@pytest.mark.parametrize("other", ["nothing", "another copy"])
def test_the_source_tree_is_what_is_measured(other, tmp_path):
    """With nothing installed, and beside a copy of dtta_fast that is; the root stays off sys.path, where `kernels` would be found."""
    script = f"""
import importlib.util, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
found = importlib.util.find_spec("dtta_fast")  # an editable install leaves a folder without modules
assert (found is None or found.origin is None) == {other == "nothing"}
spec = importlib.util.spec_from_file_location("source_tree", {str(BENCH / "source_tree.py")!r})
source_tree = importlib.util.module_from_spec(spec)
spec.loader.exec_module(source_tree)
source_tree.use()
import dtta_fast.session.engine, dtta_fast.kernels.reference
from bench.naive import Naive
print(dtta_fast.session.engine.__file__, dtta_fast.kernels.__file__)
assert importlib.util.find_spec("kernels") is None
assert {str(ROOT)!r} not in sys.path
"""
    copy = tmp_path / "dtta_fast"
    copy.mkdir()
    if other == "another copy":
        (copy / "__init__.py").write_text("raise RuntimeError('the copy was imported')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path) if other == "another copy" else ""}
    run = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [str(ROOT / "dtta_fast" / "session" / "engine.py"), str(ROOT / "kernels" / "__init__.py")]
