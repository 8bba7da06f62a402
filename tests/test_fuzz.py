"""Parsers of runs, models and machine code on damaged and hostile input: a valid value, or the documented error, which names the file."""

from __future__ import annotations

import io
import json
import random
import runpy
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtta_fast import zoo
from dtta_fast.commands.common import checked_device, names_of, option
from dtta_fast.commands.evaluate import Evaluate
from dtta_fast.denoisers.calibration import Calibration
from dtta_fast.denoisers.concat_unet import ConcatUNet
from dtta_fast.denoisers.dit import DiT
from dtta_fast.denoisers.reading import read_process
from dtta_fast.embed import package
from dtta_fast.embed.manifest import Manifest
from dtta_fast.kernels import machine_code
from dtta_fast.report import make_page, read_runs
from dtta_fast.runs.config import RunConfig, flattened, read_yaml, with_settings, yaml_value
from dtta_fast.runs.folder import RunFolder, read_records
from dtta_fast.runs.summary import summary

write_run = runpy.run_path(str(Path(__file__).with_name("report_runs.py")))["write_run"]
HELPERS = runpy.run_path(str(Path(__file__).with_name("damage.py")))
DEEP, fuzz, few, values, seeds, damaged, changed, listing, held, sub = (
    HELPERS[name] for name in ("DEEP", "fuzz", "few", "values", "seeds", "damaged", "changed", "listing", "held", "sub")
)
DENOISER = zoo.folder("digits") / "denoiser"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


# --- runs


@fuzz
@given(seed=seeds, value=values)
def test_records(place, seed, value):
    here = sub(place, "records")
    if not (here / "run").is_dir():
        write_run(here / "run", images=12)
    lines = [json.loads(line) for line in (here / "run/records.jsonl").read_text().splitlines()]
    data = SimpleNamespace(**{f"{field}s": [line[field] for line in lines] for field in ("group", "label")})
    data.names = [line["path"] for line in lines]
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()
    text = damaged(text, seed) if seed % 2 else json.dumps(changed(lines[0], value, seed)).encode() + b"\n" + text
    path = here / "records.jsonl"
    for content in (text, text[: seed % len(text)] if text else b""):
        path.write_bytes(content)
        found = held(lambda: list(read_records(path)), str(path), root=here)
        assert all(type(record["image_id"]) is int and record["batch"] >= 0 for record in found or ())

        def resume(content=content):
            target = sub(here, "resumed")
            for old in target.iterdir():
                old.unlink()
            (target / "config.json").write_text("{}")
            (target / "records.jsonl").write_bytes(content)
            with RunFolder(target, {}, [range(8), range(8, 12)], data) as opened:
                return opened.done

        done = held(resume, "records.jsonl")
        assert set(done or ()) <= {0, 1}


@fuzz
@given(seed=seeds, value=values)
def test_report(place, seed, value):
    here = sub(place, "report")
    if not (here / "whole").is_dir():
        write_run(here / "whole", images=6)
        write_run(here / "run", images=6)
    name = ("summary.json", "config.json", "records.jsonl")[seed % 3]
    whole = (here / "whole" / name).read_text()
    for other in ("summary.json", "config.json", "records.jsonl"):
        (here / "run" / other).write_text((here / "whole" / other).read_text())
    if name == "records.jsonl":
        text = whole + json.dumps(changed(json.loads(whole.splitlines()[0]), value, seed)) + "\n"
    else:
        text = json.dumps(changed(json.loads(whole), value, seed))
    for content in (text.encode(), damaged(whole.encode(), seed), DEEP.encode() + b"\n"):
        (here / "run" / name).write_bytes(content)
        for run in held(lambda: read_runs([here / "run"]), name, root=here) or ():
            assert isinstance(run.config, dict)
            assert all(isinstance(record["evaluations"], (int, float)) and isinstance(record["loss"], list) for record in run.records)
            assert all(isinstance(run.class_name(record["prediction"]), str) for record in run.records)
            assert "</html>" in make_page([run])  # what is let in can be shown
            assert summary([*run.records, *run.failed])["images"] == len(run.records) + len(run.failed)


@fuzz
@given(seed=seeds, value=values)
def test_run_config(place, seed, value):
    whole = RunConfig().described()
    found = held(lambda: RunConfig.from_description(changed(whole, value, seed)), "described", "allowed", "adapt", "protocol", "; ")
    assert found is None or RunConfig.from_description(found.described()) == found
    names = [*flattened({**whole, "adapt": whole["adapt"]}), "preset", "input.batch_size", "tta.gradient_descent.accum_iter", "gpu"]
    names += ["input.dataset_name", "model.class_arch", "tta.online", "severities", "corruptions", "classes"]
    name = names[seed % len(names)]
    found = held(
        lambda: with_settings(RunConfig(), {name: value}), name.removeprefix("adapt."), *flattened({name: value}), " is ", "not a setting"
    )
    assert found is None or isinstance(found, RunConfig)


