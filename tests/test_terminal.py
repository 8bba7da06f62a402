"""What the commands show and write: names of others as text, results before they are shown, and no file of others overwritten."""

from __future__ import annotations

import io
import json
import os
import random
import runpy
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from rich.table import Table

from dtta_fast.commands import common
from dtta_fast.commands.adapt import _print_probabilities
from dtta_fast.commands.cli import main
from dtta_fast.commands.common import check_apart, check_path, holds, is_page, progress_bar, shown, terminal
from dtta_fast.commands.demo import SIGNED, _is_picture
from dtta_fast.commands.export import _is_package
from dtta_fast.runs.folder import RunFolder
from dtta_fast.runs.summary import summary
from dtta_fast.runtime import environment

record_of = runpy.run_path(str(Path(__file__).with_name("report_runs.py")))["record_of"]
HOSTILE = (
    "x[bold]y\x1b[2J",
    "[/b]",
    "[red]a[/red]:smile:",
    "\x1b]8;;https://x.org\x07link",
    "a\r\nb\x9b2J",
    "\u202egnp.exe",
    "[link=file:///]\udcff",
    "\\[/b]",
)


@pytest.mark.parametrize("name", HOSTILE)
def test_shown_is_one_printable_line_that_tells_names_apart(name):
    assert shown(name).isprintable()
    assert shown(name) != shown(name + "\x00")
    assert shown("grün 猫 [a-z]") == "grün 猫 [a-z]"
    shown(name).encode()


@pytest.mark.parametrize("name", HOSTILE)
def test_summaries_and_probabilities_show_names_as_they_are(monkeypatch, tmp_path, capsys, name):
    """A run's folder, its groups and its scores, and the names of classes and images."""
    monkeypatch.setenv("COLUMNS", "400")
    folder, result = tmp_path / f"run{name}", tmp_path / "found.json"
    records = [record_of(i, "classification", (name,), random.Random(i)) for i in range(3)]
    found = {**summary(records), "environment": {}, "wall_seconds": 1.0}

    def evaluate(run, out, *, advance, **options):
        advance(records)
        return found

    monkeypatch.setattr("dtta_fast.commands.evaluate.evaluate", evaluate)
    main(["evaluate", str(folder), "--json", str(result)])
    printed = capsys.readouterr().out
    assert "".join(f"failed; {shown(folder)}".split()) in "".join(printed.split())  # a title is broken to its table's width
    assert f"error % [{shown(name)}]: " in printed
    assert printed.replace("\n", "").isprintable()
    assert json.loads(result.read_text()) == found
    _print_probabilities({"path": name, "evaluations": 1, "seconds": 1.0, "before": {name: 0.5}, "after": {name: 0.7}})
    printed = capsys.readouterr().out
    assert printed.count(shown(name)) == 2
    assert printed.replace("\n", "").isprintable()


@pytest.mark.parametrize("name", HOSTILE)
def test_tables_bars_and_errors_take_no_markup(monkeypatch, capsys, name):
    monkeypatch.setenv("COLUMNS", "200")
    table = Table(title=shown(name), caption=shown(name))
    table.add_column(shown(name))
    table.add_row(shown(name))
    terminal().print(table)
    terminal().print(shown(name))
    assert capsys.readouterr().out.count(shown(name)) == 5
    with progress_bar() as bar:
        bar.add_task(shown(name), total=2)
        screen = io.StringIO()
        Console(file=screen, width=200).print(bar.get_renderable())
    assert shown(name) in screen.getvalue()
    with pytest.raises(SystemExit):
        main(["adapt", f"{name.encode(errors='backslashreplace').decode()}.png"])
    assert capsys.readouterr().err.replace("\n", "", 1).isprintable()


def test_every_command_s_console_is_the_safe_one():
    """Names of files, classes and devices reach all of them: none may read markup."""
    for path in sorted(Path(common.__file__).parent.glob("*.py")):
        text = path.read_text()
        assert path.name == "common.py" or "Console(" not in text, path
        assert "write_text(" not in text, path


