"""Schemas of a run's files: the records (one JSON line per image), the summary and the config."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta

from dtta_fast.runtime.files import open_plain, read_text

Record = dict[str, Any]
DEEPEST = 8  # nesting levels of an object in a file
LARGEST = 1e30  # of a loss or a score: the sum of 10^8 such values still fits float32
OF_MAPS = ("segmentation", "depth")  # tasks
MOST_BYTES = 2**36  # of a records file; enough for 10^8 images
REMEDY = "restore it, or begin again in another folder"

Count = Annotated[int, Meta(ge=0, le=2**53)]
ClassNumber: TypeAlias = Annotated[int, Meta(ge=-(2**31), lt=2**31)] | None
Share = Annotated[float, Meta(ge=0, le=1)]
Real = Annotated[float, Meta(ge=-LARGEST, le=LARGEST)]
Seconds = Annotated[float, Meta(ge=0, le=1e12)]
Digest = Annotated[str, Meta(pattern="^[0-9a-f]{16,64}$")]
ScoreName = Literal["mean_iou", "mean_class_accuracy", "abs_rel", "rmse", "delta1", "delta2", "delta3", "ssim"]
Plain: TypeAlias = bool | int | float | str | None
Values: TypeAlias = Plain | list[Plain]


class OfImage(msgspec.Struct, kw_only=True):
    """Fields common to all records. digest: runs.content.digest() of the pixels that were read; absent in runs of older versions."""

    image_id: Count
    batch: Count
    path: str
    group: str
    label: ClassNumber
    digest: Digest | None = None


class OfFailure(OfImage, kw_only=True):
    """Record of an image that could not be adapted to."""

    error: str


class OfAnswer(OfImage, kw_only=True):
    """Record of an image that was adapted to."""

    loss: list[Real | None]
    accepted: bool
    evaluations: Count
    seconds: Seconds


class OfClasses(OfAnswer, kw_only=True):
    """Record of a classified image: predictions and probabilities before and after adaptation."""

    prediction_before: ClassNumber
    prediction: ClassNumber
    confidence_before: Share
    confidence: Share
    top_before: list[tuple[ClassNumber, Share]]
    top: list[tuple[ClassNumber, Share]]


class OfMaps(OfAnswer, kw_only=True):
    """Record of an image with a map: scores before and after adaptation, with the same names."""

    score_before: dict[ScoreName, Real | None]
    score: dict[ScoreName, Real | None]


class Data(msgspec.Struct, kw_only=True):
    """The data set of a config."""

    name: str
    root: str | None = None
    corruptions: list[str] = []
    severities: list[int] = []
    split: str | None = None
    subset: str | None = None


class Config(msgspec.Struct, kw_only=True):
    """The fields of config.json that every version writes."""

    data: Data
    task: str
    adapt: dict[str, Values | dict[str, Values]]
    classes: list[str] = []


class Summary(msgspec.Struct, kw_only=True):
    """The contents of summary.json. records: digest of the records.jsonl that it summarises; absent in summaries of older versions."""

    images: Count
    errors: Count
    groups: dict[str, dict[str, Any]]
    config: Config
    classes: list[str]
    environment: dict[str, str]
    seconds: dict[str, Seconds]
    wall_seconds: Seconds
    records: Digest | None = None


def read_records(path: Path, task: str | None = None) -> Iterator[Record]:
    """Yields the records of a file in order. An incomplete last line, left by a killed run, is skipped.

    Args:
        task: task of the run, which all records must match; if omitted, they must match the first record that is not a failure.

    Raises:
        ValueError: a complete line is not a valid record or belongs to another task; the message names the file, line and field.
    """
    expected: type[OfImage] | None = None if task is None else OfMaps if task in OF_MAPS else OfClasses
    with open_plain(path, MOST_BYTES) as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line, parse_constant=_refuse, object_pairs_hook=_once)
                kind = check_record(record)
                if kind is not OfFailure and kind is not (expected := expected or kind):
                    raise ValueError(f"it holds {'scores of maps' if kind is OfMaps else 'classes'}, and the run is of the other")
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}, is not a record: {error}; {REMEDY}") from error
            yield record


def check_record(record: Any) -> type[OfImage]:
    """Returns the type of a record.

    Raises:
        ValueError: it is not a valid record; the message names the field and its value.
    """
    kind: type[OfImage] = OfClasses
    if isinstance(record, dict):
        kind = OfFailure if "error" in record else OfMaps if "score" in record else OfClasses
    check(record, kind)
    if kind is OfMaps and set(record["score"]) != set(record["score_before"]):
        raise ValueError(f"score has {', '.join(record['score'])} and score_before {', '.join(record['score_before'])}")
    return kind


def check(value: Any, kind: type[msgspec.Struct]) -> Any:
    """Converts decoded JSON to a struct of this type.

    Raises:
        ValueError: the value does not fit the type; the message names the field and its value.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        place = re.search(r"\$\.(\w+)", str(error))
        if place is None or not isinstance(value, dict) or place[1] not in value:
            raise ValueError(str(error)) from error
        raise ValueError(f"{place[1]} is {str(value[place[1]])[:40]!r}: {error}") from error


def read_object(path: Path, kind: type[msgspec.Struct]) -> dict[str, Any]:
    """Reads the JSON object in a run's file and checks it against a schema.

    Raises:
        ValueError: the file cannot be read or does not fit the schema; the message names the file, the field and its value.
    """
    try:
        found = json.loads(read_text(path))
        _check_depth(found, DEEPEST)
        check(found, kind)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}; {REMEDY}") from error
    return dict(found)


def _check_depth(value: Any, left: int) -> None:
    if not left:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep")
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_depth(part, left - 1)


def rounded(value: float) -> float | None:
    """Rounds to 6 significant digits, which float32 always holds; None (null in JSON) for NaN and for magnitudes above LARGEST."""
    return float(f"{value:.6g}") if abs(value) <= LARGEST else None


def line_of(record: Record) -> str:
    """Formats a record as a line of JSON."""
    return json.dumps(record, allow_nan=False) + "\n"


def _refuse(constant: str) -> None:
    raise ValueError(f"it has {constant}, which is not JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Builds an object and rejects duplicate keys, which different JSON readers resolve differently."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {next(name for name in names if names.count(name) > 1)[:40]!r} twice")
    return found
