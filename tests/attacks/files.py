"""Attacks on what is promised of files, runs, reports, packages, settings and the command line.

python tests/attacks/files.py [WORD ...] runs those whose names hold a word, else all, and prints a line a case: held, or FELL with the reason.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import resource
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from PIL import Image

torch.set_num_threads(1)

from dtta_fast import presets, zoo
from dtta_fast.commands.cli import main
from dtta_fast.commands.common import check_path, holds, is_page
from dtta_fast.data.folder import open_folder, read_images
from dtta_fast.data.images import open_images
from dtta_fast.denoisers.calibration import Calibration
from dtta_fast.denoisers.dit import DiT
from dtta_fast.report import make_page, read_runs
from dtta_fast.runs.config import RunConfig, read_yaml, with_settings
from dtta_fast.runs.evaluate import evaluate
from dtta_fast.runs.folder import RunFolder, read_records
from dtta_fast.runs.worker import open_data
from dtta_fast.runtime.archives import check_archive
from dtta_fast.runtime.pictures import read_image

HELPERS = runpy.run_path(str(Path(__file__).parents[1] / "report_runs.py"))
record_of, write_run = HELPERS["record_of"], HELPERS["write_run"]
SMALL = presets.FAST.replace(steps=1, pairs=2, guard=0, precheck="off")
ONLINE_SMALL = presets.ONLINE.replace(steps=1, pairs=2)
EVIL = "\x1b]0;owned\x07\x1b[31mred[bold]x[/bold]<script>alert(1)</script>\u202e:smile:"
CONFIG = {"data": {"name": "digits-c"}, "task": "classification", "protocol": "online", "adapt": {"steps": 1}}
BATCHES = [[0, 1, 2], [3, 4], [5]]
SIX = [record_of(i, "classification", ("fog2",), random.Random(i)) for i in range(6)]
for _number, _ids in enumerate(BATCHES):
    for _i in _ids:
        SIX[_i]["batch"] = _number
DATA = SimpleNamespace(names=[r["path"] for r in SIX], groups=["fog2"] * 6, labels=[r["label"] for r in SIX], classes=("zero",))
STATE = {
    "step": torch.tensor(3),
    "theta": {"a.weight": torch.arange(6.0).view(2, 3)},
    "phi": {},
    "theta_slots": [[torch.ones(2, 3)]],
    "phi_slots": [],
}


# --- helpers


class Fell(AssertionError):
    pass


def need(fine, why):
    if not fine:
        raise Fell(why)


def refused(call, *names, kinds=(ValueError, OSError)):
    """The message of the error that call() has to raise, which has to have these in it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except kinds as error:
        told = str(error)
        for name in names:
            need(name in told, f"the message lacks {name!r}: {told[:200]!r}")
        return told
    raise Fell("it was taken")


def either(call, kinds=(ValueError, OSError)):
    """What call() gives, or the message of a plain error; any other exception falls."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call()
    except kinds as error:
        return str(error)


def command(*arguments):
    """(status, out, err) of the command line, in this process."""
    out, err = io.StringIO(), io.StringIO()
    status = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            main(list(map(str, arguments)))
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
    for text in (out.getvalue(), err.getvalue()):
        need("\x1b]" not in text and "\x07" not in text and "\u202e" not in text, f"raw control characters were shown: {text[-200:]!r}")
    return status, out.getvalue(), err.getvalue()


def told(*arguments):
    """The one line of a command that has to fail with status 2."""
    status, _, err = command(*arguments)
    need(status == 2, f"status is {status}: {err[-200:]!r}")
    return err


def forked(work, *, kill=None, after=None, file_size=None, timeout=60):
    """Runs work() in a child; (how it ended, its error). kill: a signal that is sent after so many seconds."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        status = 0
        try:
            if file_size is not None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
            work()
        except BaseException as error:
            os.write(write, f"{type(error).__name__}: {error}".encode("utf-8", "backslashreplace")[:3000])
            status = 3
        os._exit(status)
    os.close(write)
    begun = time.monotonic()
    sent = False
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            break
        took = time.monotonic() - begun
        if kill and not sent and took >= after:
            os.kill(child, kill)
            sent = True
        if took > timeout:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(read)
            raise Fell(f"it did not end in {timeout} s")
        time.sleep(0.003)
    text = b""
    while part := os.read(read, 4096):
        text += part
    os.close(read)
    return (-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)), text.decode("utf-8", "replace")


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and not p.is_symlink()}


def without_seconds(folder):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in read_records(folder / "records.jsonl")]


def fake(folder, batches=BATCHES, data=DATA, config=CONFIG, **options):
    return RunFolder(folder, config, batches, data, **options)


def fake_write(folder, upto=3, finish=False, **options):
    with fake(folder, **options) as opened:
        for k in opened.remaining()[:upto]:
            opened.append(k, [SIX[i] for i in BATCHES[k]])
        if finish:
            records, digest = opened.finish()
            opened.write_summary(summary_of(records, digest))


def summary_of(records, digest, config=CONFIG):
    return {
        "images": len(records),
        "errors": 0,
        "groups": {},
        "config": config,
        "classes": [],
        "environment": {},
        "seconds": {},
        "wall_seconds": 1.0,
        "records": digest,
    }


def digit_folder(root, count=6, size=32, classes=True):
    """A folder of real digits as PNG, a class folder each, all ten classes."""
    images, labels = zoo.example("digits")
    for k in range(10):
        place = root / str(k) if classes else root
        place.mkdir(parents=True, exist_ok=True)
        i = int((labels == k).nonzero()[0])
        Image.fromarray((images[i].permute(1, 2, 0) * 255).round().byte().numpy()).save(place / f"{k}{'a'}.png")
    return root


_cache = Path(tempfile.mkdtemp(prefix="dtta-attacks-"))


def folder_run(root, batch=4, **more):
    settings = {"data": "folder", "root": str(root), "batch": batch, "adapt": SMALL, **more}
    return RunConfig(**settings)


def cached(name, make):
    place = _cache / name
    if not place.exists():
        make(place)
    return place


def digits_root():
    return cached("root", digit_folder)


def finished():
    return cached("finished", lambda place: evaluate(folder_run(digits_root()), place))


def finished_online():
    return cached("online", lambda place: evaluate(online_run(digits_root()), place))


def online_run(root, batch=4):
    return folder_run(root, batch, protocol="online", adapt=ONLINE_SMALL)


_pair = []


def digit_models():
    if not _pair:
        _pair.append(zoo.load("digits"))
    return _pair[0]


def png(size=(32, 32), mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, size, 7).save(buffer, "PNG")
    return buffer.getvalue()


def picture(place, data, name="x.png"):
    path = place / name
    path.write_bytes(data)
    return path


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


# --- folders for --out


def attack_out_symlink_loop(t):
    (t / "a").symlink_to(t / "b")
    (t / "b").symlink_to(t / "a")
    refused(lambda: fake(t / "a"))


def attack_out_dangling_link(t):
    (t / "a").symlink_to(t / "nowhere")
    refused(lambda: fake(t / "a"), "a")
    need(not (t / "nowhere").exists(), "the link's target was made")


def attack_out_under_a_file(t):
    (t / "f").write_text("x")
    refused(lambda: fake(t / "f" / "run"), "f")
    need((t / "f").read_text() == "x", "the file changed")


def attack_out_names_odd(t):
    for name in ("a\nb", "tail. ", "tail.", " ", "é", "e\u0301", "RUN", "run", "-x", "[red]x[/]", "\udcff", "a" * 255, "..x", "😀"):
        fake_write(t / name, 3)
        fake_write(t / name, 3)
    need(len(os.listdir(t)) == 14, f"{len(os.listdir(t))} folders of 14")


def attack_out_too_long_or_nul(t):
    for name in ("a" * 256, "a\0b", "é" * 128):
        refused(lambda: fake(t / name), "out")
    refused(lambda: fake(Path("/".join([str(t), *["a" * 200] * 25]))), "out")


def attack_out_records_is_link_to_a_file_of_others(t):
    """A run's folder made by somebody: records.jsonl is a link to a file outside."""
    (t / "precious.txt").write_bytes(b"precious\n")
    fake_write(t / "run", 0)
    (t / "run").mkdir(exist_ok=True)
    (t / "run" / "config.json").write_text(json.dumps(CONFIG))
    (t / "run" / "records.jsonl").symlink_to(t / "precious.txt")
    either(lambda: fake_write(t / "run", 3, finish=True))
    need((t / "precious.txt").read_bytes() == b"precious\n", "a file outside, to which records.jsonl is a link, was written to")


def attack_out_summary_is_link_overwrite(t):
    (t / "precious.json").write_bytes(b"precious")
    fake_write(t / "run", 1)
    (t / "run" / "summary.json").symlink_to(t / "precious.json")
    either(lambda: fake_write(t / "run", 3, finish=True, overwrite=True))
    need((t / "precious.json").read_bytes() == b"precious", "--overwrite wrote the summary through a link to a file outside")


def attack_out_config_is_link_to_another_run_s(t):
    other = {**CONFIG, "adapt": {"steps": 7}}
    fake_write(t / "other", 3, config=other)
    (t / "run").mkdir()
    (t / "run" / "config.json").symlink_to(t / "other" / "config.json")
    held = contents(t / "other")
    either(lambda: fake_write(t / "run", 3, finish=True))
    need(contents(t / "other") == held, "the config of another run was overwritten through a link")


def attack_out_lock_is_a_dangling_link(t):
    (t / "run").mkdir()
    (t / "run" / "config.json").write_text(json.dumps(CONFIG))
    (t / "run" / "lock").symlink_to(t / "made")
    either(lambda: fake_write(t / "run", 3))
    need(not (t / "made").exists(), "a file was made outside, through the link `lock`")


def attack_out_records_is_a_pipe(t):
    (t / "run").mkdir()
    (t / "run" / "config.json").write_text(json.dumps(CONFIG))
    os.mkfifo(t / "run" / "records.jsonl")
    status, error = forked(lambda: fake_write(t / "run", 3), timeout=3)
    need(status == 3 and ("ValueError" in error or "Error" in error), f"{status} {error}")


def attack_out_records_is_a_folder(t):
    (t / "run").mkdir()
    (t / "run" / "config.json").write_text(json.dumps(CONFIG))
    (t / "run" / "records.jsonl").mkdir()
    refused(lambda: fake_write(t / "run", 3), "records.jsonl")


def attack_out_lock_is_a_pipe(t):
    (t / "run").mkdir()
    (t / "run" / "config.json").write_text(json.dumps(CONFIG))
    os.mkfifo(t / "run" / "lock")
    status, error = forked(lambda: fake_write(t / "run", 3), timeout=3)
    need(status in (0, 3), f"{status} {error}")


def attack_out_state_file_of_others_is_overwritten(t):
    """A weights file of somebody's that has a state's name, in a run's folder."""
    from safetensors.torch import save

    theirs = save({"a": torch.ones(2)})
    fake_write(t / "run", 1)
    (t / "run" / "state-00000001.safetensors").write_bytes(theirs)

    def go():
        with fake(t / "run") as opened:
            opened.save_state(1, STATE)
            opened.append(1, [SIX[i] for i in BATCHES[1]])

    either(go)
    need((t / "run" / "state-00000001.safetensors").read_bytes() == theirs, "a file of others was overwritten by the run's state")


def attack_out_two_processes_race(t):
    """Twelve processes begin in one new folder at once: one set of records, the others are told."""
    children = []
    go = time.monotonic() + 0.15
    for _ in range(12):
        child = os.fork()
        if not child:
            code = 9
            try:
                while time.monotonic() < go:
                    pass
                fake_write(t / "run", 3, finish=True)
                code = 0
            except ValueError as error:
                code = 2 if "being written to by another run" in str(error) else 4
                if code == 4:
                    (t / f"told-{os.getpid()}").write_text(str(error))
            finally:
                os._exit(code)
        children.append(child)
    ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    odd = "; ".join(p.read_text() for p in t.glob("told-*"))
    need(0 in ends and set(ends) <= {0, 2}, f"{ends} {odd[:300]}")
    lines = (t / "run" / "records.jsonl").read_bytes().splitlines()
    need(len(lines) == 6, f"{len(lines)} lines")


def attack_out_current_folder_and_empty(t):
    (t / "mine.txt").write_text("x")
    with contextlib.chdir(t):
        for name in ("", ".", "./"):
            refused(lambda: fake(Path(name)), "mine.txt")
    need(os.listdir(t) == ["mine.txt"], "something was written")


def attack_out_foreign_names_beside_stay(t):
    fake_write(t / "run", 1)
    theirs = {
        "Config.json": b"a",
        "RECORDS.JSONL": b"b",
        "records.jsonl ": b"c",
        "records.jsonl.": b"d",
        "summary.json\n": b"e",
        "records.jsonl.1.new.": b"f",
        "config.json.١.new": b"g",
        "records-١.jsonl": b"h",
        "lock\n": b"",
        "state-٠٠٠٠٠٠٠٠.safetensors": b"i",
    }
    for name, held in theirs.items():
        (t / "run" / name).write_bytes(held)
    either(lambda: fake_write(t / "run", 3, finish=True))
    now = {name: (t / "run" / name).read_bytes() if (t / "run" / name).exists() else None for name in theirs}
    need(now == theirs, f"changed: {[n for n in theirs if now[n] != theirs[n]]}")


# --- overwriting, full disks


def attack_overwrite_on_a_full_disk_keeps_the_old_run(t):
    """--overwrite: the run that is there stays until the first batch of the new one is saved."""
    fake_write(t / "run", 3, finish=True)
    held = contents(t / "run")
    status, error = forked(lambda: fake_write(t / "run", 3, overwrite=True), file_size=100)
    need(status == 3 and "cannot be written" in error, f"{status} {error}")
    lost = [name for name in held if contents(t / "run").get(name) != held[name]]
    need(not lost, f"the first batch could not be written ({error[:60]}...), and these of the old run are gone or changed: {lost}")


def attack_overwrite_killed_before_the_first_write(t):
    """SIGKILL at the first os.open for records: the old run is there, or the new one's first batch."""
    fake_write(t / "run", 3, finish=True)
    held = contents(t / "run")
    fake_write(t / "other", 1)
    first = contents(t / "other")["records.jsonl"]

    def work():
        from dtta_fast.runs import folder as module

        real = module.os.open

        def opened(path, *rest, **more):
            if str(path).endswith("records.jsonl"):
                os.kill(os.getpid(), signal.SIGKILL)
            return real(path, *rest, **more)

        module.os.open = opened
        fake_write(t / "run", 3, overwrite=True)

    forked(work)
    left = contents(t / "run")
    need(left.get("records.jsonl") in (held["records.jsonl"], first), "neither the old run nor the new one's first batch is there")


def attack_full_disk_append(t):
    fake_write(t / "run", 1)
    held = (t / "run" / "records.jsonl").read_bytes()
    for extra in (1, 50, 300):
        status, error = forked(lambda: fake_write(t / "run", 3), file_size=len(held) + extra)
        need(status == 3 and "cannot be written" in error, f"{status} {error}")
        need((t / "run" / "records.jsonl").read_bytes() == held, "a torn line stayed")
    fake_write(t / "run", 3, finish=True)


def attack_full_disk_summary_and_finish(t):
    fake_write(t / "run", 3)
    held = contents(t / "run")

    def work():
        with fake(t / "run") as opened:
            records, digest = opened.finish()
            resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
            opened.write_summary(summary_of(records, digest))

    status, error = forked(work, file_size=10**9)
    need(status == 3 and "summary.json" in error and "cannot be written" in error, f"{status} {error}")
    need(contents(t / "run") == held, "something was left or lost")


def attack_full_disk_state(t):
    fake_write(t / "run", 1)
    with fake(t / "run") as opened:
        opened.save_state(1, STATE)
    held = contents(t / "run")

    def work():
        with fake(t / "run") as opened:
            opened.save_state(1, {**STATE, "step": torch.tensor(4)})

    status, error = forked(work, file_size=64)
    need(status == 3 and "cannot be written" in error, f"{status} {error}")
    need(contents(t / "run") == held, "a state changed or something was left")


def attack_full_disk_calibration_keeps_the_old(t):
    """dtta calibrate --out over an earlier calibration, on a full disk."""
    path = t / "calibration.json"
    _, denoiser = digit_models()
    denoiser.calibration.save(path)
    held = path.read_bytes()
    forked(lambda: denoiser.calibration.save(path), file_size=100)
    need(path.read_bytes() == held, f"the earlier calibration is gone: {len(path.read_bytes())} of {len(held)} bytes are left")


# --- records


def resume_with(t, change, finish=False):
    fake_write(t / "run", 3, finish=finish)
    path = t / "run" / "records.jsonl"
    held = change(path.read_bytes())
    path.write_bytes(held)
    return path, held


def record_edit(field, value):
    def change(whole):
        lines = whole.splitlines(keepends=True)
        record = json.loads(lines[3])
        record[field] = value
        lines[3] = json.dumps(record).encode() + b"\n"
        return b"".join(lines)

    return change


