"""Reads the folders of evaluation runs for the report."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dtta_fast.runs.folder import CONFIG, OF_RECORDS, RECORDS, SUMMARY, digest_of, named
from dtta_fast.runs.records import OF_MAPS, Config, Record, Summary, read_object, read_records
from dtta_fast.runs.writing import check_name


@dataclass(frozen=True)
class Run:
    """An evaluation run.

    Attributes:
        name: the folder name, with as many parents as needed to distinguish it from the other runs.
        task: classification (including zero-shot runs), segmentation or depth.
        records: of the images that were adapted; failed: of those that could not be adapted. Both are in dataset order.
        config: the resolved config, nested. classes: names, may be empty. environment: versions and machine.
        seconds: by phase. wall_seconds: of the whole run. They are empty and None until the run has ended.
        unfinished: why the figures do not cover a complete run; "" if they do.
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
    unfinished: str

    def class_name(self, number: int | None) -> str:
        """Returns the name of a class, or its number if it has none; None stands for a model class that the dataset does not have."""
        if number is None:
            return "none of the classes"
        return str(self.classes[number]) if 0 <= number < len(self.classes) else f"class {number}"


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Reads the runs in these folders, whether finished or still in progress.

    Raises:
        ValueError: no folder is given, a folder is given twice, has no records or contains a damaged file, or the tasks of the runs differ.
    """
    if not folders:
        raise ValueError("runs are missing: give one folder of `dtta evaluate` or more")
    for folder in folders:
        check_name("runs", folder)
    places = [Path(os.path.realpath(folder)) for folder in folders]
    for folder, place in zip(folders, places, strict=True):
        if places.count(place) > 1:
            raise ValueError(f"runs has {str(folder)!r} twice; name each once")
        if not place.is_dir() or not named(place, OF_RECORDS):
            raise ValueError(f"{str(folder)!r} holds no {RECORDS}: give the folder of a run of `dtta evaluate`")
    runs = [_read(place, name) for place, name in zip(places, _names(places), strict=True)]
    tasks = {run.task: run.name for run in runs}
    if len(tasks) > 1:
        shown = ", ".join(f"{name} is of {task}" for task, name in tasks.items())
        raise ValueError(f"runs are of several tasks: {shown}; make a report for each task")
    return [run if run.classes else replace(run, classes=_classes_of_another(run, runs)) for run in runs]


def _classes_of_another(run: Run, runs: Sequence[Run]) -> Sequence[str]:
    """Returns the classes of a finished run on the same dataset, because a run in progress has not written its own yet."""
    return next((other.classes for other in runs if other.classes and other.config.get("data") == run.config.get("data")), ())


def _names(places: Sequence[Path]) -> list[str]:
    """Returns the shortest path suffixes that are all different."""
    for parts in range(1, max(len(place.parts) for place in places)):
        names = ["/".join(place.parts[-parts:]) for place in places]
        if len(set(names)) == len(names):
            return names
    return [str(place) for place in places]


def _read(folder: Path, name: str) -> Run:
    summary = read_object(folder / SUMMARY, Summary) if (folder / SUMMARY).exists() else {}
    config = read_object(folder / CONFIG, Config) if (folder / CONFIG).exists() else summary.get("config", {})
    files = named(folder, OF_RECORDS)
    records: dict[int, Record] = {}
    for path in files:  # each torchrun process writes its own file until the run has ended
        lines: dict[int, int] = {}
        for line, record in enumerate(read_records(path, config.get("task")), 1):
            first = lines.setdefault(record["image_id"], line)
            if first != line:
                raise ValueError(f"{path}, line {line}, is of image {record['image_id']}, as line {first} is; remove one of them")
            records[record["image_id"]] = record
    ordered = [records[i] for i in sorted(records)]
    sound = [record for record in ordered if "error" not in record]
    unfinished = _unfinished(summary, config, len(ordered), files)
    over = {} if unfinished else summary
    return Run(
        name=name,
        folder=folder,
        task=_task(config, sound),
        records=sound,
        failed=[record for record in ordered if "error" in record],
        config=config,
        classes=summary.get("classes") or config.get("classes") or (),
        environment=over.get("environment", {}),
        seconds=over.get("seconds", {}),
        wall_seconds=over.get("wall_seconds"),
        unfinished=unfinished,
    )


def _unfinished(summary: Mapping[str, Any], config: Mapping[str, Any], images: int, files: Sequence[Path]) -> str:
    """Explains why the records are not those of a complete run; returns "" if they are."""
    if not summary:
        return f"{images:,} images so far"
    if summary["images"] != images or [path.name for path in files] != [RECORDS]:
        return f"{images:,} images so far; {SUMMARY} is of {summary['images']:,}"
    if summary.get("records") not in (None, digest_of(files[0])):
        return f"{RECORDS} is not what {SUMMARY} was made of"
    return "" if summary["config"] == config else f"{SUMMARY} is of another config than {CONFIG}"


def _task(config: Mapping[str, Any], records: Sequence[Record]) -> str:
    task = str(config.get("task", ""))
    if task in OF_MAPS:
        return task
    if not task and records and "score" in records[0]:  # a folder without its config
        return "depth" if "abs_rel" in records[0]["score"] else "segmentation"
    return "classification"
