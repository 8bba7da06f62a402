"""The schema of a run's files: what it lets in can be summed up and shown, and what it refuses is named by file, line and field."""

from __future__ import annotations

import json
import random
import runpy
from pathlib import Path

import pytest

from dtta_fast.report import make_page, read_runs
from dtta_fast.runs.records import check_record, read_records, rounded
from dtta_fast.runs.summary import summary

MADE = runpy.run_path(str(Path(__file__).with_name("report_runs.py")))
write_run, record_of = MADE["write_run"], MADE["record_of"]
EXTREME = {
    "image_id": [2**53],
    "batch": [2**53],
    "path": ["", "\udcff\0", "x" * 10_000],
    "group": ["", "\u202e", "<b>" * 100],
    "label": [None, -1, 2**31 - 1, -(2**31)],
    "digest": [None, "0" * 16],
    "loss": [[], [None], [1e30, -1e30], [0] * 300],
    "accepted": [True, False],
    "evaluations": [0, 2**53],
    "seconds": [0, 1e12, 1e-300],
    "prediction": [None, -1, 2**31 - 1],
    "prediction_before": [None, 0],
    "confidence": [0, 1, 1e-300],
    "confidence_before": [0.0],
    "top": [[], [[None, 0]], [[3, 1.0]] * 50],
    "top_before": [[]],
    "score": [{}, {"mean_iou": None}, {"mean_iou": -1e30}, {"rmse": 1e30, "mean_iou": 1e-38}],
}
WRONG = {
    "image_id": [-1, 2**54, 1.0, True, None, "1", 10**400],
    "batch": [-1, 1e3, False],
    "path": [None, 3, ["a"]],
    "group": [None, {}],
    "label": [2**31, 1.5, True, "cat", 10**400],
    "digest": ["", "g" * 16, "0" * 65, 5],
    "loss": [None, [1e31], [10**400], ["0.1"], 0.1, [True]],
    "accepted": [1, "true", None],
    "evaluations": [-1, 1.5, 2**54, "12"],
    "seconds": [-1e-9, 1e13, int("9" * 400), None, "1"],
    "prediction": [0.5, True, 2**31],
    "confidence": [1e308, -1e-9, 1.0001, None, "0.5"],
    "top": [[[1]], [[1, 2, 0.5]], [1, 0.5], {"1": 0.5}, [[1, 1.5]], [[1.5, 0.5]], None],
    "score": [{"mean_iou": 1e31}, {"x[bold]": 1.0}, [0.5], {"rmse": True}, {"mean_iou": [1]}],
}


def task_of(field: str) -> str:
    return "segmentation" if field == "score" else "classification"


def changed(field: str, value: object) -> dict:
    found = {**record_of(3, task_of(field), ("fog2",), random.Random(1)), field: value}
    if field == "score" and isinstance(value, dict):
        found["score_before"] = dict.fromkeys(value, 0.5)
    return found


@pytest.mark.parametrize("field", EXTREME)
def test_what_is_let_in_can_be_shown(tmp_path, field):
    records = write_run(tmp_path / "run", task_of(field), images=3)
    for i, value in enumerate(EXTREME[field], 3):
        records.append(changed(field, value) | ({} if field == "image_id" else {"image_id": i}))
    (tmp_path / "run" / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (run,) = read_runs([tmp_path / "run"])
    assert len(run.records) == len(records)
    assert "</html>" in make_page([run])
    assert json.loads(json.dumps(summary(records), allow_nan=False))["images"] == len(records)


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG.items() for value in values])
def test_what_is_not_let_in_is_named(tmp_path, field, value):
    path = tmp_path / "records.jsonl"
    good, wrong = (json.dumps(record) + "\n" for record in (record_of(2, task_of(field), ("a",), random.Random(0)), changed(field, value)))
    path.write_text(good + wrong)
    with pytest.raises(
        ValueError, match=rf"records.jsonl, line 2, is not a record: {field}(_before)? (is|has) .*; restore it, or begin"
    ) as raised:
        list(read_records(path))
    assert str(path) in str(raised.value)
    assert len(str(raised.value)) < 500 + len(str(path))