def test_a_result_is_there_before_anything_is_shown(monkeypatch, tmp_path):
    """The terminal fails at the first word."""

    def fail(*arguments, **options):
        raise OSError("the terminal is gone")

    monkeypatch.setattr("builtins.print", fail)
    monkeypatch.setattr("dtta_fast.commands.common.Console.print", fail)
    monkeypatch.setattr("dtta_fast.commands.evaluate.evaluate", lambda *_, **__: {**summary([]), "environment": {}, "wall_seconds": 1.0})
    for arguments in (["env"], ["evaluate", str(tmp_path / "run")]):
        path = tmp_path / f"{arguments[0]}.json"
        with pytest.raises(OSError, match="the terminal is gone"):
            main([*arguments, "--json", str(path)])
        assert json.loads(path.read_text())


def test_a_terminal_without_a_letter_shows_its_number(monkeypatch):
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stderr", screen)
    with pytest.raises(SystemExit):
        main(["adapt", "grün.png"])
    screen.flush()
    assert b"gr\\xfcn.png does not exist" in screen.buffer.getvalue()


# --- files of others


@pytest.mark.parametrize(
    ("held", "ours"),
    [
        ({"images": [], "config": {}}, holds("images", "config")),
        ({"benchmark": "bench", "environment": {}}, holds("benchmark", "environment")),
        (environment.describe(), holds("python", "torch")),
    ],
)
def test_an_earlier_result_alone_is_replaced(tmp_path, held, ours):
    path = tmp_path / "found.json"
    check_path("json", path, ours)
    for empty in ("", json.dumps(held)):
        path.write_text(empty)
        check_path("json", path, ours)
    for other in ('{"architectures": []}', "[1]", "{", "\0\1", json.dumps(held) + "\n{}", "[" * 100_000):
        path.write_text(other)
        with pytest.raises(ValueError, match=r"json is '.*found.json', a file that is not an earlier result of this command"):
            check_path("json", path, ours)
        assert path.read_text() == other


@pytest.mark.parametrize(
    "arguments",
    [
        ["adapt", "IT", "--json", "IT"],
        ["env", "--json", "IT"],
        ["evaluate", "run", "--json", "IT"],
        ["report", "RUN", "--out", "IT"],
        ["bench", "--json", "IT"],
        ["profile", "--trace", "IT"],
        ["profile", "--html", "IT"],
        ["demo", "--json", "IT"],
        ["demo", "--task", "depth", "--picture", "IT"],
        ["export", "IT.pt2"],
        ["calibrate", "RUN", "RUN", "--out", "IT"],
        ["calibrate", "RUN", "RUN", "--json", "IT"],
    ],
)
def test_no_command_overwrites_a_photograph(tmp_path, capsys, arguments):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "records.jsonl").write_text("")
    for name in ("photo.png", "photo.png.pt2"):
        Image.new("RGB", (4, 4)).save(tmp_path / name, format="PNG")
    names = {"IT": "photo.png", "IT.pt2": "photo.png.pt2", "RUN": "run"}
    before = {path: path.read_bytes() for path in tmp_path.glob("*.p*")}
    with pytest.raises(SystemExit):
        main([str(tmp_path / names[part]) if part in names else part for part in arguments])
    assert "a file that is not an earlier result of this command: give another name, or remove it" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.glob("*.p*")} == before


