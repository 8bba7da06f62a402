"""The folders of evaluation runs, as the report needs them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dtta_fast.runs.folder import CONFIG, RECORDS, SUMMARY, Record, read_records

OF_IMAGE = ("path", "group", "label")
OF_ANSWER = ("loss", "accepted", "evaluations", "seconds")
OF_CLASSES = ("prediction_before", "prediction", "confidence_before", "confidence", "top_before", "top")
OF_MAPS = ("score_before", "score")


@dataclass(frozen=True)
class Run:
    """An evaluation run.

    Attributes:
        name: its folder's, with as many parents as tell it from the other runs'.
        task: classification (also of zero-shot runs), segmentation or depth.
        records: of the images that were adapted to; failed: of those that could not be. Both in the order of the data set.
        config: the resolved config, nested. classes: names, may be empty. environment: versions and machine.
        seconds: by phase. wall_seconds: of the whole run. Both are empty, or None, until the run has ended.
        finished: whether it has ended.
    """

    name: str
    folder: Path
    task: str
    records: Sequence[Record]
    failed: Sequence[Record]
    config: Mapping[str, Any]
    classes: Sequence[str]
    environment: Mapping[str, str]
    seconds: Mapping[str, float]
    wall_seconds: float | None
    finished: bool

    def class_name(self, number: int | None) -> str:
        """A class's name, or its number; None is a class of the model's that the data set does not have."""
        if number is None:
            return "none of the classes"
        return str(self.classes[number]) if 0 <= number < len(self.classes) else f"class {number}"


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders, finished or still going.

    Raises:
        ValueError: no folder, one that is named twice or holds no records, a file in it that is damaged, or runs of several tasks.
    """
    if not folders:
        raise ValueError("runs are missing: give one folder of `dtta evaluate` and more")
    places = [Path(folder).resolve() for folder in folders]
    for folder, place in zip(folders, places, strict=True):
        if places.count(place) > 1:
            raise ValueError(f"runs has {str(folder)!r} twice; name each once")
        if not any(place.glob("records*.jsonl")):
            raise ValueError(f"{str(folder)!r} holds no {RECORDS}: give the folder of a run of `dtta evaluate`")
    runs = [_read(place, name) for place, name in zip(places, _names(places), strict=True)]
    tasks = {run.task: run.name for run in runs}
    if len(tasks) > 1:
        shown = ", ".join(f"{name} is of {task}" for task, name in tasks.items())
        raise ValueError(f"runs are of several tasks: {shown}; make a report for each task")
    return [run if run.classes else replace(run, classes=_classes_of_another(run, runs)) for run in runs]


def _classes_of_another(run: Run, runs: Sequence[Run]) -> Sequence[str]:
    """Of a finished run on the same data set: one that is still going has not written them yet."""
    return next((other.classes for other in runs if other.classes and other.config.get("data") == run.config.get("data")), ())


def _names(places: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ."""
    for parts in range(1, max(len(place.parts) for place in places)):
        names = ["/".join(place.parts[-parts:]) for place in places]
        if len(set(names)) == len(names):
            return names
    return [str(place) for place in places]


def _read(folder: Path, name: str) -> Run:
    records: dict[int, Record] = {}
    for path in sorted(folder.glob("records*.jsonl")):  # the processes of torchrun write a file each until the run has ended
        for number, record in enumerate(read_records(path), 1):
            missing = _missing(record)
            if missing:
                raise ValueError(f"{path}, line {number}, is no record: it has no {missing}")
            records[record["image_id"]] = record
    ordered = [records[i] for i in sorted(records)]
    sound = [record for record in ordered if "error" not in record]
    finished = (folder / SUMMARY).is_file()
    summary = _read_object(folder / SUMMARY) if finished else {}
    config = summary["config"] if "config" in summary else _read_object(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    return Run(
        name=name,
        folder=folder,
        task=_task(config, sound),
        records=sound,
        failed=[record for record in ordered if "error" in record],
        config=config,
        classes=summary.get("classes") or config.get("classes") or (),
        environment=summary.get("environment", {}),
        seconds=summary.get("seconds", {}),
        wall_seconds=summary.get("wall_seconds"),
        finished=finished,
    )


def _missing(record: Any) -> str | None:
    """The first field that a record lacks."""
    if not isinstance(record, dict):
        return "fields"
    answer = () if "error" in record else OF_ANSWER + (OF_MAPS if "score" in record else OF_CLASSES)
    return next((field for field in OF_IMAGE + answer if field not in record), None)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds no object")
    return found


def _task(config: Mapping[str, Any], records: Sequence[Record]) -> str:
    task = str(config.get("task", ""))
    if task in ("segmentation", "depth"):
        return task
    if not task and records and "score" in records[0]:  # a folder without its config
        return "depth" if "abs_rel" in records[0]["score"] else "segmentation"
    return "classification"