BAD = {
    "image_id": (-1, 1.5, "3", None, True, 2**53 + 1, 4, 10**30),
    "batch": (-1, 0, 2, True, None, "1", 2**53),
    "path": (None, 3, "other", ["a"], ""),
    "group": (None, 3, "Fog2", ""),
    "label": (True, 1.5, "1", 2**31, -(2**31) - 1, None, 99),
    "digest": ("", "XYZ", "0" * 15, "0" * 65, 5, "G" * 16),
    "prediction": (1.5, "a", True, 2**40),
    "prediction_before": ([], {}, 2**31),
    "confidence": (-0.1, 1.1, "0.5", None, True),
    "confidence_before": (2, None),
    "top": (None, [[1]], [[1, 2]], [[1, 0.5, 3]], [["1", 0.5]], "ab"),
    "top_before": ({}, [[None, -1]]),
    "loss": (None, [1e31], ["x"], 3, [True]),
    "accepted": (1, None, "true"),
    "evaluations": (-1, 1.5, 2**54),
    "seconds": (-1, 1e13, None, "1"),
    "error": (5, None, [], {}),
}


def _make_record_attack(field):
    def attack(t):
        for i, value in enumerate(BAD[field]):
            place = t / str(i)
            place.mkdir()
            path, held = resume_with(place, record_edit(field, value))
            try:
                refused(lambda: fake(place / "run"), "records.jsonl", "line 4")
            except Fell as error:
                raise Fell(f"{field} {value!r}: {error}") from error
            need(path.read_bytes() == held, f"{field} {value!r}: the file was changed by an error")

    return attack


def read_page(*folders):
    return make_page(read_runs([Path(f) for f in folders]))


for _field in BAD:
    globals()[f"attack_record_field_{_field}"] = _make_record_attack(_field)


def attack_record_constants(t):
    for i, word in enumerate((b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"9" * 5000)):
        place = t / str(i)
        place.mkdir()
        path, held = resume_with(place, lambda whole: re.sub(rb'"seconds": [0-9.e-]+', b'"seconds": ' + word, whole, count=1))
        refused(lambda: fake(place / "run"), "records.jsonl", "line 1")
        refused(lambda: read_runs([place / "run"]), "records.jsonl", "line 1")
        need(path.read_bytes() == held, "changed")


def attack_record_bytes(t):
    changes = {
        "nul": lambda w: w[:50] + b"\0" + w[50:],
        "nuls": lambda w: b"\0" * 40 + w,
        "utf8": lambda w: w.replace(b"fog2/", b"fog2\xff/", 1),
        "empty line": lambda w: w.replace(b"\n", b"\n\n", 1),
        "two in a line": lambda w: w.replace(b"}\n{", b"}{", 1),
        "array": lambda w: b"[]\n" + w,
        "number": lambda w: b"7\n" + w,
        "null": lambda w: b"null\n" + w,
        "deep": lambda w: b"[" * 100_000 + b"\n" + w,
        "deep object": lambda w: b'{"a":' * 100_000 + b"\n" + w,
        "utf16": lambda w: w.decode().encode("utf-16"),
        "utf32": lambda w: w.decode().encode("utf-32"),
        "swapped": lambda w: b"".join([w.splitlines(True)[1], w.splitlines(True)[0], *w.splitlines(True)[2:]]),
        "double": lambda w: w.splitlines(True)[0] + w,
        "comment": lambda w: b"// x\n" + w,
        "cr": lambda w: w.replace(b"\n", b"\r", 1),
    }
    for i, (name, change) in enumerate(changes.items()):
        place = t / str(i)
        place.mkdir()
        path, held = resume_with(place, change)
        try:
            refused(lambda: fake(place / "run"), "records.jsonl")
        except Fell as error:
            raise Fell(f"{name}: {error}") from error
        need(path.read_bytes() == held, f"{name}: changed by an error")


def attack_record_harmless_bytes(t):
    """CRLF, a BOM, spaces and a duplicate key with one value: taken or refused, and no record is lost."""
    for i, change in enumerate((lambda w: w.replace(b"\n", b"\r\n"), lambda w: b"\xef\xbb\xbf" + w, lambda w: w.replace(b", ", b" ,\t"))):
        place = t / str(i)
        place.mkdir()
        resume_with(place, change)

        def go():
            with fake(place / "run") as opened:
                return len(opened.remaining())

        found = either(go)
        need(found == 0 or isinstance(found, str), f"{i}: {found} batches are to do again")


def attack_record_duplicate_keys(t):
    """A line that says two labels: two readers read two records. It should be refused."""
    resume_with(t, lambda w: w.replace(b'{"image_id": 0, ', b'{"image_id": 5, "prediction": 3, "image_id": 0, ', 1))
    refused(lambda: fake(t / "run"), "line 1")


def attack_record_huge_line(t):
    resume_with(t, lambda w: b'{"image_id": "' + b"a" * 5_000_000 + b'"}\n' + w)
    message = refused(lambda: fake(t / "run"), "line 1")
    need(len(message) < 2000, f"the message has {len(message)} characters")


def attack_record_huge_values_in_messages(t):
    """A path of a megabyte in a record: the error is a line that can be read."""
    resume_with(t, record_edit("path", "x" * 1_000_000))
    message = refused(lambda: fake(t / "run"), "line 4")
    need(len(message) < 5000, f"the message has {len(message)} characters")


def attack_record_every_cut(t):
    fake_write(t / "run", 3)
    path = t / "run" / "records.jsonl"
    whole = path.read_bytes()
    for at in range(0, len(whole), 37):
        path.write_bytes(whole[:at])
        fake_write(t / "run", 3)
        need(path.read_bytes() == whole, f"cut at {at}")


def attack_record_bits_flipped(t):
    fake_write(t / "run", 3)
    path, draw = t / "run" / "records.jsonl", random.Random(3)
    whole = path.read_bytes()
    for _ in range(150):
        at = draw.randrange(len(whole) - 1)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :])
        held = path.read_bytes()

        def go():
            with fake(t / "run") as opened:
                return opened.remaining()

        found = either(go)
        if isinstance(found, str):
            need("records.jsonl" in found, found[:200])
            need(path.read_bytes() == held, f"a refusal changed the file: {found[:200]}")


# --- the data set changes


def extended(names, last):
    """The fake data set with an image more in its last batch."""
    more = {**SIX[5], "image_id": 6, "path": "fog2/00006.JPEG"}
    return [*BATCHES[:2], [5, 6]], SimpleNamespace(
        names=[*DATA.names, more["path"]], groups=["fog2"] * 7, labels=[*DATA.labels, more["label"]], classes=("zero",)
    )


def attack_image_added_and_another_changed_loses_nothing(t):
    """A finished run; an image is added and another's pixels change: refused, and the records stay."""
    root = digit_folder(t / "root")
    run = folder_run(root)
    evaluate(run, t / "run")
    held = contents(t / "run")
    shutil.copy(root / "9" / "9a.png", root / "9" / "9b.png")
    Image.new("RGB", (32, 32), 9).save(root / "0" / "0a.png")
    refused(lambda: evaluate(run, t / "run"), "other pixels")
    lost = [name for name in held if contents(t / "run").get(name) != held[name]]
    need(not lost, f"it was refused, and {lost} changed: {len((t / 'run' / 'records.jsonl').read_bytes().splitlines())} records of 10")


def attack_online_images_added_after_the_end(t):
    """evaluation.md: images that were added after the others are done too. Or refused, with nothing lost."""
    root = digit_folder(t / "root")
    run = online_run(root)
    evaluate(run, t / "run")
    held = contents(t / "run")
    shutil.copy(root / "9" / "9a.png", root / "9" / "9b.png")
    found = either(lambda: evaluate(run, t / "run"))
    if isinstance(found, str):
        lost = [name for name in held if contents(t / "run").get(name) != held[name]]
        os.unlink(root / "9" / "9b.png")
        again = either(lambda: evaluate(run, t / "run"))
        need(not lost, f"refused ({found[:140]}...), and {lost} changed; with the data restored: {str(again)[:160]}")
        raise Fell(f"images that were added are not done: {found[:200]}")


def attack_online_images_added_to_a_whole_last_batch(t):
    root = digit_folder(t / "root")
    run = online_run(root, batch=5)
    evaluate(run, t / "run")
    held = contents(t / "run")
    shutil.copy(root / "9" / "9a.png", root / "9" / "9b.png")
    found = either(lambda: evaluate(run, t / "run"))
    lost = [name for name in held if contents(t / "run").get(name) != held[name]]
    need(not isinstance(found, str) or not lost, f"refused, and {lost} changed")
    need(not isinstance(found, str), f"images that were added are not done: {str(found)[:240]}")


def attack_later_edits_are_told_where_a_line_is_missing(t):
    """A finished run: a prediction is edited, and the last line removed. The summary names the digest, so the edit is told."""
    fake_write(t / "run", 3, finish=True)
    path = t / "run" / "records.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    record = json.loads(lines[0])
    record["prediction"], record["confidence"] = record["label"], 1.0
    path.write_bytes(json.dumps(record).encode() + b"\n" + b"".join(lines[1:-1]))
    refused(lambda: fake_write(t / "run", 3, finish=True), "summary.json")


def attack_later_edits_are_told_where_images_were_added(t):
    fake_write(t / "run", 3, finish=True)
    path = t / "run" / "records.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    record = json.loads(lines[0])
    record["prediction"], record["confidence"] = record["label"], 1.0
    path.write_bytes(json.dumps(record).encode() + b"\n" + b"".join(lines[1:]))
    batches, data = extended(None, None)

    def go():
        with fake(t / "run", batches, data) as opened:
            for k in opened.remaining():
                opened.append(k, [{**SIX[5], "image_id": i, "path": data.names[i]} for i in batches[k]])
            opened.finish()

    refused(go, "summary.json")


def attack_data_file_replaced(t):
    root = digit_folder(t / "root")
    run = folder_run(root)
    evaluate(run, t / "run")
    (t / "run" / "summary.json").unlink()
    held = contents(t / "run")
    shutil.copy(root / "1" / "1a.png", root / "2" / "2a.png")
    refused(lambda: evaluate(run, t / "run"), "2a.png", "other pixels")
    need(contents(t / "run") == held, "changed")


def attack_data_files_renamed_removed_swapped(t):
    shutil.copytree(finished(), t / "kept")
    for i, change in enumerate(("rename", "remove", "class", "first")):
        root = digit_folder(t / f"root{i}")
        run = folder_run(root)
        evaluate(run, t / f"run{i}")
        held = contents(t / f"run{i}")
        if change == "rename":
            (root / "3" / "3a.png").rename(root / "3" / "3z.png")
        elif change == "remove":
            (root / "3" / "3a.png").unlink(), (root / "3").rmdir()
        elif change == "class":
            (root / "3").rename(root / "33")
        else:
            shutil.copy(root / "0" / "0a.png", root / "0" / "00.png")
        refused(lambda: evaluate(run, t / f"run{i}"), "records.jsonl")
        need(contents(t / f"run{i}") == held, f"{change}: changed")


def attack_data_read_error_then_mended(t):
    """An image that failed is recorded so; once it is mended nothing is refused."""
    root = digit_folder(t / "root")
    good = (root / "4" / "4a.png").read_bytes()
    (root / "4" / "4a.png").write_bytes(good[:60])
    found = evaluate(folder_run(root), t / "run")
    need(found["errors"] == 1 and found["images"] == 10, f"{found['errors']} errors")
    (root / "4" / "4a.png").write_bytes(good)
    either(lambda: evaluate(folder_run(root), t / "run"))
    need(len(without_seconds(t / "run")) == 10, "records were lost")


def attack_data_wnid_of_cifar_labels_edited(t):
    place = t / "CIFAR-10-C"
    place.mkdir()
    np.save(place / "fog.npy", np.zeros((50, 32, 32, 3), np.uint8))
    np.save(place / "labels.npy", np.arange(10) % 10)
    data = open_images("cifar10-c", t)
    need(len(data) == 50, f"{len(data)}")
    batches = [list(range(10))]
    records = [
        {**SIX[0], "image_id": i, "batch": 0, "path": data.names[i], "group": data.groups[i], "label": int(data.labels[i])}
        for i in range(10)
    ]
    with RunFolder(t / "run", CONFIG, batches, data) as opened:
        opened.append(0, records)
    np.save(place / "labels.npy", np.arange(10)[::-1].copy())
    refused(lambda: RunFolder(t / "run", CONFIG, batches, open_images("cifar10-c", t)), "label is 0")


# --- summaries and configs swapped


def attack_summary_of_another_run(t):
    fake_write(t / "a", 3, finish=True)
    with fake(t / "b") as opened:
        for k in range(3):
            opened.append(k, [{**SIX[i], "seconds": 0.5} for i in BATCHES[k]])
        records, digest = opened.finish()
        opened.write_summary(summary_of(records, digest))
    shutil.copy(t / "a" / "summary.json", t / "b" / "summary.json")
    held = contents(t / "b")
    refused(lambda: fake_write(t / "b", 3, finish=True), "summary.json")
    need(contents(t / "b") == held, "changed")
    need("not what" in read_page(t / "b"), "the report does not tell")


def attack_config_of_another_run(t):
    fake_write(t / "a", 3, finish=True)
    (t / "a" / "config.json").write_text(json.dumps({**CONFIG, "adapt": {"steps": 9}}))
    held = contents(t / "a")
    refused(lambda: fake_write(t / "a", 3), "another config", "adapt.steps")
    need(contents(t / "a") == held, "changed")
    need("another config" in read_page(t / "a"), "the report does not tell")


def attack_config_values(t):
    for i, text in enumerate(
        ("{", "[]", "null", '{"data": NaN}', "[" * 10**5, '{"data":{"name":1},"task":"x","adapt":{}}', "\ufeff{}", "")
    ):
        fake_write(t / str(i), 1)
        (t / str(i) / "config.json").write_text(text)
        held = contents(t / str(i))
        refused(lambda: fake_write(t / str(i), 3), "config.json")
        refused(lambda: read_runs([t / str(i)]), "config.json")
        need(contents(t / str(i)) == held, "changed")


def attack_summary_values(t):
    write_run(t / "run", images=8)
    path = t / "run" / "summary.json"
    whole = json.loads(path.read_text())
    for name, value in (
        ("images", -1),
        ("images", 1.5),
        ("images", None),
        ("seconds", {"a": "b"}),
        ("seconds", {"a": -1}),
        ("classes", "abc"),
        ("classes", [1]),
        ("environment", {"a": 1}),
        ("wall_seconds", None),
        ("wall_seconds", -1),
        ("groups", []),
        ("records", "x"),
        ("config", {}),
        ("errors", "0"),
    ):
        path.write_text(json.dumps({**whole, name: value}))
        refused(lambda: read_page(t / "run"), "summary.json")


def attack_summary_nan(t):
    write_run(t / "run", images=8)
    path = t / "run" / "summary.json"
    whole = json.loads(path.read_text())
    for name, value in (("wall_seconds", float("nan")), ("seconds", {"load": float("nan"), "adapt": 1.0})):
        path.write_text(json.dumps({**whole, name: value}))
        found = either(lambda: read_page(t / "run"))
        need(
            ("damaged" in found and len(found) < 1000) or "nan" not in found.lower().replace("nanosecond", "").split("<script")[0],
            f"{name} NaN is taken, and shown on the page",
        )


# --- states


def stopped_online(t):
    class Stop(Exception):
        pass

    def advance(some):
        raise Stop

    try:
        evaluate(online_run(digits_root()), t / "run", advance=advance)
    except Stop:
        pass
    return t / "run", next((t / "run").glob("state-*"))