@pytest.mark.parametrize("task", ["classification", "depth"])
def test_every_field_but_the_digest_is_needed(tmp_path, task):
    whole = record_of(0, task, ("a",), random.Random(0))
    check_record(whole)
    for field in whole:
        with pytest.raises(ValueError, match="Object missing required field"):
            check_record({name: value for name, value in whole.items() if name != field})
    failed = {name: whole[name] for name in ("image_id", "batch", "path", "group", "label")}
    check_record({**failed, "error": "it is truncated"})
    with pytest.raises(ValueError, match="error is '3'"):
        check_record({**failed, "error": 3})


@pytest.mark.parametrize(
    "text", ["null", "3", '"a"', "[]", "{}", "", "{", "NaN", '{"image_id": NaN}', "[" * 100_000, "9" * 5000, "\xff\xfe"]
)
def test_lines_that_are_no_objects(tmp_path, text):
    (tmp_path / "records.jsonl").write_text(text + "\n")
    with pytest.raises(ValueError, match=r"records.jsonl, line 1, is not a record: "):
        list(read_records(tmp_path / "records.jsonl"))


def test_what_is_written_is_let_in():
    """A loss that diverged is not a number, and a record of it is one."""
    for value in (float("nan"), float("inf"), -float("inf"), 1e31, 1e30, 0.1234567, -3e38):
        check_record(changed("loss", [rounded(value)]))
    assert (rounded(0.12345678), rounded(1e31)) == (0.123457, None)


def test_records_of_two_tasks_are_told(tmp_path):
    path, draw = tmp_path / "records.jsonl", random.Random(0)
    answers, maps = (record_of(0, task, ("a",), draw) for task in ("classification", "depth"))
    failed = {name: answers[name] for name in ("image_id", "batch", "path", "group", "label")} | {"error": "it is torn"}
    path.write_text("".join(json.dumps(record) + "\n" for record in (failed, answers, maps)))
    with pytest.raises(ValueError, match="line 3, is not a record: it holds scores of maps, and the run is of the other"):
        list(read_records(path))
    with pytest.raises(ValueError, match="line 2, is not a record: it holds classes, and the run is of the other"):
        list(read_records(path, "depth"))
    path.write_text(json.dumps(maps) + "\n")
    assert list(read_records(path, "segmentation")) == [maps]


def test_an_image_that_stands_twice_is_told(tmp_path):
    write_run(tmp_path / "run", images=5)
    text = (tmp_path / "run" / "records.jsonl").read_text()
    (tmp_path / "run" / "records.jsonl").write_text(text + text.splitlines(keepends=True)[1])
    with pytest.raises(ValueError, match=r"records.jsonl, line 6, is of image 1, as line 2 is; remove one of them"):
        read_runs([tmp_path / "run"])


@pytest.mark.parametrize("name", ["config.json", "summary.json"])
@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"data": "imagenet"}, "data"),
        ({"data": {"name": 3}}, "data"),
        ({"data": {"name": "folder", "severities": ["a"]}}, "data"),
        ({"task": None}, "task"),
        ({"adapt": [1]}, "adapt"),
        ({"classes": "abc"}, "classes"),
        ({"extra": json.loads("[" * 40 + "]" * 40)}, "nested more than 8 levels"),
    ],
)
def test_a_damaged_config_is_named(tmp_path, name, change, field):
    write_run(tmp_path / "run", images=2)
    found = json.loads((tmp_path / "run" / name).read_text())
    found.get("config", found).update(change)
    (tmp_path / "run" / name).write_text(json.dumps(found))
    with pytest.raises(ValueError, match=rf"{name} is damaged: .*{field}"):
        read_runs([tmp_path / "run"])


def test_pipes_and_devices_are_no_files_of_a_run(tmp_path):
    import os

    write_run(tmp_path / "run", images=2)
    (tmp_path / "run" / "config.json").unlink()
    os.mkfifo(tmp_path / "run" / "config.json")
    with pytest.raises(ValueError, match=r"config.json is damaged: it is a pipe"):  # opened, it would wait for ever
        read_runs([tmp_path / "run"])