@fuzz
@given(seed=seeds, text=st.text(max_size=40))
def test_yaml_and_flags(place, seed, text):
    path = sub(place, "yaml") / "run.yaml"
    for content in (damaged(b"data: folder\nadapt: {steps: 3, lr: 5e-4}\nseverities: [1, 2]\n", seed), text.encode("utf-8", "replace")):
        path.write_bytes(content)
        found = held(lambda: read_yaml(path), str(path), root=path.parent)
        assert found is None or isinstance(found, dict)
    held(lambda: yaml_value(text), "cannot be read as YAML")
    held(lambda: Evaluate.start([f"--settings={path}"]), "severities", "steps", "lr", "data", "not a setting", str(path))
    held(lambda: Evaluate.start([f"tta.online={text}"]), "tta.online", "protocol", "mode")
    names = held(lambda: names_of(text), "classes is")
    assert names is None or (len(names) > 1 and all(isinstance(name, str) for name in names))
    assert option(["--json", text], "--json") == text
    held(lambda: checked_device(text), "device is")


def test_yaml_bombs(tmp_path):
    laughs = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{x: *a{i - 1}, y: *a{i - 1}}}\n" for i in range(1, 60))
    for text in (laughs, "a: &a {b: *a}", "a: &a [1]\nb: {<<: *a}", DEEP, "2001-99-99", "x: " + "1" * 5000, "a" * 2_000_000):
        (tmp_path / "run.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"run\.yaml"):
            read_yaml(tmp_path / "run.yaml")


# --- models


@fuzz
@given(seed=seeds, value=values)
def test_calibration(place, seed, value):
    path, whole = sub(place, "calibration") / "calibration.json", json.loads((DENOISER / "calibration.json").read_text())
    for content in (json.dumps(changed(whole, value, seed)).encode(), damaged(json.dumps(whole).encode(), seed), DEEP.encode()):
        path.write_bytes(content)
        found = held(lambda: Calibration.load(path, _denoiser()), str(path), root=path.parent)
        assert found is None or all(isinstance(value, float) for value in found.typical)


KEPT: list[DiT] = []


def _denoiser() -> DiT:
    if not KEPT:
        KEPT.append(DiT.from_pretrained(DENOISER))
    return KEPT[0]


def _small(place: Path, random_network) -> Path:
    """A folder of a small DiT."""
    here = place / "dit"
    if not here.is_dir():
        from diffusers import DDPMScheduler

        from dtta_fast.denoisers.noise_process import NoiseProcess

        DiT(random_network(), NoiseProcess.from_scheduler(DDPMScheduler(50))).save_pretrained(here, DDPMScheduler(50))
        DiT.from_pretrained(here)
    return here


@few
@given(seed=seeds, value=values)
def test_denoiser_folders(place, random_network, seed, value):
    whole = _small(place, random_network)
    here = sub(place, "damaged")
    sub(here, "scheduler")
    for path in (path for path in whole.rglob("*") if path.is_file()):
        (here / path.relative_to(whole)).write_bytes(path.read_bytes())
    name = ("config.json", "scheduler/scheduler_config.json", "model.safetensors")[seed % 3]
    kept = (whole / name).read_bytes()
    contents = [
        damaged(kept, seed),
        *([] if seed % 3 == 2 else [json.dumps(changed(json.loads(kept), value, seed)).encode(), DEEP.encode()]),
    ]
    for content in contents:
        (here / name).write_bytes(content)
        found = held(lambda: DiT.from_pretrained(here), str(here), root=here)
        assert found is None or len(found.process) <= 100_000
        found = held(lambda: read_process(here), str(here))
        assert found is None or found.table.isfinite().all()
        held(lambda: ConcatUNet.from_pretrained(here), str(here), errors=(ValueError, FileNotFoundError))


@pytest.mark.parametrize(
    "name", ["input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "mlp_ratio", "num_classes"]
)
@pytest.mark.parametrize("size", [2**23, 10**12, 0, -1])
def test_sizes_that_no_memory_holds(tmp_path, random_network, name, size):
    whole = _small(tmp_path, random_network)
    config = json.loads((whole / "config.json").read_text()) | {name: size}
    (whole / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json describes no DiT|model\.safetensors does not fit"):
        DiT.from_pretrained(whole)


@few
@given(seed=seeds)
def test_checkpoints(place, random_network, seed):
    state, draw, path = dict(random_network().state_dict()), random.Random(seed), sub(place, "checkpoint") / "dit.pt"
    name = draw.choice(list(state))
    changes = [torch.zeros(0), torch.zeros(3), torch.zeros(1, 1).expand(10**6, 10**6), 5, None, torch.zeros(2, 2, 2, 2, 2)]
    state[name] = draw.choice(changes)
    if not draw.randrange(3):
        state["blocks.999999999.x"] = torch.zeros(1)
    buffer = io.BytesIO()
    torch.save({"ema": draw.choice((state, state, [1]))}, buffer)
    for content in (buffer.getvalue(), damaged(buffer.getvalue(), seed)):
        path.write_bytes(content)
        held(lambda: DiT.from_original(path, num_heads=2), str(path), root=path.parent)


def test_a_compressed_checkpoint(tmp_path):
    torch.save({"x": torch.zeros(10**6)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as whole, zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for member in whole.infolist():
            bomb.writestr(member.filename, whole.read(member))
    with pytest.raises(ValueError, match=r"bomb\.pt cannot be read .*compressed"):
        DiT.from_original(tmp_path / "bomb.pt", num_heads=2)


METADATA = {
    "format": "2", "torch": "2.9.0", "device": "cpu", "capability": "AVX2", "instructions": "avx fma", "weights": "0",
    "config": "{}",
    "task": "Classification 0", "batch": "2", "height": "8", "width": "8", "outputs": "2 10",
    "steps": "3", "guard": "0", "evaluations": "4",
    "online": "false", "state": '[["float32", [3]]]', "tolerance": "0.1", "measured": "0.01", "measured_images": "4",
}  # fmt: skip


@fuzz
@given(seed=seeds, value=values, text=st.text(max_size=12))
def test_manifest(seed, value, text):
    assert Manifest.from_metadata(METADATA, "a.pt2").batch == 2
    for given_value in (text, json.dumps(value), DEEP, "1" * 5000, "1e400", "NaN", None):
        metadata = {**METADATA, list(METADATA)[seed % len(METADATA)]: given_value}
        found = held(lambda metadata=metadata: Manifest.from_metadata(metadata, "a.pt2"), "a.pt2")
        assert found is None or found.batch * found.height * found.width * 3 < 2**30
        assert found is None or all(isinstance(line, str) for line in found.misfits())


@pytest.mark.parametrize("name", ["../x", "data/../../x", "/etc/x", "C:/x", "C:\\x", "..\\x", "data/x\0", "a/..", "linked"])
def test_packages_stay_in_their_folder(tmp_path, name):
    path = tmp_path / "a.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        member = zipfile.ZipInfo("link" if name == "linked" else "x")
        member.filename = member.orig_filename = name
        if name == "linked":
            member.external_attr = 0o120777 << 16
        archive.writestr(member, b"/etc/passwd")
    with pytest.raises(ValueError, match=r"a\.pt2 is not a package of an adaptation: its member"):
        package.load(path)
    assert listing(tmp_path) == ["a.pt2"]


@fuzz
@given(seed=seeds)
def test_packages(place, seed):
    buffer, path = io.BytesIO(), sub(place, "package") / "a.pt2"
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a/data/aotinductor/decide/x.wrapper_metadata.json", json.dumps(METADATA))
    path.write_bytes(damaged(buffer.getvalue(), seed))
    held(lambda: package.load(path), str(path), root=path.parent)


# --- machine code


@fuzz
@given(seed=seeds, text=st.text(max_size=60))
def test_machine_code(seed, text):
    counts = ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count", "sgpr_spill_count", "group_segment_fixed_size")
    assembly = "".join(f"  .{name}: 3\n" for name in counts) + "  global_load_dwordx4 v0\n"
    assert machine_code.amd(assembly).loads == {128: 1}
    for source in (
        text,
        assembly + f"  global_load_{text}\n",
        assembly.replace("3", "9" * 5000),
        damaged(assembly.encode(), seed).decode("latin1"),
    ):
        held(lambda source=source: machine_code.amd(source), "assembly has")
    sass = f"REG:8 STACK:0 SHARED:0 LOCAL:{text}0\n /*0000*/ @P0 LDG.E.128 R0\n"

    def run(command, **options):
        return subprocess.CompletedProcess(command, 0, damaged(sass.encode(), seed).decode("latin1"), "")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(subprocess, "run", run)
        held(lambda: machine_code.cuda(b"x", "tool"), "cuobjdump printed")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(subprocess, "run", lambda *command, **options: (_ for _ in ()).throw(subprocess.CalledProcessError(1, "tool")))
        with pytest.raises(ValueError, match="cubin of 1 bytes is none"):
            machine_code.cuda(b"x", "tool")