def attack_state_bits_flipped(t):
    run, state = stopped_online(t)
    whole, draw = state.read_bytes(), random.Random(1)
    records = (run / "records.jsonl").read_bytes()
    from dtta_fast.runs.state import read_state

    config = json.loads((run / "config.json").read_text())
    taken = 0
    for k in range(12):
        at = draw.choice((draw.randrange(8), draw.randrange(2000), draw.randrange(len(whole))))
        state.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :])
        try:
            read_state(state, 0, config, "cpu")
            taken += 1
        except ValueError as error:
            need(state.name in str(error), str(error)[:100])
    state.write_bytes(whole[: len(whole) // 3])
    refused(lambda: evaluate(online_run(digits_root()), run), state.name)
    need((run / "records.jsonl").read_bytes() == records, "records changed")
    state.write_bytes(whole)
    need(taken == 0, f"{taken} flipped states were taken")


def attack_state_swapped(t):
    run, state = stopped_online(t)
    held = state.read_bytes()
    for name, change in (
        ("missing", lambda: state.unlink()),
        ("empty", lambda: state.write_bytes(b"")),
        ("zeros", lambda: state.write_bytes(bytes(len(held)))),
        ("pipe", lambda: (state.unlink(), os.mkfifo(state))),
    ):
        change()
        before = (run / "records.jsonl").read_bytes()
        if name == "pipe":
            status, error = forked(lambda: evaluate(online_run(digits_root()), run), timeout=8)
            need(status == 3 and "state-0" in error, f"pipe: {status} {error[:200]}")
        else:
            refused(lambda: evaluate(online_run(digits_root()), run), state.name)
        need((run / "records.jsonl").read_bytes() == before, f"{name}: records changed")


def attack_state_of_another_batch_renamed(t):
    with fake(t / "run") as opened:
        opened.save_state(0, STATE)
        opened.append(0, [SIX[i] for i in BATCHES[0]])
    held = (t / "run" / "state-00000000.safetensors").read_bytes()
    (t / "run" / "state-00000001.safetensors").write_bytes(held)
    with fake(t / "run") as opened:
        refused(lambda: opened.load_state(1, "cpu"), "state-00000001")
        opened.load_state(0, "cpu")


def attack_state_of_another_config(t):
    with fake(t / "run") as opened:
        opened.save_state(0, STATE)
    other = {**CONFIG, "adapt": {"steps": 2}}
    with fake(t / "other", config=other) as opened:
        opened._begin()
        shutil.copy(t / "run" / "state-00000000.safetensors", t / "other")
        refused(lambda: opened.load_state(0, "cpu"), "checksum")


# --- kills


def kill_and_resume(t, number, seed, run, whole):
    draw = random.Random(seed)
    for k in range(3):
        forked(lambda: evaluate(run, t / "run"), kill=number, after=draw.uniform(0.02, 0.5))
    evaluate(run, t / "run")
    need(without_seconds(t / "run") == without_seconds(whole), "the records are not those of an undisturbed run")
    need(set(os.listdir(t / "run")) == set(os.listdir(whole)), f"left: {sorted(os.listdir(t / 'run'))}")


def attack_kill_sigkill(t):
    kill_and_resume(t, signal.SIGKILL, 1, folder_run(digits_root()), finished())


def attack_kill_sigterm(t):
    kill_and_resume(t, signal.SIGTERM, 2, folder_run(digits_root()), finished())


def attack_kill_sigint(t):
    kill_and_resume(t, signal.SIGINT, 3, folder_run(digits_root()), finished())


def attack_kill_online_sigkill(t):
    kill_and_resume(t, signal.SIGKILL, 4, online_run(digits_root()), finished_online())


def attack_kill_online_sigint(t):
    kill_and_resume(t, signal.SIGINT, 5, online_run(digits_root()), finished_online())


def attack_kill_folder_operations(t):
    """SIGKILL within the writing of the run's files, at every system call that the folder makes in Python."""
    fake_write(t / "whole", 3, finish=True)
    whole = contents(t / "whole")
    calls = ("open", "write", "fsync", "close", "ftruncate", "unlink", "replace", "rename", "listdir")
    for at in range(1, 40, 2):
        place = t / f"run{at}"

        def work():
            left = [at]

            def counted(real):
                def call(*args, **kwargs):
                    left[0] -= 1
                    if not left[0]:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*args, **kwargs)

                return call

            for name in calls:
                setattr(os, name, counted(getattr(os, name)))
            fake_write(place, 3, finish=True)

        forked(work)
        fake_write(place, 3, finish=True)
        need(contents(place) == whole, f"killed at call {at}: {sorted(contents(place))}")


# --- results: --json, --out


def attack_json_is_the_lock_of_a_run(t):
    fake_write(t / "run", 1)
    held = fake(t / "run")
    try:
        status, _, err = command("env", "--json", t / "run" / "lock")
        taken = either(lambda: fake(t / "run").__exit__())
        need(
            taken is not None and "being written" in taken,
            f"the lock of a run that is going was replaced by a result (status {status}), and a second process writes to its folder",
        )
    finally:
        held.__exit__()


def attack_json_by_a_link_to_a_run_s_summary(t):
    write_run(t / "run", images=8)
    (t / "out.json").symlink_to(t / "run" / "summary.json")
    refused(lambda: check_path("json", t / "out.json", holds("groups", "environment", "wall_seconds")), "json")


def attack_json_over_files_of_others(t):
    for name, held in (("a.json", b'{"mine": 1}'), ("b.json", b"["), ("c.json", b"[" * 10**5), ("d", b"\0"), ("e", b"NaN")):
        (t / name).write_bytes(held)
        err = told("env", "--json", t / name)
        need((t / name).read_bytes() == held and name in err, f"{name}: {err}")


def attack_json_odd_places(t):
    (t / "dir").mkdir()
    (t / "loop").symlink_to(t / "loop")
    (t / "dangling").symlink_to(t / "no" / "where")
    for place in (
        t / "dir",
        t / "loop",
        t / "dangling",
        t / "no" / "x.json",
        t / ("a" * 300),
        "",
        ".",
        "/",
        "/proc/1/x",
        t / "dir" / "..",
        "/dev/full",
    ):
        err = told("env", "--json", place)
        need(err.count("\n") == 1, f"{place}: {err!r}")


def attack_json_device_and_pipe(t):
    os.mkfifo(t / "pipe")
    need(command("env", "--json", "/dev/null")[0] == 0, "/dev/null")
    need(os.path.exists("/dev/null") and not os.path.isfile("/dev/null"), "the device was replaced")


def attack_report_out_over_files_of_others(t):
    write_run(t / "run", images=8)
    (t / "page.html").write_text("<!doctype html><title>mine</title>")
    err = told("report", t / "run", "--out", t / "page.html")
    need("page.html" in err and "mine" in (t / "page.html").read_text(), err)
    for name in ("config.json", "records.jsonl", "summary.json", "records-1.jsonl", "state-00000001.safetensors"):
        told("report", t / "run", "--out", t / "run" / name)


def attack_report_out_over_the_lock(t):
    fake_write(t / "run", 3)
    status, _, err = command("report", t / "run", "--out", t / "run" / "lock")
    need(status == 2 and (t / "run" / "lock").read_bytes() == b"", f"the run's lock was replaced by the page (status {status})")


def attack_page_forged_title(t):
    """A page of somebody that only mentions a report's title deep inside."""
    path = t / "x.html"
    path.write_text("<!doctype html><title>thesis</title><p>It quotes &lt;title&gt; of a page: – dtta report</title></p>")
    need(not is_page(path), "a page of others counts as an earlier report, and would be replaced")


# --- reports of strangers


def attack_report_html_injection(t):
    def change(record):
        record["path"] = f"{EVIL}\"'><img src=x onerror=alert(1)>{record['image_id']}"
        record["group"] = f"</title></svg>{EVIL}"

    name = "r<b>\"'&{{7*7}}\x1b[31m"
    write_run(t / name, images=10, change=change, failed=2, **{"lr<script>": "</script><script>alert(2)"})
    for file in ("summary.json", "config.json"):
        path = t / name / file
        whole = json.loads(path.read_text())
        inner = whole if file == "config.json" else whole["config"]
        inner["model"] = "<script>alert(3)</script>"
        if file == "summary.json":
            whole["classes"] = [f"<svg onload=alert({k})>{EVIL}" for k in range(7)]
            whole["environment"] = {"<script>k": "<script>v"}
            whole["seconds"] = {"<script>p</script>": 1.0}
        path.write_text(json.dumps(whole))
    page = read_page(t / name)
    for bad in ("<script>alert", "<img src=x", "<svg onload", '<b>"', "<script>k", "<script>v", "<script>p", "49", "</title></svg>"):
        need(bad not in page or bad == "49", f"{bad!r} is in the page unescaped")
    status, out, err = command("report", t / name, "--out", t / "page.html")
    need(status == 0, err)
    need("\x1b" not in out + err, "escapes are shown")


def attack_report_denormal_numbers(t):
    """Losses and scores that the schema takes, and whose difference no division survives."""
    for i, (low, high) in enumerate(
        ((0.0, 5e-324), (0.0, 1e-322), (0.0, 1e-310), (1e30, 9.9e29), (-1e30, 1e30), (1.0, 1.0000000000000002))
    ):

        def change(record):
            record["loss"] = [low, high]

        write_run(t / f"r{i}", images=8, change=change)
        try:
            read_page(t / f"r{i}")
        except ValueError as error:
            raise Fell(f"losses {low}, {high}: ValueError {error}") from error
        except ArithmeticError as error:
            raise Fell(f"losses {low}, {high}: {type(error).__name__}: {error}") from error


def attack_report_extreme_scores(t):
    for i, (low, high) in enumerate(((0.0, 5e-324), (0.0, 2e-323), (1e30, -1e30), (1e30, 1e30))):

        def change(record):
            record["score_before"], record["score"] = ({"abs_rel": low, "rmse": high}, {"abs_rel": high, "rmse": low})

        write_run(t / f"r{i}", "depth", images=8, change=change)
        try:
            read_page(t / f"r{i}")
        except (ValueError, ArithmeticError) as error:
            raise Fell(f"scores {low}, {high}: {type(error).__name__}: {error}") from error


def attack_report_extreme_counts(t):
    for i, (field, value) in enumerate(
        (
            ("evaluations", 2**53),
            ("evaluations", 0),
            ("seconds", 1e12),
            ("seconds", 5e-324),
            ("confidence", 5e-324),
            ("loss", []),
            ("loss", [None] * 3),
            ("loss", [0.0] * 5000),
            ("top", []),
            ("label", -(2**31)),
            ("label", 2**31 - 1),
        )
    ):

        def change(record):
            record[field] = value

        write_run(t / f"r{i}", images=8, change=change)
        try:
            read_page(t / f"r{i}")
        except (ValueError, ArithmeticError, LookupError, TypeError) as error:
            raise Fell(f"{field} {str(value)[:20]}: {type(error).__name__}: {error}") from error


def attack_report_of_strangers(t):
    (t / "empty").mkdir()
    (t / "file").write_text("x")
    (t / "r").mkdir()
    (t / "r" / "records.jsonl").write_text("")
    for place in (t / "empty", t / "file", t / "none", t / "a\nb", "", "/", "/proc", "/dev/null"):
        err = told("report", place, "--out", t / "p.html")
        need(err.count("\n") == 1, repr(err))
    need(isinstance(either(lambda: read_page(t / "r")), str), "no page")


def attack_report_twice_and_links(t):
    write_run(t / "run", images=8)
    (t / "link").symlink_to(t / "run")
    told("report", t / "run", t / "link", "--out", t / "p.html")
    told("report", t / "run", t / "run", "--out", t / "p.html")


def attack_report_reads_nothing_that_is_named(t):
    """A config that names a pipe as root, a pipe as model: nothing waits."""
    os.mkfifo(t / "pipe")
    write_run(t / "run", images=8)
    for file in ("config.json", "summary.json"):
        path = t / "run" / file
        path.write_text(
            path.read_text().replace('"nowhere"', json.dumps(str(t / "pipe"))).replace('"model": "zoo"', f'"model": "{t}/pipe"')
        )
    status, error = forked(lambda: main(["report", str(t / "run"), "--out", str(t / "p.html")]), timeout=8)
    need(status == 0, f"{status} {error}")


def attack_report_root_of_another_set(t):
    write_run(t / "run", images=8)
    digit_folder(t / "root")
    status, out, err = command("report", t / "run", "--root", t / "root", "--out", t / "p.html")
    need(status == 0 and "data:image/" not in (t / "p.html").read_text(), f"thumbnails of another set: {status} {err}")


def attack_report_hostile_root(t):
    """Image files of the data set are damaged or pipes meanwhile: a page without thumbnails."""
    root = digit_folder(t / "root")
    evaluate(folder_run(root), t / "run")
    for path in sorted(root.rglob("*.png"))[:5]:
        path.unlink()
        os.mkfifo(path)
    status, error = forked(lambda: main(["report", str(t / "run"), "--root", str(root), "--out", str(t / "p.html")]), timeout=10)
    need(status == 0, f"{status} {error}")


def attack_report_data_names(t):
    """Data sets of a stranger's config: unknown, of the hub, with corruptions that lead out."""
    for i, data in enumerate(
        (
            {"name": "hf", "root": "evil/set"},
            {"name": "x\x1b[31m"},
            {"name": "imagenet-c", "root": "r", "corruptions": ["../../etc"]},
            {"name": "digits-c", "corruptions": ["fog"] * 3},
            {"name": "digits-c", "severities": [10**9]},
            {"name": "webdataset", "root": "{000000000..999999999}"},
            {"name": "digits", "split": "../x"},
        )
    ):
        write_run(t / f"r{i}", images=6)
        for file in ("config.json", "summary.json"):
            path = t / f"r{i}" / file
            whole = json.loads(path.read_text())
            (whole if file == "config.json" else whole["config"])["data"] = data
            path.write_text(json.dumps(whole))
        status, out, err = command("report", t / f"r{i}", "--root", t, "--out", t / "p.html")
        need(status in (0, 2) and "Traceback" not in err, f"{data}: {status} {err}")


# --- images


def attack_image_wrong_suffix_polyglot(t):
    gif = io.BytesIO()
    Image.new("P", (8, 8)).save(gif, "GIF")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"
    for name, data in (
        ("a.png", eps),
        ("b.jpg", b"%PDF-1.4"),
        ("c.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
        ("d.bmp", b"MZ" + bytes(100)),
        ("e.png", b""),
        ("f.png", bytes(1000)),
        ("g.webp", b"RIFF\xff\xff\xff\xffWEBPVP8 "),
        ("h.tif", b"II*\0\xff\xff\xff\xff"),
        ("i.png", png()[:40]),
        ("j.jpg", b"\xff\xd8\xff\xd9"),
        ("k.ico", b"\0\0\1\0\1\0"),
        ("l.png", b"8BPS\0\1" + bytes(60)),
    ):
        refused(lambda: read_image(picture(t, data, name)), name)
    need(read_image(picture(t, gif.getvalue(), "m.png")).shape == (3, 8, 8), "a GIF named .png")


def attack_image_modes(t):
    rng = np.random.default_rng(0)
    made = {
        "la.png": Image.fromarray(rng.integers(0, 255, (9, 7, 2), np.uint8), "LA"),
        "i16.png": Image.fromarray(rng.integers(0, 2**16, (9, 7)).astype(np.uint16)),
        "one.png": Image.new("1", (7, 9), 1),
        "p.png": Image.new("P", (7, 9), 3),
        "cmyk.jpg": Image.new("CMYK", (7, 9), (1, 2, 3, 4)),
        "cmyk.tif": Image.new("CMYK", (7, 9), (1, 2, 3, 4)),
        "i32.tif": Image.fromarray(rng.integers(0, 2**16, (9, 7)).astype(np.int32)),
        "ycc.tif": Image.new("YCbCr", (7, 9), (1, 2, 3)),
        "rgba.webp": Image.new("RGBA", (7, 9), (1, 2, 3, 0)),
    }
    for name, image in made.items():
        image.save(t / name)
        found = read_image(t / name)
        need(found.shape == (3, 9, 7) and 0 <= float(found.min()) <= float(found.max()) <= 1, f"{name}: {tuple(found.shape)}")
    Image.new("P", (7, 9), 3).save(t / "pt.png", transparency=bytes(range(200)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_image(t / "pt.png")
    Image.fromarray(np.full((9, 7), 0.5, np.float32)).save(t / "f.tif")
    refused(lambda: read_image(t / "f.tif"), "f.tif", "floats")


def attack_image_sixteen_bits_are_scaled(t):
    values = np.array([[0, 255, 256, 65535]] * 4, np.uint16)
    Image.fromarray(values).save(t / "x.png")
    Image.fromarray(values).save(t / "x.tif")
    (t / "x.pgm").write_bytes(b"P5 4 4 65535\n" + values.astype(">u2").tobytes())
    for name in ("x.png", "x.tif", "x.pgm"):
        found = (read_image(t / name)[0, 0] * 255).tolist()
        need([round(v) for v in found] == [0, 0, 1, 255], f"{name}: {found}")


def attack_image_exif(t):
    base = Image.fromarray(np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3))
    for orientation in (*range(10), 65535):
        exif = Image.Exif()
        exif[0x112] = orientation
        base.save(t / "x.png", exif=exif)
        found = read_image(t / "x.png")
        need(tuple(found.shape) == ((3, 4, 6) if orientation in (5, 6, 7, 8) else (3, 6, 4)), f"{orientation}: {tuple(found.shape)}")
    for junk in (b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"\xff" * 500, b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12\0\x03" * 40):
        base.convert("RGB").save(t / "x.jpg", exif=junk)
        either(lambda: read_image(t / "x.jpg"))


def attack_image_png_chunks(t):
    whole = png((20, 20))
    at = 33
    cases = {
        "iccp": chunk(b"iCCP", b"x\0\0" + b"junk" * 10),
        "iccp bomb": chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(80_000_000))),
        "ztxt bomb": chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(80_000_000))),
        "actl": chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)),
        "trns": chunk(b"tRNS", b"\0"),
        "plte": chunk(b"PLTE", b"\0" * 5),
        "exif": chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff"),
        "second ihdr": chunk(b"IHDR", struct.pack(">II5B", 50000, 50000, 8, 2, 0, 0, 0)),
        "gama": chunk(b"gAMA", b"\0" * 4),
        "phys": chunk(b"pHYs", b"\0"),
    }
    for name, extra in cases.items():
        path = picture(t, whole[:at] + extra + whole[at:], "x.png")
        begun = time.monotonic()
        found = either(lambda: read_image(path))
        need(not isinstance(found, str) or "x.png" in found, f"{name}: {found}")
        need(time.monotonic() - begun < 3, f"{name}: slow")