def test_a_run_s_files_are_no_place_for_results(tmp_path, capsys):
    run = tmp_path / "run"
    with RunFolder(run, {"data": {"name": "digits"}, "task": "classification", "adapt": {}}, [[]], None) as folder:
        folder.append(0, [])
        folder.write_summary({"images": 0})
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    (tmp_path / "link.json").symlink_to(run / "summary.json")
    (run / "state-00000002.safetensors").symlink_to(tmp_path / "elsewhere.json")
    mine = ("config.json", "summary.json", "records.jsonl", "records-3.jsonl", "state-00000001.safetensors", "lock", "lock-1")
    for name in (*mine, "summary.json.7.new", "../link.json", "state-00000002.safetensors"):
        for arguments in (["env", "--json"], ["evaluate", str(tmp_path / "other"), "--json"], ["report", str(run), "--out"]):
            with pytest.raises(SystemExit):
                main([*arguments, str(run / name)])
            assert "which is a file of the run in this folder" in capsys.readouterr().err
    (tmp_path / "new").mkdir()
    with pytest.raises(SystemExit):
        main(["evaluate", str(tmp_path / "new"), "--json", str(tmp_path / "new" / "records.jsonl")])
    assert "which is a name of the run's own files" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["evaluate", str(tmp_path / "none"), "--json", str(tmp_path / "none")])
    assert "and so is out" in capsys.readouterr().err
    (tmp_path / "new" / "lock").touch()
    with pytest.raises(SystemExit):
        main(["env", "--json", str(tmp_path / "new" / "lock")])
    assert "which may be the lock of a run that is going" in capsys.readouterr().err
    (run / "state-00000002.safetensors").unlink()
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_two_results_take_two_files(tmp_path):
    check_apart(out=tmp_path / "a", json=tmp_path / "b", html=None, trace=None)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with pytest.raises(ValueError, match=r"json is '.*link', and so is out: give each a file of its own"):
        check_apart(out=tmp_path / "a", json=tmp_path / "link")


def test_devices_are_written_to_and_pages_known(tmp_path):
    main(["env", "--json", "/dev/null"])
    page = tmp_path / "page.html"
    for text, ours in (
        ("<!doctype html>\n<title>run – dtta report</title>", True),
        ("<!doctype html><title>a – dtta profile</title>", True),
        ("<!doctype html><title>thesis</title>", False),
    ):
        page.write_text(text, encoding="utf-8")
        assert is_page(page) is ours
    page.write_bytes(b"\x89PNG" + "\0".join(SIGNED).encode())
    assert _is_picture(page)
    assert not _is_package(page)


def test_links_to_themselves_are_told_in_a_line(tmp_path, capsys):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for arguments in (
        ["env", "--json", loop],
        ["report", loop],
        ["report", tmp_path, "--out", loop],
        ["evaluate", tmp_path, "--json", loop],
    ):
        with pytest.raises(SystemExit):
            main([*map(str, arguments)])
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert repr(str(loop)) in told
    assert loop.is_symlink()


def test_a_pipe_is_written_to_as_it_is(tmp_path):
    """Its own name, behind the link /dev/stdout, is none that can be opened."""
    read, end = os.pipe()
    main(["env", "--json", f"/proc/self/fd/{end}"])
    os.close(end)
    with open(read, encoding="utf-8") as file:
        assert "torch" in json.load(file)


def test_a_place_that_cannot_be_written_to_is_named_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match=r"html is '.*page.html', where the result cannot be written: give a place that you may write to"):
        check_path("html", tmp_path / "page.html")


def test_settings_with_escapes_are_refused_before_the_help_shows_them(tmp_path, capsys):
    for field, value in (("model", "a\x1b]0;owned\x07"), ("classes", ["a", "b\x07"])):
        (tmp_path / "s.json").write_text(json.dumps({field: value}))
        with pytest.raises(SystemExit):
            main(["evaluate", str(tmp_path / "run"), "--settings", str(tmp_path / "s.json"), "--help"])
        found = "".join(capsys.readouterr())
        assert field in found
        assert "\x1b]0" not in found
        assert "\x07" not in found


def test_a_page_that_quotes_a_report_s_title_is_none(tmp_path):
    page = tmp_path / "x.html"
    page.write_text("<!doctype html><title>thesis</title><p>It quotes: – dtta report</title></p>")
    assert not is_page(page)
    page.write_text("<!doctype html>\n<html><head><title>a, b – dtta report</title></head></html>")
    assert is_page(page)
