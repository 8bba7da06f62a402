"""The folders of evaluation runs, as the report needs them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dtta_fast.runs.folder import CONFIG, RECORDS, SUMMARY, Record, read_records

OF_IMAGE = ("path", "group", "label")
OF_ANSWER = ("loss", "accepted", "evaluations", "seconds")
OF_CLASSES = ("prediction_before", "prediction", "confidence_before", "confidence", "top_before", "top")
OF_MAPS = ("score_before", "score")

OF_SUMMARY: dict[str, type] = {"config": dict, "classes": list, "environment": dict, "seconds": dict}


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300


def _class(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31)


def _scores(value: Any) -> bool:
    return isinstance(value, dict) and all(score is None or _number(score) for score in value.values())


def _top(value: Any) -> bool:
    pairs = value if isinstance(value, list) else [None]
    return all(isinstance(pair, list) and len(pair) == 2 and _class(pair[0]) and _number(pair[1]) for pair in pairs)


def _losses(value: Any) -> bool:
    return isinstance(value, list) and all(loss is None or _number(loss) for loss in value)


def _text(value: Any) -> bool:
    return isinstance(value, str)


KINDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("path", "group", "error"), _text),
    **dict.fromkeys(("label", "prediction_before", "prediction"), _class),
    **dict.fromkeys(("confidence_before", "confidence", "evaluations", "seconds"), _number),
    **dict.fromkeys(("top_before", "top"), _top),
    **dict.fromkeys(OF_MAPS, _scores),
    "accepted": lambda value: isinstance(value, bool),
    "loss": _losses,
}


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
            wrong = next((name for name, sound in KINDS.items() if name in record and not sound(record[name])), None)
            if wrong:
                raise ValueError(f"{path}, line {number}, is no record: {wrong} is {str(record[wrong])[:40]!r}; remove the line")
            records[record["image_id"]] = record
    ordered = [records[i] for i in sorted(records)]
    sound = [record for record in ordered if "error" not in record]
    finished = (folder / SUMMARY).is_file()
    summary = _read_object(folder / SUMMARY) if finished else {}
    for field, kind in OF_SUMMARY.items():
        if not isinstance(summary.get(field, kind()), kind):
            raise ValueError(f"{folder / SUMMARY} is damaged: {field} is no {kind.__name__}; end the run again by `dtta evaluate`")
    if not all(map(_number, (*summary.get("seconds", {}).values(), summary.get("wall_seconds") or 0))):
        raise ValueError(f"{folder / SUMMARY} is damaged: seconds and wall_seconds are no numbers; end the run again by `dtta evaluate`")
    if not all(isinstance(name, str) for name in summary.get("classes", ())):
        raise ValueError(f"{folder / SUMMARY} is damaged: classes are no names; end the run again by `dtta evaluate`")
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


def _missing(record: Record) -> str | None:
    """The first field that a record lacks."""
    answer = () if "error" in record else OF_ANSWER + (OF_MAPS if "score" in record else OF_CLASSES)
    return next((field for field in OF_IMAGE + answer if field not in record), None)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
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