def attack_image_sizes(t):
    for size in ((1, 65), (65, 1), (2, 129), (1000, 15)):
        Image.new("L", size).save(t / "x.png")
        refused(lambda: read_image(t / "x.png"), "x.png", "64 times")
    ihdr = struct.pack(">II5B", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)
    refused(
        lambda: read_image(picture(t, b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", ihdr) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))), "x.png"
    )
    ihdr = struct.pack(">II5B", 0, 5, 8, 2, 0, 0, 0)
    refused(
        lambda: read_image(picture(t, b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", ihdr) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))), "x.png"
    )
    (t / "x.ppm").write_bytes(b"P6 " + b"9" * 5000 + b" 1 255\n")
    refused(lambda: read_image(t / "x.ppm"), "x.ppm")
    (t / "x.ppm").write_bytes(b"P6 -5 -5 255\n" + bytes(75))
    refused(lambda: read_image(t / "x.ppm"), "x.ppm")


def attack_image_animated(t):
    frames = [Image.new("RGB", (10, 12), (k, 0, 0)) for k in (0, 255)]
    for name in ("a.gif", "a.webp", "a.png", "a.tif"):
        frames[0].save(t / name, save_all=True, append_images=frames[1:])
        found = read_image(t / name)
        need(found.shape == (3, 12, 10) and float(found[0].max()) < 0.1, f"{name}: not the first frame")


def attack_image_truncated_everywhere(t):
    draw = random.Random(0)
    for name, options in (("x.png", {}), ("x.jpg", {}), ("x.bmp", {}), ("x.tif", {}), ("x.webp", {}), ("x.gif", {}), ("x.ppm", {})):
        Image.effect_noise((40, 40), 90).convert("RGB").save(t / name, **options)
        whole = (t / name).read_bytes()
        for _ in range(12):
            cut = bytearray(whole[: draw.randrange(len(whole))])
            if draw.random() < 0.5:
                cut = bytearray(whole)
                cut[draw.randrange(len(cut))] ^= 1 << draw.randrange(8)
            (t / name).write_bytes(bytes(cut))
            found = either(lambda: read_image(t / name))
            need(not isinstance(found, str) or name in found, found)


def attack_image_links_and_devices(t):
    (t / "loop.png").symlink_to(t / "loop.png")
    (t / "zero.png").symlink_to("/dev/zero")
    (t / "self.png").symlink_to("/proc/self/mem")
    os.mkfifo(t / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(t)
        server.bind("s.png")
        os.chdir("/")
        for name in ("loop.png", "zero.png", "pipe.png", "s.png", "self.png"):
            status, error = forked(lambda: read_image(t / name), timeout=4)
            need(status == 3 and error.startswith("ValueError") and name in error, f"{name}: {status} {error[:200]}")


def attack_folder_link_loops(t):
    digit_folder(t / "root")
    (t / "root" / "0" / "up").symlink_to(t / "root")
    (t / "root" / "1" / "self").symlink_to(t / "root" / "1" / "self")
    (t / "root" / "2" / "x").symlink_to(t / "root" / "3")
    (t / "root" / "3" / "x").symlink_to(t / "root" / "2")
    status, error = forked(lambda: open_folder(t / "root"), timeout=8)
    need(status in (0, 3), f"{status} {error}")
    data = open_folder(t / "root")
    need(len(data) < 100, f"{len(data)} images of ten files")


def attack_folder_link_bomb(t):
    """Each folder links twice to the next: ways through double. security.md promises no bound, so few of them, and that it ends."""
    (t / "root" / "c").mkdir(parents=True)
    for k in range(9):
        (t / f"d{k}").mkdir()
    Image.new("RGB", (8, 8)).save(t / "root" / "c" / "x.png")
    for k in range(8):
        for name in "ab":
            (t / f"d{k}" / name).symlink_to(t / f"d{k + 1}")
    (t / "root" / "c" / "in").symlink_to(t / "d0")
    status, error = forked(lambda: open_folder(t / "root"), timeout=5)
    need(status in (0, 3), f"{status}")


def attack_folder_odd_names(t):
    root = t / "root"
    names = ["a\nb", "é", "e\u0301", EVIL.replace("/", "_"), " ", "x. ", "\udcfe", "A", "a"]
    for name in names:
        (root / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), 5).save(root / name / ("i" + name + ".PNG"), "PNG")
    data = open_folder(root)
    need(len(set(data.names)) == len(names), f"{len(set(data.names))} names")
    for i in range(len(data)):
        data[i]


# --- other data sets


def tar_of(path, members, **options):
    with tarfile.open(path, "w", **options) as archive:
        for name, data, change in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            change(info)
            archive.addfile(info, io.BytesIO(data))
    return path


def attack_tar_members(t):
    plain = lambda info: None

    def link(info):
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"

    def hard(info):
        info.type, info.linkname = tarfile.LNKTYPE, "a.png"

    def fifo(info):
        info.type = tarfile.FIFOTYPE

    tar_of(
        t / "a.tar",
        [
            ("a.png", png(), plain),
            ("a.cls", b"3", plain),
            ("../../b.png", png(), plain),
            ("../../b.cls", b"4", plain),
            ("/c.png", png(), plain),
            ("/c.cls", b"1", plain),
            ("d.png", b"", link),
            ("e.png", b"", hard),
            ("f.png", b"", fifo),
        ],
    )
    data = open_images("webdataset", t / "a.tar")
    need(len(data) == 3, f"{data.names}")
    for i in range(len(data)):
        data[i]
    need(set(os.listdir(t)) == {"a.tar"}, "something was unpacked")


def attack_tar_labels_and_doubles(t):
    plain = lambda info: None
    for i, label in enumerate((b"-1", b"1.5", b"x", b"", b"9" * 100, "٣".encode(), b"0x1", b"\xff")):
        tar_of(t / f"{i}.tar", [("a.png", png(), plain), ("a.cls", label, plain)])
        refused(lambda: open_images("webdataset", t / f"{i}.tar"), f"{i}.tar")
    tar_of(t / "d.tar", [("a.png", png(), plain), ("a.PNG", png(), plain)])
    refused(lambda: open_images("webdataset", t / "d.tar"), "twice")
    tar_of(t / "n.tar", [("a.txt", b"x", plain)])
    refused(lambda: open_images("webdataset", t / "n.tar"), "no image")
    tar_of(t / "e.tar", [])
    refused(lambda: open_images("webdataset", t / "e.tar"))


def attack_tar_damaged(t):
    plain = lambda info: None
    tar_of(t / "a.tar", [(f"{k}.png", png(), plain) for k in range(3)])
    whole, draw = (t / "a.tar").read_bytes(), random.Random(2)
    for _ in range(80):
        data = bytearray(whole)
        at = draw.randrange(512)
        data[draw.choice((0, 512, 1024)) + at % 512] = draw.choice((0, 255, 0x80, 0x37))
        (t / "a.tar").write_bytes(bytes(data))
        found = either(lambda: open_images("webdataset", t / "a.tar"))
        need(not isinstance(found, str) or "a.tar" in found, found)


def attack_tar_pattern_bombs(t):
    for pattern in (
        "{0..999999999}.tar",
        "{a,b}" * 40 + ".tar",
        "{{a}}.tar",
        "{}.tar",
        "{5..1}.tar",
        "*" * 5000,
        "[" * 300,
        "{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}.tar",
        "\0.tar",
    ):
        begun = time.monotonic()
        refused(lambda: open_images("webdataset", t / pattern))
        need(time.monotonic() - begun < 3, f"{pattern[:20]} took {time.monotonic() - begun:.1f} s")


def attack_npy_forms(t):
    good = np.zeros((50, 32, 32, 3), np.uint8)
    cases = {
        "object": np.array([{}, []], dtype=object),
        "float": good.astype(float),
        "shape": good[0],
        "channels": good[..., :2],
        "odd": good[:7],
        "none": good[:0],
        "flat": np.zeros((5, 1, 500, 3), np.uint8),
        "fortran": np.asfortranarray(good.astype(np.int8)),
        "struct": np.zeros(5, [("a", "u1")]),
        "big": good.astype(">u2"),
        "zero d": np.array(3),
        "text": np.array(["a"] * 5),
        "date": np.array(["2001-01-01"] * 5, "M8"),
    }
    for name, array in cases.items():
        place = t / name
        place.mkdir()
        np.save(place / "labels.npy", np.arange(10))
        np.save(place / "fog.npy", array, allow_pickle=True)
        refused(lambda: open_images("cifar10-c", place), "fog.npy" if name != "none" else "fog")
        np.save(place / "fog.npy", good)
        np.save(place / "labels.npy", array, allow_pickle=True)
        refused(lambda: open_images("cifar10-c", place), "labels.npy")


def attack_npy_headers(t):
    head = lambda text: b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text.encode("latin1")
    np.save(t / "labels.npy", np.arange(10))
    for text in (
        "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000, 32, 32, 3), }\n",
        "{'descr': '|O', 'fortran_order': False, 'shape': (5,), }\n",
        "__import__('os').system('x')\n",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (-5, 32, 32, 3), }\n",
        "(" * 5000,
        "{'descr': '|u1'}",
        "",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (True, 32, 32, 3), }\n",
        "{'descr': [('a','|u1')]*3, 'fortran_order': 0, 'shape': 5}",
        "9" * 9000,
        "{'descr': '|V99999999999', 'fortran_order': False, 'shape': (5,), }\n",
        "{'descr': '', 'fortran_order': False, 'shape': (2**70,), }\n",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (9223372036854775807, 9223372036854775807, 2, 3), }\n",
    ):
        (t / "fog.npy").write_bytes(head(text) + bytes(100))
        try:
            refused(lambda: open_images("cifar10-c", t), "fog")
        except Fell:
            raise
        except Exception as error:
            raise Fell(f"header {text[:60]!r}: {type(error).__name__}: {error}") from error
    np.savez(t / "fog.npz", a=np.zeros(3))
    (t / "fog.npz").rename(t / "fog.npy")
    refused(lambda: open_images("cifar10-c", t), "fog.npy")


def attack_npy_truncated_after_opening(t):
    """A mapped array whose file is cut while the run goes on: an error record, and no dead process."""
    np.save(t / "fog.npy", np.zeros((500, 32, 32, 3), np.uint8))
    np.save(t / "labels.npy", np.arange(100) % 10)

    def work():
        data = open_images("cifar10-c", t)
        data[0]
        os.truncate(t / "fog.npy", 4096)
        try:
            data[499]
        except (ValueError, OSError):
            pass

    status, error = forked(work, timeout=5)
    need(status == 0, f"the process died of signal {-status}: a mapped file that shrinks kills the run" if status < 0 else error)


def attack_h5_forms(t):
    import h5py
    from scipy.io import savemat

    savemat(t / "splits.mat", {"testNdxs": np.array([[1], [2]]), "trainNdxs": np.array([[1]])})
    path = t / "nyu_depth_v2_labeled.mat"
    images, depths = np.zeros((2, 3, 20, 16), np.uint8), np.ones((2, 20, 16), np.float32)

    def made(**arrays):
        with h5py.File(path, "w") as file:
            for name, value in arrays.items():
                file[name] = value

    for arrays in (
        {},
        {"images": images},
        {"images": images.astype(np.float32), "depths": depths},
        {"images": images[:1], "depths": depths},
        {"images": images[:, :2], "depths": depths},
        {"images": images, "depths": depths.astype(complex)},
        {"images": images, "depths": np.array([b"a", b"b"])},
        {"images": images, "depths": h5py.SoftLink("/images")},
        {"images": images, "depths": h5py.ExternalLink("/etc/passwd", "/x")},
        {"images": images[..., :1, :1].repeat(200, 2), "depths": depths},
    ):
        made(**arrays)
        refused(lambda: open_images("nyuv2", t, size=16), "nyu")
    made(images=images, depths=np.full((2, 20, 16), np.nan))
    data = open_images("nyuv2", t, size=16)
    refused(lambda: data[0], "NaN")
    data._data.close()  # HDF5 shares what a process has open
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    refused(lambda: open_images("nyuv2", t, size=16), "nyu")
    made(images=images, depths=depths)
    for numbers in ([[0]], [[3]], [[-1]], [[1.5]], [[np.nan]], np.zeros((0, 0)), "abc"):
        savemat(t / "splits.mat", {"testNdxs": numbers})
        found = either(lambda: open_images("nyuv2", t, size=16))
        need(isinstance(found, str) or len(found) == 1, f"{numbers}")


def attack_map_folder_forms(t):
    for place in ("images", "maps"):
        (t / place).mkdir()
    Image.new("RGB", (20, 20)).save(t / "images" / "a.png")
    (t / "classes.txt").write_text("a\nb\n")
    for name, image in (
        ("rgb", Image.new("RGB", (20, 20))),
        ("size", Image.new("L", (21, 20))),
        ("label", Image.new("L", (20, 20), 77)),
        ("none", Image.new("L", (20, 20), 255)),
    ):
        image.save(t / "maps" / "a.png")
        data = open_images("map-folder", t, size=16)
        refused(lambda: data[0], "a.png")
    (t / "maps" / "a.png").write_bytes(b"x")
    refused(lambda: open_images("map-folder", t, size=16)[0], "a.png")
    (t / "classes.txt").write_bytes(b"\xff\xfe")
    refused(lambda: open_images("map-folder", t, size=16), "classes.txt")
    (t / "classes.txt").unlink()
    os.mkfifo(t / "classes.txt")
    status, _ = forked(lambda: open_images("map-folder", t, size=16), timeout=4)
    need(status in (0, 3), "it waits for a pipe")


def attack_hf_saved_tables(t):
    import datasets

    table = datasets.Dataset.from_dict(
        {
            "image": [{"bytes": png(), "path": None}, {"bytes": None, "path": "/etc/passwd"}, {"bytes": b"", "path": "../x.png"}, None],
            "label": [0, 1, 0, 1],
        },
        features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", EVIL])}),
    )
    table.save_to_disk(t / "set")
    data = open_images("hf", t / "set")
    data[0]
    for i in (1, 2, 3):
        refused(lambda: data[i])
    state = json.loads((t / "set" / "state.json").read_text())
    for name in ("../x.arrow", "/etc/passwd", "", 5, None, "a\0b"):
        (t / "set" / "state.json").write_text(json.dumps({**state, "_data_files": [{"filename": name}]}))
        refused(lambda: open_images("hf", t / "set"), "set")
    (t / "set" / "state.json").write_text(json.dumps(state))
    arrow = next((t / "set").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:100])
    refused(lambda: open_images("hf", t / "set"), "set")


def attack_hf_hub_like_ids_offline(t):
    for name in ("evil/set", "a/b/c", "../x", "-x", "https://example.invalid/x", "s3://b/x", "a" * 200):
        err = told("evaluate", t / "run", "--data", "hf", f"--root={name}", "--per-class", "1")
        need(err.count("\n") == 1, repr(err[-300:]))
    need(not (t / "run").exists(), "a folder was made")


def attack_imagenet_c_severities(t):
    for severity in ("1", "９", "٣", "9" * 5000 if False else "99", "-1", "1.0", " 2"):
        place = t / "fog" / severity / "n01440764"
        place.mkdir(parents=True)
        (place / "x.JPEG").write_bytes(png())
    found = either(lambda: open_images("imagenet-c", t))
    need(isinstance(found, str) or len(found) <= 7, "")


def attack_cli_evaluate_damaged_sets(t):
    """Each set on a folder of junk: one line, status 2."""
    from dtta_fast.data.images import _readers

    (t / "junk").mkdir()
    (t / "junk" / "x.txt").write_text("x")
    for name, reader in _readers().items():
        if not reader.needs or name == "hf":
            continue
        task = ["--task", "segmentation"] if reader.maps else []
        err = told("evaluate", t / "run", "--data", name, "--root", t / "junk", *task)
        need(err.count("\n") == 1 and err.startswith("dtta evaluate: "), f"{name}: {err[-300:]!r}")


# --- archives, checkpoints, calibrations


def archive(t, change=lambda b: b, members=(("p/data.pkl", b"x"), ("p/version", b"3"))):
    path = t / "x.pt2"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for name, data in members:
            file.writestr(name, data)
    path.write_bytes(change(path.read_bytes()))
    return path


def attack_zip_fields_flipped(t):
    """Every byte of a small archive's headers changed: refused, or every reader reads the same."""
    whole = archive(t).read_bytes()
    check_archive(t / "x.pt2")
    with zipfile.ZipFile(t / "x.pt2") as file:
        names = [info.filename for info in file.infolist()]
    draw, odd = random.Random(0), []
    for at in range(len(whole)):
        for value in {whole[at] ^ 1, 0xFF, 0} - {whole[at]}:
            (t / "x.pt2").write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
            try:
                check_archive(t / "x.pt2")
            except ValueError:
                continue
            try:
                with zipfile.ZipFile(t / "x.pt2") as file:
                    for info in file.infolist():
                        file.read(info)
            except Exception as error:
                odd.append(f"{at}: {value} zipfile says {error}")
    need(len(odd) < 200, f"{len(odd)}: {odd[:3]}")


def attack_zip_inconsistencies(t):
    cases = {
        "prefix": lambda b: b"MZ" + b,
        "suffix": lambda b: b + b"x",
        "comment": lambda b: b[:-2] + b"\1\0x",
        "two": lambda b: b + b,
        "zeros": lambda b: b + bytes(22),
        "empty": lambda b: b"PK\5\6" + bytes(18),
        "end only": lambda b: b[-22:],
        "cut": lambda b: b[:-1],
        "gap": lambda b: b.replace(b"PK\1\2", b"\0PK\1\2", 1),
        "nothing": lambda b: b"",
        "count": lambda b: b[:-14] + b"\3\0\3\0" + b[-10:],
        "disk": lambda b: b[:-18] + b"\1\0" + b[-16:],
    }
    for name, change in cases.items():
        path = archive(t, change)
        try:
            refused(lambda: check_archive(path))
        except Fell as error:
            raise Fell(f"{name}: {error}") from error


def attack_zip_names(t):
    for name in (
        "../x",
        "/x",
        "a/../../x",
        "a//b",
        "./a",
        "a/./b",
        "C:/x",
        "a\\b",
        "a\nb",
        "a\x1b[31m",
        "a/ /b",
        "a/.. /b",
        "a/...",
        "\u202ex",
        "a:b",
        "x" * 600,
        "a/",
        "",
    ):
        path = t / "x.pt2"
        with zipfile.ZipFile(path, "w") as file:
            info = zipfile.ZipInfo("q")
            info.filename = name
            file.writestr(info, b"x")
        refused(lambda: check_archive(path))
    for pair in (("a", "A"), ("a", "a")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = archive(t, members=[(name, b"x") for name in pair])
        refused(lambda: check_archive(path), "twice")
    for pair in (("é", "e\u0301"), ("ß", "SS"), ("É", "é"), ("a/b", "a")):
        path = archive(t, members=[(name, b"x") for name in pair])
        check_archive_or = either(lambda: check_archive(path))


def attack_zip_case_beyond_ascii(t):
    """Names that differ in case beyond ASCII are one name to a file system that folds case."""
    path = archive(t, members=[("p/É", b"x"), ("p/é", b"y")])
    refused(lambda: check_archive(path), "twice")


def attack_zip_file_and_folder(t):
    """A member that is a file and another's folder: refused here, or by the loader in a line."""
    from dtta_fast import embed

    refused(lambda: embed.load(archive(t, members=[("p/a", b"x"), ("p/a/b", b"y")])), "x.pt2")


def attack_package_load(t):
    from dtta_fast import embed

    for change in (lambda b: b, lambda b: b[: len(b) // 2], lambda b: b"", lambda b: bytes(500)):
        path = archive(t, change)
        refused(lambda: embed.load(path), "x.pt2")
    os.mkfifo(t / "pipe.pt2")
    refused(lambda: embed.load(t / "pipe.pt2"), "pipe.pt2")
    refused(lambda: embed.load(t), str(t))
    (t / "dev.pt2").symlink_to("/dev/zero")
    refused(lambda: embed.load(t / "dev.pt2"), "dev.pt2")
    refused(lambda: embed.load(t / ("a" * 300)))


def attack_package_manifest(t):
    from dtta_fast.embed.manifest import FIELDS, Manifest

    for value in ("", "{", "null", "[]", "NaN", "9" * 5000, "[" * 10**5, '{"a": NaN}', "\x1b[31m"):
        refused(lambda: Manifest.from_metadata({field.name: value for field in FIELDS}, t / "x.pt2"), "x.pt2")
        refused(lambda: Manifest.from_metadata({"manifest": value}, t / "x.pt2"), "x.pt2")
    refused(lambda: Manifest.from_metadata({}, t / "x.pt2"), "x.pt2")


def attack_pt_pickles(t):
    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {t}/owned",))

    for i, value in enumerate(
        (
            Evil(),
            {"ema": Evil()},
            [],
            5,
            None,
            {},
            {"ema": 5},
            {"ema": {}},
            {5: torch.ones(2)},
            {"x_embedder.proj.weight": "a"},
            {"x_embedder.proj.weight": torch.ones(2, dtype=torch.int8)},
            {"x": torch.ones(2).to_sparse()},
            {"x": torch.ones(1).expand(10**9)},
            torch.ones(3),
        )
    ):
        torch.save(value, t / f"{i}.pt")
        try:
            refused(lambda: DiT.from_original(t / f"{i}.pt", num_heads=2), f"{i}.pt")
        except Fell:
            raise
        except Exception as error:
            raise Fell(f"{i}: {str(value)[:60]}: {type(error).__name__}: {error}") from error
    need(not (t / "owned").exists(), "code was run")


def attack_pt_legacy_and_odd_files(t):
    torch.save({"a": torch.ones(2)}, t / "old.pt", _use_new_zipfile_serialization=False)
    (t / "empty.pt").write_bytes(b"")
    (t / "text.pt").write_text("hello")
    (t / "pickle.pt").write_bytes(b"\x80\x04cos\nsystem\n(S'touch x'\ntR.")
    os.mkfifo(t / "pipe.pt")
    with tarfile.open(t / "tar.pt", "w"):
        pass
    for name in ("old.pt", "empty.pt", "text.pt", "pickle.pt", "pipe.pt", "tar.pt"):
        status, error = forked(lambda: DiT.from_original(t / name, num_heads=2), timeout=6)
        need(
            status == 3 and error.split(":")[0] in ("ValueError", "FileNotFoundError") and name in error, f"{name}: {status} {error[:200]}"
        )


def denoiser_copy(t):
    shutil.copytree(zoo.folder("digits") / "denoiser", t / "d")
    return t / "d"


def attack_safetensors_headers(t):
    place = denoiser_copy(t)
    path = place / "model.safetensors"
    whole = path.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    head = json.loads(whole[8 : 8 + size])
    body = whole[8 + size :]

    def put(found, data=body, length=None):
        text = found if isinstance(found, bytes) else json.dumps(found).encode()
        path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)

    name = next(key for key in head if key != "__metadata__")
    for change in (
        {"data_offsets": [0, 2**60]},
        {"data_offsets": [5, 1]},
        {"shape": [2**40, 2**40]},
        {"shape": [-1]},
        {"dtype": "X9"},
        {"dtype": "I8"},
        {"shape": []},
        {"data_offsets": "a"},
        {"shape": [0]},
    ):
        put({**head, name: {**head[name], **change}})
        refused(lambda: DiT.from_pretrained(place), "model.safetensors")
    put(head, length=2**63)
    refused(lambda: DiT.from_pretrained(place), "model.safetensors")
    put(b"[" * 10000)
    refused(lambda: DiT.from_pretrained(place), "model.safetensors")
    put({**head, EVIL: head[name]})
    refused(lambda: DiT.from_pretrained(place), "model.safetensors")
    put({key: value for key, value in head.items() if key != name})
    refused(lambda: DiT.from_pretrained(place), "model.safetensors")


def attack_dit_config_values(t):
    place = denoiser_copy(t)
    path = place / "config.json"
    config = json.loads(path.read_text())
    for key in config:
        for value in (None, -1, 0, 1.5, "x", [], {}, True, 10**12, 2**70, float("nan"), 10**400):
            path.write_text(json.dumps({**config, key: value}))
            try:
                found = either(lambda: DiT.from_pretrained(place))
            except Exception as error:
                raise Fell(f"{key} {str(value)[:20]!r}: {type(error).__name__}: {error}") from error
            need(not isinstance(found, str) or "config.json" in found or "model.safetensors" in found, f"{key} {value!r}: {found}")


def attack_scheduler_values(t):
    place = denoiser_copy(t)
    path = place / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    for key, value in (
        ("_class_name", "os.system"),
        ("_class_name", "LMSDiscreteScheduler"),
        ("_class_name", "FlaxDDPMScheduler"),
        ("num_train_timesteps", 10**9),
        ("num_train_timesteps", 0),
        ("num_train_timesteps", True),
        ("beta_start", "x"),
        ("beta_start", float("nan")),
        ("beta_start", -5),
        ("beta_end", 10**400),
        ("beta_schedule", "?"),
        ("trained_betas", [0.1]),
        ("trained_betas", "x"),
        ("prediction_type", "?"),
        ("prediction_type", 3),
        ("rescale_betas_zero_snr", "yes"),
        ("timestep_spacing", 4),
        ("steps_offset", 10**9),
        ("clip_sample_range", "x"),
    ):
        path.write_text(json.dumps({**config, key: value}))
        try:
            found = either(lambda: DiT.from_pretrained(place))
        except Exception as error:
            raise Fell(f"{key} {str(value)[:20]!r}: {type(error).__name__}: {error}") from error
        need(not isinstance(found, str) or str(t) in found, f"{key} {value!r}: {found}")


def attack_calibration_numbers(t):
    _, denoiser = digit_models()
    denoiser.calibration.save(t / "c.json")
    whole = json.loads((t / "c.json").read_text())
    for key, old in whole.items():
        for value in (
            None,
            "x",
            True,
            float("nan"),
            float("inf"),
            -1e300,
            10**400,
            1e7,
            [],
            [None],
            [float("nan")],
            {},
            [True] * len(old) if isinstance(old, list) else [1],
        ):
            if isinstance(old, list) and value == [] and key in ("typical", "scatter", "signal", "spread"):
                continue
            (t / "c.json").write_text(json.dumps({**whole, key: value}))
            try:
                refused(lambda: Calibration.load(t / "c.json", denoiser), "c.json")
            except Fell as error:
                raise Fell(f"{key} {str(value)[:20]}: {error}") from error
            except Exception as error:
                raise Fell(f"{key} {str(value)[:20]}: {type(error).__name__}: {error}") from error
    for junk in (b"", b"[]", b"\xff", b"[" * 10**5, b"null"):
        (t / "c.json").write_bytes(junk)
        refused(lambda: Calibration.load(t / "c.json", denoiser), "c.json")


def attack_calibration_extremes_give_finite(t):
    """Numbers at the ends of what a file may hold: matched images are finite."""
    from dtta_fast.denoisers.calibration import RANGES

    _, denoiser = digit_models()
    denoiser.calibration.save(t / "c.json")
    whole = json.loads((t / "c.json").read_text())
    images = torch.rand(2, 3, 32, 32)
    for key, (low, high) in RANGES.items():
        for end in (low, high, 5e-324 if low <= 0 else low):
            old = whole[key]
            (t / "c.json").write_text(json.dumps({**whole, key: [end] * len(old) if isinstance(old, list) else end}))
            found = either(lambda: Calibration.load(t / "c.json", denoiser))
            if isinstance(found, str):
                continue
            need(bool(found.match(images).isfinite().all()), f"{key} {end}: matched images are not finite")
            need(bool(found.distance(images).isfinite().all()), f"{key} {end}: distances are not finite")
            if found.signal:
                need(bool(found.weights(1000).isfinite().all()) if hasattr(found, "weights") else True, f"{key} {end}: weights")


def attack_timm_folder_damaged(t):
    place = t / "c"
    shutil.copytree(zoo.folder("digits") / "classifier", place)
    config = json.loads((place / "config.json").read_text())
    for change in ({"architecture": "no_such"}, {"architecture": 5}, {"num_classes": "x"}, {"model_args": 5}, {"pretrained_cfg": []}):
        (place / "config.json").write_text(json.dumps({**config, **change}))
        err = told("adapt", picture(t, png()), "--model", place, "--denoiser", zoo.folder("digits") / "denoiser")
        need(err.count("\n") == 1, f"{change}: {err[-200:]!r}")


def attack_timm_class_names_escape(t):
    """Names of classes in a timm folder: no escapes and no markup on the terminal."""
    place = t / "c"
    shutil.copytree(zoo.folder("digits") / "classifier", place)
    config = json.loads((place / "config.json").read_text())
    config["label_names"] = [f"{EVIL}{k}" for k in range(10)]
    config.setdefault("pretrained_cfg", {})["label_names"] = config["label_names"]
    (place / "config.json").write_text(json.dumps(config))
    status, out, err = command(
        "adapt",
        picture(t, png(), "x[bold]\x1b[31m.png"),
        "--model",
        place,
        "--denoiser",
        zoo.folder("digits") / "denoiser",
        "--steps",
        "1",
        "--guard",
        "0",
        "--precheck",
        "off",
        "--preset",
        "FAST",
    )
    need(status == 0, err[-300:])
    need("\x1b" not in out and "[bold]" in out, f"{out[:300]!r}")


def attack_segmentation_model_damaged(t):
    """--task segmentation with a folder whose weights or config are damaged: one line, no traceback."""
    source = zoo.folder("segmentation") / "model"
    digits = t / "set"
    for place in ("images", "maps"):
        (digits / place).mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(digits / "images" / "a.png")
    Image.new("L", (64, 64), 1).save(digits / "maps" / "a.png")
    (digits / "classes.txt").write_text("a\nb\n")
    cases = {
        "weights": lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:1000]),
        "header": lambda p: (p / "model.safetensors").write_bytes(b"\xff" * 500),
        "size": lambda p: (p / "preprocessor_config.json").write_text(
            json.dumps({**json.loads((p / "preprocessor_config.json").read_text()), "size": {"longest_edge": 5}})
        ),
        "size text": lambda p: (p / "preprocessor_config.json").write_text(
            json.dumps({**json.loads((p / "preprocessor_config.json").read_text()), "size": {"height": "x", "width": "y"}})
        ),
        "list": lambda p: (p / "preprocessor_config.json").write_text("[]"),
        "config": lambda p: (p / "config.json").write_text("{"),
        "config list": lambda p: (p / "config.json").write_text("[]"),
        "values": lambda p: (p / "config.json").write_text(
            json.dumps({**json.loads((p / "config.json").read_text()), "hidden_sizes": "x"})
        ),
        "depths": lambda p: (p / "config.json").write_text(
            json.dumps({**json.loads((p / "config.json").read_text()), "num_encoder_blocks": 99})
        ),
    }
    fell = []
    for name, damage in cases.items():
        place = t / name.replace(" ", "-")
        shutil.copytree(source, place)
        damage(place)
        try:
            status, _, err = command(
                "evaluate",
                t / f"run-{name}",
                "--data",
                "map-folder",
                "--root",
                digits,
                "--task",
                "segmentation",
                "--model",
                place,
                "--steps",
                "1",
                "--guard",
                "0",
            )
            if status != 2:
                fell.append(f"{name}: status {status}")
        except Exception as error:
            fell.append(f"{name}: {type(error).__name__}: {str(error)[:100]}")
    need(not fell, "; ".join(fell))


def attack_segmentation_weights_missing(t):
    """Weights that are missing would be drawn at random: refused, as for other models."""
    from safetensors.torch import load_file, save_file

    from dtta_fast.runs.models import load_models

    place = t / "m"
    shutil.copytree(zoo.folder("segmentation") / "model", place)
    weights = load_file(place / "model.safetensors")
    gone = next(name for name in weights if name.endswith("classifier.weight"))
    save_file({name: value for name, value in weights.items() if name != gone}, place / "model.safetensors", {"format": "pt"})
    run = RunConfig(data="map-folder", root=str(t), task="segmentation", model=str(place), adapt=presets.DENSE)
    refused(lambda: load_models(run, ("a",)), "m")


def attack_models_show_no_escapes(t):
    """Names of tensors in a CLIP's and a SegFormer's weights, which the libraries tell of."""
    from safetensors.torch import load_file, save_file

    place = t / "m"
    shutil.copytree(zoo.folder("segmentation") / "model", place)
    weights = load_file(place / "model.safetensors")
    save_file({**weights, "evil\x1b]0;owned\x07": torch.ones(2)}, place / "model.safetensors", {"format": "pt"})
    code = f"""
import sys
from dtta_fast.runs.config import RunConfig
from dtta_fast.runs.models import load_models
from dtta_fast import presets
from dtta_fast.commands.common import quiet
quiet()
load_models(RunConfig(data="map-folder", root=".", task="segmentation", model={str(place)!r}, adapt=presets.DENSE), ("a",))
"""
    log = t / "log"

    def work():
        descriptor = os.open(log, os.O_CREAT | os.O_WRONLY)
        os.dup2(descriptor, 1), os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        import logging

        for name in list(logging.root.manager.loggerDict):
            for handler in getattr(logging.getLogger(name), "handlers", []):
                if isinstance(handler, logging.StreamHandler):
                    handler.setStream(sys.stderr)
        exec(code, {})
        sys.stderr.flush(), sys.stdout.flush()

    status, error = forked(work, timeout=30)
    shown = log.read_bytes()
    need(b"\x1b]0;owned" not in shown, f"a tensor's name reaches the terminal with its escapes: {shown[-300:]!r}")


# --- settings


def attack_yaml_odd(t):
    path = t / "s.yaml"
    for text in (
        "a: &x 1\nb: *x",
        "!!python/object/apply:os.system ['true']",
        "- 1",
        "5",
        "",
        "? [a]\n: 1",
        "{1: 2}",
        "steps: 2001-99-99",
        "a: b: c",
        "\t",
        "\0",
        "%YAML 9.9\n---\n{}",
        "<<: {a: 1}",
        "steps: !!binary aGk=",
        "steps: !!set {a}",
        "steps: 1:30",
        "steps: yes",
        "lr: .nan",
        "lr: .inf",
        "lr: -1",
        "corruptions: fog",
        "severities: [x]",
        "classes: ['a,b']",
        "data: null",
        "adapt: 5",
        "adapt: null",
        "adapt: []",
        "data: {name: {a: 1}}",
        "root: 2001-01-01",
        "protocol: [online]",
        "preset: {a: 1}",
        "preset: 5",
        "preset: null",
        "mode: 7",
        "data.name: x\ndata: digits",
        "workers: true",
        "batch: 1.0",
        "device: 5",
        "timestep_range: [5, 1]",
        "lora_targets: []",
        "chunk: true",
        "task: []",
        "dtype: int8",
        "top_k: 0",
        "tta.online: [1]",
        "gpu: []",
        "input.subsample: x",
        "tta.gradient_descent.accum_iter: 1.5",
        "input.dataset_name: 5",
        "wandb.mode: {a: [1]}",
        "model: ''",
        "calibration: 3",
    ):
        path.write_text(text)
        try:
            either(lambda: with_settings(RunConfig(), read_yaml(path)), (ValueError, TypeError))
        except Exception as error:
            raise Fell(f"{text[:50]!r}: {type(error).__name__}: {str(error)[:100]}") from error


def attack_yaml_deep(t):
    for name, text in (
        ("j.json", '{"a":' * 900 + "1" + "}" * 900),
        ("k.json", '{"a":' * 5000 + "1" + "}" * 5000),
        ("y.yaml", "{a: " * 150 + "1" + "}" * 150),
        ("z.yaml", "[" * 10**5),
    ):
        (t / name).write_text(text)
        try:
            err = told("evaluate", t / "run", "--settings", t / name)
            need(err.count("\n") == 1, err[-200:])
        except Fell:
            raise
        except BaseException as error:
            raise Fell(f"{name}: {type(error).__name__}: {str(error)[:80]}") from error


def attack_settings_huge_numbers(t):
    """A whole number of 400 digits for each number of the config."""
    fell = []
    for name in (
        "lr",
        "denoiser_lr",
        "weight_decay",
        "guard_threshold",
        "momentum",
        "logit_scale",
        "steps",
        "pairs",
        "seed",
        "guard",
        "chunk",
        "top_k",
        "memory_budget",
        "batch",
        "per_class",
        "workers",
        "severities",
        "timestep_range",
    ):
        (t / "s.json").write_text(
            json.dumps({name: [10**400] if name == "severities" else [0, 10**400] if name == "timestep_range" else 10**400})
        )
        try:
            found = either(lambda: with_settings(RunConfig(), read_yaml(t / "s.json")), (ValueError, TypeError))
        except Exception as error:
            fell.append(f"{name}: {type(error).__name__}: {str(error)[:60]}")
    need(not fell, "; ".join(fell))


def attack_settings_booleans(t):
    """true is not a whole number: as steps: true is refused, so is it elsewhere."""
    taken = []
    for name, value in (("per_class", True), ("severities", [True]), ("steps", True), ("batch", True), ("pairs", True), ("seed", False)):
        try:
            with_settings(RunConfig(), {name: value})
            taken.append(f"{name}: {value!r}")
        except (ValueError, TypeError):
            pass
    need(not taken, f"taken: {', '.join(taken)}")


def attack_severity_true_makes_a_run_that_no_report_reads(t):
    (t / "s.yaml").write_text(
        "data: digits-c\ncorruptions: [contrast]\nseverities: [true]\nper_class: 1\nbatch: 10\nsteps: 1\nguard: 0\nprecheck: 'off'\npairs: 2\n"
    )
    status, out, err = command("evaluate", t / "run", "--settings", t / "s.yaml")
    if status == 2:
        return
    again, _, err = command("report", t / "run", "--out", t / "p.html")
    need(again == 0, f"evaluate took severities: [true] ({status}), and its own report says: {err[-250:]}")


def attack_config_json_as_settings(t):
    """A run's config.json, edited by strangers, as --settings."""
    run = finished()
    whole = json.loads((run / "config.json").read_text())
    for change in (
        {"adapt": {**whole["adapt"], "x": 1}},
        {"y": 1},
        {"data": {**whole["data"], "name": None}},
        {"data": []},
        {"adapt": None},
        {"task": "x"},
        {"classes": {"a": 1}},
        {"model": 5},
        {"root": "\0"},
    ):
        (t / "c.json").write_text(json.dumps({**whole, **change}))
        err = told("evaluate", t / "run", "--settings", t / "c.json")
        need(err.count("\n") == 1, err)
    need(not (t / "run").exists(), "a folder was made")


def attack_from_description_odd(t):
    whole = RunConfig().described()
    draw = random.Random(0)
    values = (None, True, -1, 1.5, "x", [], {}, 10**400, float("nan"), [None], {"a": 1}, "\0", "\udcff")
    for _ in range(300):
        found = json.loads(json.dumps(whole))
        place = draw.choice((found, found["data"], found["adapt"]))
        place[draw.choice(list(place))] = draw.choice(values)
        try:
            either(lambda: RunConfig.from_description(found))
        except Exception as error:
            raise Fell(f"{type(error).__name__}: {str(error)[:100]}") from error


# --- the command line


def attack_env_world_size(t):
    """RANK and WORLD_SIZE of the environment: numbers that are none are told in a line that names them."""
    fell = []
    for rank, world in (("0", "0"), ("x", "1"), ("0", "x"), ("-1", "1"), ("5", "1"), ("0", "-1"), ("", "")):
        os.environ |= {"RANK": rank, "WORLD_SIZE": world}
        try:
            status, out, err = command(
                "evaluate",
                t / f"run{rank}{world}",
                "--data",
                "folder",
                "--root",
                digits_root(),
                "--steps",
                "1",
                "--pairs",
                "2",
                "--guard",
                "0",
                "--precheck",
                "off",
                "--per-class",
                "1",
            )
            if status not in (0, 2):
                fell.append(f"RANK={rank} WORLD_SIZE={world}: status {status}")
            elif status == 0 and not (t / f"run{rank}{world}" / "summary.json").is_file():
                fell.append(
                    f"RANK={rank!r} WORLD_SIZE={world!r}: it ends well with {sorted(os.listdir(t / f'run{rank}{world}'))} and no summary"
                )
            elif status == 2 and "RANK" not in err and "WORLD_SIZE" not in err:
                fell.append(f"RANK={rank!r} WORLD_SIZE={world!r}: {err.strip()[:90]!r} names neither")
        except Exception as error:
            fell.append(f"RANK={rank!r} WORLD_SIZE={world!r}: {type(error).__name__}: {str(error)[:80]}")
        finally:
            os.environ.pop("RANK"), os.environ.pop("WORLD_SIZE")
    need(not fell, "; ".join(fell))


def attack_cli_missing_and_odd_arguments(t):
    for arguments in (
        ("adapt",),
        ("adapt", t / "none.png"),
        ("adapt", "\0"),
        ("adapt", "a" * 5000),
        ("adapt", t),
        ("report",),
        ("evaluate",),
        ("calibrate", "x"),
        ("calibrate", t, t),
        ("nothing",),
        (),
        ("evaluate", t / "r", "--preset", "NO"),
        ("evaluate", t / "r", "--settings", t / "none"),
        ("evaluate", t / "r", "--settings", "/dev/zero"),
        ("evaluate", t / "r", "--settings", t),
        ("evaluate", t / "r", "--device", "warp9"),
        ("evaluate", t / "r", "--device", ""),
        ("evaluate", t / "r", "--device", "meta:99999999999"),
        ("evaluate", t / "r", "--per-class", "0"),
        ("evaluate", t / "r", "--model", "no_such_model"),
        ("evaluate", t / "r", "--denoiser", "evil/none"),
        ("evaluate", t / "r", "--denoiser", "a b c"),
        ("evaluate", t / "r", "--calibration", "/dev/zero"),
        ("evaluate", t / "r", "--classes", "a", "--per-class", "1"),
        ("evaluate", t / "r", "tta.x=1"),
        ("evaluate", t / "r", "--lr", "1e400"),
        ("evaluate", t / "r", "--lr", "nan"),
    ):
        try:
            status, out, err = command(*arguments)
        except BaseException as error:
            raise Fell(f"{arguments}: {type(error).__name__}: {str(error)[:100]}") from error
        need(status == 2, f"{arguments}: status {status}")
    need(not (t / "r").exists() or not list((t / "r").glob("records*")), "records were written")


def attack_cli_error_leaves_an_empty_folder_usable(t):
    told("evaluate", t / "r", "--model", "no_such_model", "--data", "folder", "--root", digits_root())
    evaluate(folder_run(digits_root()), t / "r")
    need(without_seconds(t / "r") == without_seconds(finished()), "other records")


def attack_group_names_on_the_terminal(t):
    """Corruption folders with escapes and markup in their names: the summary is plain."""
    for corruption in ("fog[bold red]x[/]", "\x1b[31mred", ":smile:", "a\nb", "\u202e"):
        place = t / "tree" / corruption / "1" / "n01440764"
        place.mkdir(parents=True)
        Image.new("RGB", (32, 32), 7).save(place / "x.png")
    from dtta_fast.commands.evaluate import _print_summary

    data = open_images("imagenet-c", t / "tree")
    records = [{**SIX[0], "image_id": i, "group": data.groups[i], "path": data.names[i]} for i in range(len(data))]
    from dtta_fast.runs.summary import summary

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        _print_summary(summary(records), t / "run\x1b[31m\n[bold]")
    shown = out.getvalue()
    need("\x1b" not in shown and "\u202e" not in shown and ":smile:" in shown, f"{shown!r}")


def attack_messages_with_names_of_files(t):
    name = "x\x1b[31m\n\u202e[bold].png"
    err = told("adapt", picture(t, b"junk", name))
    need("\x1b" not in err and err.count("\n") == 1, repr(err))
    (t / "c\x1b[31m\n").mkdir()
    err = told("evaluate", t / "r", "--data", "folder", "--root", t)
    need("\x1b" not in err and err.count("\n") == 1, repr(err))


def process(code, *, cwd="/", env=(), stdout=subprocess.PIPE, timeout=60):
    base = {k: v for k, v in os.environ.items() if k not in ("HOME",)} | dict(env)
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=base, stdout=stdout, stderr=subprocess.PIPE, timeout=timeout, text=True
    )


def attack_working_folder_gone(t):
    """A command from a folder that is removed: names that are absolute work, or one line."""
    write_run(t / "run", images=8)

    def work():
        (t / "gone").mkdir()
        os.chdir(t / "gone")
        (t / "gone").rmdir()
        main(["report", str(t / "run"), "--out", str(t / "p.html")])

    status, error = forked(work)
    need(status == 0, f"{status} {error}")

    def relative():
        (t / "gone").mkdir()
        os.chdir(t / "gone")
        (t / "gone").rmdir()
        main(["report", str(t / "run")])

    status, error = forked(relative)
    need(status == 3 and error == "SystemExit: 2", f"{status} {error}")


def attack_stdout_closed(t):
    """`dtta report | head -0`: the page is written, and there is no traceback."""
    write_run(t / "run", images=8)
    read, write = os.pipe()
    os.close(read)
    done = process(
        f"from dtta_fast.commands.cli import main; main(['report', {str(t / 'run')!r}, '--out', {str(t / 'p.html')!r}])", stdout=write
    )
    os.close(write)
    need((t / "p.html").is_file(), "no page")
    need("Traceback" not in done.stderr and "Exception ignored" not in done.stderr, f"status {done.returncode}: {done.stderr[-200:]!r}")


def attack_stdout_ascii(t):
    name = "é😀"
    write_run(t / name, images=8)
    done = process(
        f"from dtta_fast.commands.cli import main; main(['report', {str(t / name)!a}, '--out', {str(t / (name + '.html'))!a}])",
        env=[("PYTHONIOENCODING", "ascii"), ("LC_ALL", "C"), ("PYTHONUTF8", "0"), ("PYTHONCOERCECLOCALE", "0")],
    )
    need("Traceback" not in done.stderr and done.returncode in (0, 2), f"{done.returncode} {done.stderr[-300:]}")


def attack_interrupt_at_start(t):
    """Ctrl-C while the command is still importing: status 130 and a line, or death by the signal; no traceback."""
    dtta = Path(sys.executable).with_name("dtta")
    done = subprocess.Popen([str(dtta), "env"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd="/")
    time.sleep(0.8)
    done.send_signal(signal.SIGINT)
    _, err = done.communicate(timeout=60)
    need("Traceback" not in err, f"status {done.returncode}, a traceback of {err.count(chr(10))} lines: {err.strip().splitlines()[-1]!r}")


def attack_interrupt_in_a_run(t):
    """SIGINT in `dtta evaluate`: one line, status 130, and the run goes on."""

    def work():
        main(
            [
                "evaluate",
                str(t / "run"),
                "--data",
                "folder",
                "--root",
                str(digits_root()),
                "--batch",
                "1",
                "--steps",
                "1",
                "--pairs",
                "2",
                "--guard",
                "0",
                "--precheck",
                "off",
            ]
        )

    status, error = forked(work, kill=signal.SIGINT, after=0.6)
    need(status == 0 or error == "SystemExit: 130", f"{status} {error}")


def attack_read_images_odd(t):
    for most in (0, -1):
        refused(lambda: read_images(t, 8, most), "most")
    refused(lambda: read_images(t, 8, 5), str(t))
    refused(lambda: read_images(t / ("a" * 300), 8, 5))
    (t / "x.png").mkdir()
    refused(lambda: read_images(t, 8, 5))


def attack_error_keeps_json(t):
    """adapt --json: a failing second image leaves an earlier result as it was, or whole."""
    a = picture(t, png(), "a.png")
    (t / "r.json").write_text(json.dumps({"images": [], "config": {}}))
    told("adapt", a, picture(t, b"x", "b.png"), "--json", t / "r.json")
    need(json.loads((t / "r.json").read_text()) == {"images": [], "config": {}}, "it changed")


# --- a second round


def attack_state_forged_with_a_right_checksum(t):
    """The checksum is not a secret: a stranger's state with it, and with other tensors, is refused by a ValueError that names the file."""
    from safetensors.torch import save

    from dtta_fast.runs.state import FORMAT, _checksum

    run, state = stopped_online(t)
    config = json.loads((run / "config.json").read_text())
    held = (run / "records.jsonl").read_bytes()
    fell = []
    for name, tensors in (
        ("nothing known", {"x": torch.ones(1)}),
        ("no slots", {"step": torch.tensor(1)}),
        ("slots", {"step": torch.tensor(1), "theta_slots": torch.tensor(3), "phi_slots": torch.tensor(0)}),
        ("shape of slots", {"step": torch.tensor(1), "theta_slots": torch.zeros(2), "phi_slots": torch.tensor(0)}),
        ("name", {"step": torch.tensor(1), "theta/0": torch.ones(1), "theta_slots": torch.tensor(0), "phi_slots": torch.tensor(0)}),
        ("minus", {"step": torch.tensor(1), "theta_slots": torch.tensor(-5), "phi_slots": torch.tensor(-5)}),
        ("nan slots", {"step": torch.tensor(1), "theta_slots": torch.tensor(float("nan")), "phi_slots": torch.tensor(0)}),
    ):
        state.write_bytes(save(tensors, {"format": FORMAT, "batch": "0", "checksum": _checksum(tensors, 0, config)}))
        try:
            found = either(lambda: evaluate(online_run(digits_root()), run))
            if not isinstance(found, str):
                fell.append(f"{name}: taken")
                (run / "records.jsonl").write_bytes(held)
                (run / "summary.json").unlink()
            elif state.name not in found:
                fell.append(f"{name}: {found[:80]!r} does not name the file")
        except Exception as error:
            fell.append(f"{name}: {type(error).__name__}: {str(error)[:60]}")
        if (run / "records.jsonl").read_bytes() != held:
            fell.append(f"{name}: records changed")
            (run / "records.jsonl").write_bytes(held)
    need(not fell, "; ".join(fell))


def attack_state_forged_with_endless_slots(t):
    from safetensors.torch import save

    from dtta_fast.runs.state import FORMAT, _checksum, read_state

    tensors = {"step": torch.tensor(1), "theta_slots": torch.tensor(2**50), "phi_slots": torch.tensor(0)}
    (t / "s.safetensors").write_bytes(save(tensors, {"format": FORMAT, "batch": "0", "checksum": _checksum(tensors, 0, CONFIG)}))

    def work():
        resource.setrlimit(resource.RLIMIT_AS, (2**35, 2**35))
        read_state(t / "s.safetensors", 0, CONFIG, "cpu")

    status, error = forked(work, timeout=4)
    need(status == 3 and error.startswith("ValueError"), f"{status} {error}")


def attack_new_file_is_a_planted_link(t):
    """Somebody plants links of the names that a write takes for its draft: they are not followed."""
    (t / "precious").write_bytes(b"precious")

    def work():
        (t / "run").mkdir()
        (t / "run" / "lock").touch()
        (t / "run" / f"config.json.{os.getpid()}.new").symlink_to(t / "precious")
        fake_write(t / "run", 3, finish=True)

    forked(work)
    need((t / "precious").read_bytes() == b"precious", "a file outside was overwritten through a planted link config.json.PID.new")


def attack_json_draft_is_a_file_of_others(t):
    def work():
        (t / f"r.json.{os.getpid()}.new").write_text("mine")
        (t / "pid").write_text(str(os.getpid()))
        main(["env", "--json", str(t / "r.json")])

    forked(work)
    draft = t / f"r.json.{(t / 'pid').read_text()}.new"
    need(draft.is_file() and draft.read_text() == "mine", "a file of others of the draft's name is gone")


def attack_calibrate_default_place_is_a_link(t):
    """A stranger's denoiser whose calibration.json is a link to a file of the user's: dtta calibrate without --out."""
    import dtta_fast.commands.calibrate as module

    place = denoiser_copy(t)
    (t / "precious").write_bytes(b"precious")
    (place / "calibration.json").unlink()
    (place / "calibration.json").symlink_to(t / "precious")
    (t / "images").mkdir()
    images, _ = zoo.example("digits")
    for i in range(8):
        Image.fromarray((images[i].permute(1, 2, 0) * 255).byte().numpy()).save(t / "images" / f"{i}.png")
    own, module.calibrate = module.calibrate, lambda denoiser, images: digit_models()[1].calibration
    try:
        command("calibrate", place, t / "images")
    finally:
        module.calibrate = own
    need(
        (t / "precious").read_bytes() == b"precious",
        "a file outside was overwritten, through the link calibration.json of a stranger's folder",
    )


def attack_help_shows_a_settings_file(t):
    """--settings of a stranger with escapes in it, and --help, which shows defaults."""
    (t / "s.json").write_text(json.dumps({"model": EVIL, "root": EVIL, "classes": [EVIL.replace(",", "")], "split": EVIL}))
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            main(["evaluate", "r", "--settings", str(t / "s.json"), "--help"])
        except SystemExit:
            pass
    need(
        "\x1b]0;owned" not in out.getvalue() and "\x07" not in out.getvalue(),
        "the help shows the settings file's values with their escapes",
    )


def attack_flag_error_shows_a_settings_file(t):
    (t / "s.json").write_text(json.dumps({"model": EVIL, "root": EVIL, "lora_targets": [EVIL]}))
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            main(["evaluate", "r", "--settings", str(t / "s.json"), "--no-such-flag"])
        except SystemExit:
            pass
    need("\x1b]0;owned" not in out.getvalue() and "\x07" not in out.getvalue(), "escapes are shown")


def attack_clip_folder_damaged(t):
    source = zoo.folder("open_vocabulary")
    fell = []
    for name, file, data in (
        ("weights", "model.safetensors", b"\xff" * 300),
        ("config", "config.json", b"[]"),
        ("config 2", "config.json", b"{"),
        ("values", "config.json", b'{"model_type": "clip", "text_config": 5, "vision_config": []}'),
        ("tokens", "tokenizer_config.json", b"[]"),
        ("merges", "merges.txt", b"\xff\xfe"),
        ("preprocessor", "preprocessor_config.json", b"[]"),
        ("preprocessor 2", "preprocessor_config.json", b'{"size": "x", "image_mean": [NaN]}'),
        ("vocab", "vocab.json", b"[]"),
        ("other type", "config.json", b'{"model_type": "bert"}'),
        ("auto_map", "config.json", b'{"model_type": "evil", "auto_map": {"AutoConfig": "x.Y"}}'),
    ):
        place = t / name.replace(" ", "-")
        shutil.copytree(source / "clip", place)
        (place / file).write_bytes(data)
        try:
            status, _, err = command(
                "adapt",
                picture(t, png()),
                "--classes",
                "zero,one",
                "--model",
                place,
                "--denoiser",
                source / "diffusion",
                "--steps",
                "1",
                "--guard",
                "0",
                "--pairs",
                "1",
                "--precheck",
                "off",
                "--match",
                "off",
            )
            if status != 2 and name in ("weights", "config", "config 2", "values", "other type", "auto_map"):
                fell.append(f"{name}: status {status}")
        except Exception as error:
            fell.append(f"{name}: {type(error).__name__}: {str(error)[:90]}")
    need(not fell, "; ".join(fell))


def attack_clip_weights_missing(t):
    from safetensors.torch import load_file, save_file

    from dtta_fast.tasks.zero_shot import load_clip

    place = t / "m"
    shutil.copytree(zoo.folder("open_vocabulary") / "clip", place)
    weights = load_file(place / "model.safetensors")
    gone = next(iter(sorted(weights)))
    save_file({name: value for name, value in weights.items() if name != gone}, place / "model.safetensors", {"format": "pt"})
    refused(lambda: load_clip(place), "m")


def attack_stable_diffusion_damaged(t):
    from dtta_fast.denoisers.stable_diffusion import StableDiffusion

    source = zoo.folder("open_vocabulary") / "diffusion"
    fell = []
    for name, data in (
        ("unet/config.json", b"[]"),
        ("unet/config.json", b'{"_class_name": "os"}'),
        ("unet/diffusion_pytorch_model.safetensors", b"\xff" * 200),
        ("vae/config.json", b"{"),
        ("vae/config.json", b'{"scaling_factor": "x"}'),
        ("text_encoder/config.json", b"5"),
        ("text_encoder/model.safetensors", b""),
        ("tokenizer/vocab.json", b"[]"),
        ("tokenizer/tokenizer_config.json", b"7"),
        ("tokenizer/merges.txt", b"\xff"),
        ("scheduler/scheduler_config.json", b"[]"),
        ("model_index.json", b"[]"),
        ("model_index.json", b'{"_class_name": "StableDiffusionPipeline", "unet": ["os", "system"]}'),
    ):
        place = t / str(len(list(t.iterdir())))
        shutil.copytree(source, place)
        (place / name).write_bytes(data)
        try:
            found = either(lambda: StableDiffusion.from_pretrained(place))
            if not isinstance(found, str) and not name.startswith(("tokenizer", "model_index")):
                fell.append(f"{name} {data[:30]}: taken")
        except Exception as error:
            fell.append(f"{name} {data[:30]}: {type(error).__name__}: {str(error)[:90]}")
    need(not fell, "; ".join(fell))


def attack_concat_unet_damaged(t):
    from dtta_fast.denoisers.concat_unet import ConcatUNet

    source = zoo.folder("segmentation") / "denoiser"
    fell = []
    for name, data in (
        ("config.json", b"[]"),
        ("config.json", b"{}"),
        ("config.json", b'{"_class_name": "ConcatUNet", "classes": "x"}'),
        ("config.json", b'{"classes": 100000000000}'),
        ("embeddings.safetensors", b"\xff" * 100),
        ("embeddings.safetensors", None),
        ("unet/config.json", b'{"in_channels": -3}'),
        ("unet/config.json", b"[]"),
        ("unet/diffusion_pytorch_model.safetensors", b"x"),
        ("calibration.json", b"{}"),
        ("scheduler/scheduler_config.json", b"null"),
    ):
        place = t / str(len(list(t.iterdir())))
        shutil.copytree(source, place)
        (place / name).unlink()
        if data is not None:
            (place / name).write_bytes(data)
        try:
            found = either(lambda: ConcatUNet.from_pretrained(place))
            if not isinstance(found, str):
                fell.append(f"{name} {data!r:.30}: taken")
        except Exception as error:
            fell.append(f"{name} {data!r:.30}: {type(error).__name__}: {str(error)[:90]}")
    need(not fell, "; ".join(fell))


def attack_depth_model_damaged(t):
    from dtta_fast.runs.models import load_models

    source = zoo.folder("depth") / "model"
    fell = []
    for file, data in (
        ("model.safetensors", b"\xff" * 300),
        ("config.json", b"[]"),
        ("preprocessor_config.json", b"[]"),
        ("preprocessor_config.json", b"{}"),
        ("preprocessor_config.json", b'{"image_processor_type": "Evil", "auto_map": {"AutoImageProcessor": "evil.Evil"}}'),
    ):
        place = t / str(len(list(t.iterdir())))
        shutil.copytree(source, place)
        (place / file).write_bytes(data)
        try:
            found = either(
                lambda: (
                    open_data(RunConfig(data="map-folder", root=str(t), task="depth", model=str(place), adapt=presets.DENSE)),
                    load_models(RunConfig(data="map-folder", root=str(t), task="depth", model=str(place), adapt=presets.DENSE)),
                )
            )
            if not isinstance(found, str):
                fell.append(f"{file} {data[:20]}: taken")
        except Exception as error:
            fell.append(f"{file} {data[:20]}: {type(error).__name__}: {str(error)[:90]}")
    need(not fell, "; ".join(fell))


def attack_objectnet_mappings(t):
    (t / "images" / "chair").mkdir(parents=True)
    (t / "images" / "chair" / "x.png").write_bytes(png())
    place = t / "mappings"
    place.mkdir()
    good = {
        "folder_to_objectnet_label.json": {"chair": "Chair"},
        "objectnet_to_imagenet_1k.json": {"Chair": "a; b"},
        "pytorch_to_imagenet_2012_id.json": {"0": 0, "1": 1},
    }

    def put(**change):
        for name, value in good.items():
            (place / name).write_text(json.dumps(change.get(name.split("_")[0], value)))
        (place / "imagenet_to_label_2012_v2").write_text("a\nb\n")

    for change in (
        {"folder": []},
        {"folder": {"chair": 5}},
        {"objectnet": {"Chair": "zzz"}},
        {"objectnet": {"Chair": 5}},
        {"pytorch": {"0": 99}},
        {"pytorch": {"x": 0}},
        {"pytorch": {"0": "9" * 5000}},
        {"pytorch": {"-5": 0, "1": 1}},
        {"pytorch": {"0": -3, "1": 1}},
        {"folder": {"chair": ["a"]}},
        {"folder": {"../../etc": "Chair"}},
        {"pytorch": {"1000": 0, "1": 1}},
        {"folder": {}},
        {"folder": {"chair": None}},
    ):
        put(**change)
        try:
            refused(lambda: open_images("objectnet", t))
        except Fell as error:
            if "taken" in str(error) and change in ({"pytorch": {"0": -3, "1": 1}}, {"folder": {"chair": 5}}):
                continue
            raise Fell(f"{str(change)[:60]}: {error}") from error
        except Exception as error:
            raise Fell(f"{str(change)[:60]}: {type(error).__name__}: {error}") from error


def attack_folder_numbers_that_are_no_ascii(t):
    for name in ("imagenet-v2", "imagenet-c", "ade20k-c"):
        for digit in ("²", "٣", "９", "Ⅷ", "1_0", "9" * 200):
            place = t / name / digit
            (place / ("1" if name != "imagenet-v2" else "")).mkdir(parents=True, exist_ok=True)
            (t / name / "fog" / digit).mkdir(parents=True, exist_ok=True)
        try:
            found = either(lambda: open_images(name, t / name, size=16 if name == "ade20k-c" else None))
        except Exception as error:
            raise Fell(f"{name}: {type(error).__name__}: {error}") from error
        need(isinstance(found, str), f"{name} was opened")


def attack_webdataset_places(t):
    for name in ("a.tar", "b.tar"):
        os.mkfifo(t / name)
    status, error = forked(lambda: open_images("webdataset", t), timeout=4)
    need(status == 3 and error.startswith("ValueError") and "a.tar" in error, f"{status} {error}")
    (t / "c").mkdir()
    (t / "c" / "x.tar").mkdir()
    refused(lambda: open_images("webdataset", t / "c"), "x.tar")
    (t / "d.tar").symlink_to("/dev/zero")
    status, error = forked(lambda: open_images("webdataset", t / "d.tar"), timeout=4)
    need(status == 3 and error.startswith("ValueError"), f"{status} {error}")


def attack_tar_classnames(t):
    tar_of(t / "a.tar", [("a.png", png(), lambda info: None), ("a.cls", b"1", lambda info: None)])
    for data in (b"\xff", b"only\n", bytes(100)):
        (t / "classnames.txt").write_bytes(data)
        refused(lambda: open_images("webdataset", t / "a.tar"))


def attack_tar_changed_while_it_runs(t):
    """A shard that is cut after it was indexed: the image is an error."""
    tar_of(t / "a.tar", [(f"{k}.png", png(), lambda info: None) for k in range(3)])
    data = open_images("webdataset", t / "a.tar")
    os.truncate(t / "a.tar", 700)
    refused(lambda: data[2], "a.tar")
    (t / "a.tar").unlink()
    refused(lambda: data[0], "a.tar")
    os.mkfifo(t / "a.tar")
    status, error = forked(lambda: data[0], timeout=4)
    need(status == 3 and error.startswith("ValueError"), f"a shard that is a pipe by now: {status} {error}")


def attack_folder_image_becomes_a_pipe(t):
    digit_folder(t / "root")
    data = open_folder(t / "root")
    (t / "root" / "0" / "0a.png").unlink()
    os.mkfifo(t / "root" / "0" / "0a.png")
    status, error = forked(lambda: data[0], timeout=4)
    need(status == 3 and error.startswith("ValueError"), f"{status} {error}")


def attack_run_over_odd_names(t):
    """Names that are no UTF-8, with escapes and newlines, from folder to records, back, and onto a page."""
    root = t / "root"
    for k, name in enumerate(
        (
            b"a\nb",
            b"\xff\xfe",
            EVIL.replace("/", "_").encode(),
            b" ",
            "e\u0301".encode(),
            b"\"'&<>",
            b"x" * 200,
            b"\x7f",
            "\u2028".encode(),
            b"{{7*7}}",
        )
    ):
        place = Path(os.fsdecode(bytes(str(root), "ascii") + b"/" + name))
        place.mkdir(parents=True)
        shutil.copy(next((digits_root() / str(k)).glob("*.png")), place / os.fsdecode(name + b".png"))
    run = folder_run(root, batch=3)
    evaluate(run, t / "run")
    whole = without_seconds(t / "run")
    lines = (t / "run" / "records.jsonl").read_bytes().splitlines(True)
    (t / "run" / "records.jsonl").write_bytes(b"".join(lines[:4]))
    (t / "run" / "summary.json").unlink()
    status, out, err = command("evaluate", t / "run", "--settings", t / "run" / "config.json")
    need(status == 0, err[-300:])
    need(without_seconds(t / "run") == whole, "other records")
    status, out, err = command("report", t / "run", "--root", root, "--out", t / "p.html")
    need(status == 0, err[-300:])
    need("49" not in re.findall(r"\{\{7\*7\}\}", "") and "<script>alert" not in (t / "p.html").read_text(), "injection")


def attack_run_over_hostile_images_goes_on(t):
    root = digit_folder(t / "root")
    names = [str(k) for k in range(10)]
    (root / "0" / "0a.png").write_bytes(b"")
    (root / "1" / "1a.png").unlink(), (root / "1" / "1a.png").symlink_to("/dev/zero")
    (root / "2" / "2a.png").unlink(), os.mkfifo(root / "2" / "2a.png")
    Image.new("L", (1, 600)).save(root / "3" / "3a.png")
    (root / "4" / "4a.png").unlink(), (root / "4" / "4a.png").symlink_to("/etc/passwd")
    Image.new("RGB", (64, 1)).save(root / "5" / "5a.png")
    found = evaluate(folder_run(root), t / "run")
    need(found["images"] == 10 and 5 <= found["errors"] <= 6, f"{found['images']} {found['errors']}")
    held = contents(t / "run")
    again = evaluate(folder_run(root), t / "run")
    need(contents(t / "run")["records.jsonl"] == held["records.jsonl"], "again: other records")
    read_page(t / "run")


def attack_all_images_damaged(t):
    root = digit_folder(t / "root")
    for path in root.rglob("*.png"):
        path.write_bytes(b"x")
    status, out, err = command(
        "evaluate", t / "run", "--data", "folder", "--root", root, "--steps", "1", "--pairs", "2", "--guard", "0", "--precheck", "off"
    )
    need(status == 0, err[-300:])
    status, out, err = command("report", t / "run", "--out", t / "p.html")
    need(status == 0, err[-300:])


def attack_second_run_in_a_held_folder(t):
    held = fake(t / "run")
    try:
        refused(lambda: fake(t / "run"), "another run")
        refused(lambda: fake(t / "run", overwrite=True), "another run")
        refused(lambda: fake(t / "run", part="0"), "another run")
    finally:
        held.__exit__()


def attack_part_files_of_others_and_torn(t):
    """records-7.jsonl in a run's folder that no process of it wrote: a text without an end of line."""
    fake_write(t / "run", 1)
    (t / "run" / "records-7.jsonl").write_bytes(b"my notes of the experiment")
    either(lambda: fake_write(t / "run", 3, finish=True))
    found = t / "run" / "records-7.jsonl"
    need(found.is_file() and found.read_bytes() == b"my notes of the experiment", "a file of others, without a record in it, was removed")


def attack_report_surrogates(t):
    def change(record):
        record["path"] = f"\ud800{record['image_id']}\udcff"
        record["group"] = "\udfff"

    write_run(t / "run", images=10, change=change)
    status, out, err = command("report", t / "run", "--out", t / "p.html")
    need(status == 0, err)
    (t / "p.html").read_text(encoding="utf-8")


def attack_report_many(t):
    def change(record):
        record["group"] = f"g{record['image_id']}" + "x" * 500
        record["label"] = record["image_id"] * 7

    write_run(t / "run", images=3000, change=change)
    begun = time.monotonic()
    read_page(t / "run")
    need(time.monotonic() - begun < 30, "slow")


def attack_report_summary_is_a_pipe_or_link(t):
    write_run(t / "run", images=8)
    (t / "run" / "summary.json").unlink()
    os.mkfifo(t / "run" / "summary.json")
    status, error = forked(lambda: read_runs([t / "run"]), timeout=4)
    need(status == 3 and error.startswith("ValueError"), f"{status} {error}")
    (t / "run" / "summary.json").unlink()
    (t / "run" / "summary.json").symlink_to(t / "run" / "summary.json")
    either(lambda: read_page(t / "run"))


def attack_report_of_a_link_loop(t):
    (t / "loop").symlink_to(t / "loop")
    for arguments in (
        ("report", t / "loop"),
        ("evaluate", t / "loop", "--data", "folder", "--root", digits_root()),
        ("adapt", t / "loop"),
        ("evaluate", t / "r", "--data", "folder", "--root", t / "loop"),
        ("evaluate", t / "r", "--settings", t / "loop"),
        ("report", t, "--out", t / "loop"),
        ("evaluate", t / "r", "--json", t / "loop"),
        ("evaluate", t / "r", "--calibration", t / "loop"),
        ("evaluate", t / "r", "--denoiser", t / "loop"),
    ):
        try:
            told(*arguments)
        except Fell:
            raise
        except Exception as error:
            raise Fell(f"dtta {' '.join(map(str, arguments[:1]))} with a link loop: {type(error).__name__}: {str(error)[:80]}") from error


def attack_environment_variables(t):
    """No HOME, a cache that is a file, a thread number that is none."""
    (t / "file").write_text("x")
    for env in (
        [("XDG_CACHE_HOME", str(t / "file")), ("OMP_NUM_THREADS", "abc"), ("TERM", "\x1b"), ("COLUMNS", "x")],
        [("XDG_CACHE_HOME", "relative"), ("NO_COLOR", ""), ("COLUMNS", "1"), ("DTTA_FAST_STRICT", "x")],
    ):
        done = process("from dtta_fast.commands.cli import main; main(['env'])", env=env)
        need("Traceback" not in done.stderr, f"{env}: {done.stderr[-300:]}")


def attack_output_full_device(t):
    """Standard output on a full disk: one line, no traceback."""
    with open("/dev/full", "w") as full:
        done = process("from dtta_fast.commands.cli import main; main(['env'])", stdout=full)
    need("Traceback" not in done.stderr and done.returncode != 0, f"status {done.returncode}: {done.stderr[-250:]!r}")


def attack_package_is_a_file_of_others(t):
    """`dtta export x.pt2` over a zip of somebody that is named so: refused before the work."""

    with zipfile.ZipFile(t / "x.pt2", "w") as file:
        file.writestr("thesis.txt", "three years")
    held = (t / "x.pt2").read_bytes()
    import dtta_fast.commands.export as module

    stop = RuntimeError("it went on to the work")

    def work(*args, **kwargs):
        raise stop

    names = [name for name in ("load_subject", "export") if hasattr(module, name)]
    own = {name: getattr(module, name) for name in names}
    try:
        for name in names:
            setattr(module, name, work)
        try:
            status, _, err = command("export", t / "x.pt2")
        except RuntimeError as error:
            raise Fell(f"{error}: an archive of others would be replaced") from error
    finally:
        for name in names:
            setattr(module, name, own[name])
    need(status == 2 and (t / "x.pt2").read_bytes() == held, err)


def attack_labels_beyond_the_model(t):
    """A folder of eleven classes and a model of ten: told, before records are written."""
    root = digit_folder(t / "root")
    shutil.copytree(root / "9", root / "a")
    err = told(
        "evaluate", t / "run", "--data", "folder", "--root", root, "--steps", "1", "--guard", "0", "--pairs", "2", "--precheck", "off"
    )
    need("11" in err and "10" in err, err)


def attack_classes_with_escapes(t):
    err = told("evaluate", t / "r", "--data", "folder", "--root", digits_root(), "--classes", "a\x1b[31m,b")
    need("\x1b" not in err, repr(err))


def attack_config_with_another_schema_of_ours(t):
    """A config.json that lacks fields of now, as an older version wrote it, with records: refused by name, nothing lost."""
    fake_write(t / "run", 1)
    old = {key: value for key, value in CONFIG.items() if key != "protocol"}
    (t / "run" / "config.json").write_text(json.dumps(old))
    held = contents(t / "run")
    refused(lambda: fake_write(t / "run", 3), "protocol")
    need(contents(t / "run") == held, "changed")


def attack_config_duplicate_keys(t):
    fake_write(t / "run", 1)
    (t / "run" / "config.json").write_text(json.dumps(CONFIG)[:-1] + ', "adapt": {"steps": 9}}')
    held = contents(t / "run")
    refused(lambda: fake_write(t / "run", 3), "adapt.steps")
    need(contents(t / "run") == held, "changed")


def attack_records_removed_in_an_online_run(t):
    """The first batch's lines are removed from an online run: told, and nothing changes."""
    shutil.copytree(finished_online(), t / "run")
    (t / "run" / "summary.json").unlink()
    path = t / "run" / "records.jsonl"
    lines = path.read_bytes().splitlines(True)
    path.write_bytes(b"".join(lines[4:]))
    held = contents(t / "run")
    refused(lambda: evaluate(online_run(digits_root()), t / "run"), "records.jsonl")
    need(contents(t / "run") == held, "changed")


def attack_finished_online_with_a_torn_end(t):
    """The last line of a finished online run is torn, as by an editor; its states are gone. What is refused loses nothing."""
    shutil.copytree(finished_online(), t / "run")
    path = t / "run" / "records.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    held = contents(t / "run")
    found = either(lambda: evaluate(online_run(digits_root()), t / "run"))
    need(
        not isinstance(found, str) or contents(t / "run") == held,
        f"refused ({found[-100:]!r}), and records were cut: {len(path.read_bytes().splitlines())} of 10 lines are left",
    )


def attack_full_disk_in_evaluate(t):
    """The whole command on a full disk: one line, status 2, and it goes on with room."""
    run = folder_run(digits_root())
    status, error = forked(lambda: evaluate(run, t / "run"), file_size=2500)
    need(status == 3 and error.startswith("OSError") and "cannot be written" in error, f"{status} {error}")
    evaluate(run, t / "run")
    need(without_seconds(t / "run") == without_seconds(finished()), "other records")


def attack_full_disk_report(t):
    write_run(t / "run", images=8)
    (t / "p.html").write_text(read_page(t / "run"))
    held = (t / "p.html").read_bytes()
    status, error = forked(lambda: main(["report", str(t / "run"), "--out", str(t / "p.html")]), file_size=1000)
    need(status == 3 and error == "SystemExit: 2", f"{status} {error}")
    need((t / "p.html").read_bytes() == held and set(os.listdir(t)) == {"run", "p.html"}, f"{os.listdir(t)}")


# --- a third round


def attack_json_to_standard_output(t):
    """--json /dev/stdout into a pipe: a pipe is written to directly."""
    done = process("from dtta_fast.commands.cli import main; main(['env', '--json', '/dev/stdout'])")
    need(done.returncode == 0 and '"torch"' in done.stdout, f"{done.returncode} {done.stderr[-200:]}")


def attack_thumbnails_of_maps_of_other_pixels(t):
    """evaluation.md: thumbnails only where path, group, label and pixels are the run's."""
    for place in ("images", "maps"):
        (t / "root" / place).mkdir(parents=True)
    for k in range(4):
        Image.effect_noise((40, 40), 90).convert("RGB").save(t / "root" / "images" / f"{k}.png")
        Image.fromarray(np.full((40, 40), 900, np.uint16)).save(t / "root" / "maps" / f"{k}.png")

    def change(record):
        record["path"], record["group"], record["digest"] = f"images/{record['image_id']}.png", "map-folder", "0" * 16

    write_run(t / "run", "depth", images=4, change=change)
    for file in ("config.json", "summary.json"):
        path = t / "run" / file
        path.write_text(path.read_text().replace('"folder"', '"map-folder"'))
    status, _, err = command("report", t / "run", "--root", t / "root", "--out", t / "p.html")
    need(
        status == 0 and "base64," not in (t / "p.html").read_text(), "thumbnails of images whose pixels are not those of the run's digests"
    )


def captured(work, place):
    """What reaches descriptors 1 and 2 while work() runs in a child."""

    def go():
        import logging

        descriptor = os.open(place, os.O_CREAT | os.O_WRONLY)
        os.dup2(descriptor, 1), os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        for name in list(logging.root.manager.loggerDict):
            for handler in getattr(logging.getLogger(name), "handlers", []):
                if isinstance(handler, logging.StreamHandler):
                    handler.setStream(sys.stderr)
        try:
            work()
        except ValueError as error:
            from dtta_fast.commands.common import shown

            print(shown(error))
        sys.stdout.flush(), sys.stderr.flush()

    forked(go)
    return place.read_bytes()


def _make_escape_attack(kind):
    def attack(t):
        from safetensors.torch import load_file, save_file

        source = zoo.folder("open_vocabulary")
        shutil.copytree(source, t / "m")
        file = {
            "clip": "clip/model.safetensors",
            "text_encoder": "diffusion/text_encoder/model.safetensors",
            "unet": "diffusion/unet/diffusion_pytorch_model.safetensors",
            "vae": "diffusion/vae/diffusion_pytorch_model.safetensors",
        }[kind]
        weights = load_file(t / "m" / file)
        save_file({**weights, "evil\x1b]0;owned\x07": torch.ones(2)}, t / "m" / file, {"format": "pt"})

        def work():
            from dtta_fast.denoisers.stable_diffusion import StableDiffusion
            from dtta_fast.tasks.zero_shot import load_clip

            load_clip(t / "m" / "clip") if kind == "clip" else StableDiffusion.from_pretrained(t / "m" / "diffusion")

        need(b"\x1b]0;owned" not in captured(work, t / "log"), f"a tensor's name of the {kind} reaches the terminal with its escapes")

    return attack


for _kind in ("clip", "text_encoder", "unet", "vae"):
    globals()[f"attack_escapes_of_{_kind}"] = _make_escape_attack(_kind)


def attack_escapes_of_configs(t):
    """Unknown keys and values in the configs of diffusers and transformers."""
    source = zoo.folder("open_vocabulary") / "diffusion"
    shutil.copytree(source, t / "m")
    for file in (
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer_config.json",
    ):
        path = t / "m" / file
        path.write_text(
            json.dumps(
                {**json.loads(path.read_text()), "evil\x1b]0;owned\x07": "\x1b]0;owned\x07", "_diffusers_version": "\x1b]0;owned\x07"}
            )
        )

    def work():
        from dtta_fast.denoisers.stable_diffusion import StableDiffusion

        StableDiffusion.from_pretrained(t / "m")

    need(b"\x1b]0;owned" not in captured(work, t / "log"), f"escapes of a config: {(t / 'log').read_bytes()[-200:]!r}")


def attack_parts_killed_in_finish(t):
    """Two processes' records; the first is killed at each call of its finish; one process goes on."""

    def write(place):
        for part, numbers in (("0", (0, 2)), ("1", (1,))):
            with fake(place, part=part) as opened:
                for k in numbers:
                    opened.append(k, [SIX[i] for i in BATCHES[k]])

    fake_write(t / "whole", 3, finish=True)
    whole = contents(t / "whole")
    for at in range(1, 26, 2):
        place = t / f"run{at}"
        write(place)

        def work():
            left = [at]

            def counted(real):
                def call(*args, **kwargs):
                    left[0] -= 1
                    if not left[0]:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*args, **kwargs)

                return call

            with fake(place, part="0") as opened:
                for name in ("open", "write", "fsync", "close", "unlink", "replace", "rename", "listdir"):
                    setattr(os, name, counted(getattr(os, name)))
                opened.finish()

        forked(work)
        fake_write(place, 3, finish=True)
        now = {name: held for name, held in contents(place).items() if not name.startswith("lock-")}
        need(now == whole, f"killed at call {at}: {sorted(now)}")


def attack_settings_round_trip(t):
    """A run's config.json given as --settings starts such a run again elsewhere: of every protocol."""
    for name, run in (
        ("online", online_run(digits_root())),
        ("continual", folder_run(digits_root(), protocol="continual", adapt=ONLINE_SMALL, classes=tuple("abcdefghij"))),
        ("odd", folder_run(digits_root(), adapt=SMALL.replace(seed=2**63 - 1, lr=1e-12))),
    ):
        described = json.loads(json.dumps(run.described()))
        (t / "c.json").write_text(json.dumps(described))
        from dtta_fast.commands.evaluate import Evaluate

        start, _ = Evaluate.start(["evaluate", "r", "--settings", str(t / "c.json")])
        need(json.loads(json.dumps(start.run_config.described())) == described, f"{name}: another config")


def attack_torchvision_sets_damaged(t):
    from scipy.io import savemat

    def put(name, data):
        path = t / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    for part in ("t10k", "train"):
        for kind in ("images-idx3", "labels-idx1"):
            put(f"FashionMNIST/raw/{part}-{kind}-ubyte", b"\0\0\x08\x03" + b"\xff" * 30)
    put("food-101/meta/test.json", json.dumps({"a": ["../../../etc/passwd"], "b": 5}).encode())
    (t / "food-101" / "images").mkdir()
    put("fgvc-aircraft-2013b/data/variants.txt", b"a\n")
    put("fgvc-aircraft-2013b/data/images_variant_test.txt", b"../../../../x a\n")
    (t / "fgvc-aircraft-2013b" / "data" / "images").mkdir()
    put("oxford-iiit-pet/annotations/test.txt", b"../../../x_1 1 1 1\n")
    (t / "oxford-iiit-pet" / "images").mkdir()
    (t / "flowers-102" / "jpg").mkdir(parents=True)
    savemat(t / "flowers-102" / "setid.mat", {"tstid": [[-5, 10**9]]})
    put("flowers-102/imagelabels.mat", b"MATLAB 5.0" + b"\xff" * 200)
    for file in ("batches.meta", "test_batch", *(f"data_batch_{i}" for i in range(1, 6))):
        put(f"cifar-10-batches-py/{file}", b"\x80\x04cos\nsystem\n(S'touch owned'\ntR.")
    for name in ("fashion-mnist", "food101", "aircraft", "pets", "flowers102", "cifar10"):
        try:
            refused(lambda: open_images(name, t), str(t))
        except Fell as error:
            raise Fell(f"{name}: {error}") from error
        except Exception as error:
            raise Fell(f"{name}: {type(error).__name__}: {str(error)[:100]}") from error
    need(not Path("owned").exists(), "a pickle ran")


def attack_run_in_the_data_s_own_folder(t):
    root = digit_folder(t / "root")
    held = contents(root)
    refused(lambda: evaluate(folder_run(root), root), "no run's folder")
    need(contents(root) == held, "something was written")
    evaluate(folder_run(root), root, overwrite=True)
    evaluate(folder_run(root), root)
    need({name: contents(root)[name] for name in held} == held, "a file of the data was changed")


def attack_kill_while_images_are_added(t):
    """Killed, then images of later names are added: the run goes on to all, as one that was undisturbed on the larger set."""
    root = digit_folder(t / "root")
    for online in (False, True):
        run = online_run(root) if online else folder_run(root)
        place = t / f"run{online}"

        class Stop(Exception):
            pass

        def advance(some):
            raise Stop

        with contextlib.suppress(Stop):
            evaluate(run, place, advance=advance)
        shutil.copy(root / "9" / "9a.png", root / "9" / f"9{'yz'[online]}.png")
        evaluate(run, place)
        evaluate(run, t / f"whole{online}")
        need(without_seconds(place) == without_seconds(t / f"whole{online}"), f"online {online}: other records")


def attack_bmp_and_tiff_claims(t):
    """Headers that claim more than there is: no memory is taken for it."""
    bmp = b"BM" + struct.pack("<IHHI", 100, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 13000, 13000, 1, 24, 0, 0, 0, 0, 0, 0)
    tif = (
        b"II*\0\x08\0\0\0"
        + struct.pack("<H", 5)
        + b"".join(
            struct.pack("<HHII", *entry)
            for entry in ((256, 4, 1, 13000), (257, 4, 1, 13000), (258, 3, 1, 8), (273, 4, 1, 8), (279, 4, 1, 2**31))
        )
        + bytes(4)
    )
    rle = b"BM" + struct.pack("<IHHI", 100, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 13000, -13000, 1, 8, 1, 0, 0, 0, 2**31, 0)
    gif = b"GIF89a" + struct.pack("<HH", 13000, 13000) + b"\0\0\0," + struct.pack("<4HB", 0, 0, 65535, 65535, 0) + b"\x08\0;"
    for i, data in enumerate((bmp, tif, rle, gif)):
        found = either(lambda: read_image(picture(t, data, "x.bmp")))
        need(not isinstance(found, str) or "x.bmp" in found, f"{i}: {found}")


def attack_jpeg_segments(t):
    buffer = io.BytesIO()
    Image.effect_noise((30, 30), 80).convert("RGB").save(buffer, "JPEG")
    whole = buffer.getvalue()
    for marker, data in (
        (0xE1, b"Exif\0\0" + bytes(60000)),
        (0xE2, b"ICC_PROFILE\0\1\1" + b"\xff" * 100),
        (0xEE, b"Adobe\0d\0\0\0\0\2"),
        (0xE2, b"MPF\0" + b"\xff" * 50),
        (0xED, b"Photoshop 3.0\x008BIM" + b"\xff" * 30),
        (0xC4, b"\xff" * 20),
        (0xDB, b"\x40" + bytes(64)),
        (0xC0, struct.pack(">BHHB", 8, 65535, 65535, 3) + b"\1\x22\0\2\x11\1\3\x11\1"),
        (0xDD, b"\0\0"),
        (0xDA, b"\xff"),
    ):
        path = picture(t, whole[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data + whole[2:], "x.jpg")
        found = either(lambda: read_image(path))
        need(not isinstance(found, str) or "x.jpg" in found, f"{marker:x}: {found}")


def attack_model_exchanged_between_kill_and_resume(t):
    """The denoiser's folder holds other weights when an online run goes on. Nothing promises that it is told; no state may be lost."""
    place = denoiser_copy(t)
    run = folder_run(
        digits_root(), protocol="online", adapt=ONLINE_SMALL, denoiser=str(place), model=f"local-dir:{zoo.folder('digits') / 'classifier'}"
    )

    class Stop(Exception):
        pass

    def advance(some):
        raise Stop

    with contextlib.suppress(Stop):
        evaluate(run, t / "run", advance=advance)
    held = contents(t / "run")
    (place / "calibration.json").write_text("{}")
    refused(lambda: evaluate(run, t / "run"), "calibration.json")
    need(contents(t / "run") == held, "an error changed the run")


# --- the runner


def run_all(words):
    cases = {name: case for name, case in globals().items() if name.startswith("attack_") and callable(case)}
    chosen = {name: case for name, case in cases.items() if not words or any(word in name for word in words)}
    held, fell = 0, []
    for name, case in chosen.items():
        place = Path(tempfile.mkdtemp(prefix="attack-")).resolve()
        begun = time.monotonic()
        try:
            case(place)
            held += 1
            print(f"held {name} ({time.monotonic() - begun:.1f} s)", flush=True)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and not fell:
                raise
            own = (
                str(error)
                if isinstance(error, Fell)
                else f"{type(error).__name__}: {error} at {traceback.extract_tb(error.__traceback__)[-1][:3]}"
            )
            fell.append(name)
            print(f"FELL {name} ({time.monotonic() - begun:.1f} s): {own[:600]!r}", flush=True)
        finally:
            os.chdir("/")
            shutil.rmtree(place, ignore_errors=True)
    shutil.rmtree(_cache, ignore_errors=True)
    print(f"{len(chosen)} cases: {held} held, {len(fell)} fell")


if __name__ == "__main__":
    run_all(sys.argv[1:])
