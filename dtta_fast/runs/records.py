"""What the files of a run may hold: the schema of a record, a JSON line an image, and of the summary and the config beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta

from dtta_fast.files import open_plain, read_text

Record = dict[str, Any]
DEEPEST = 8  # levels of an object in a file
LARGEST = 1e30  # of a loss or a score: float32 has room for sums of 10^8 of them
OF_MAPS = ("segmentation", "depth")  # tasks
MOST_BYTES = 2**36  # of a records file: 10^8 images
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
    """What every record has. digest: of the pixels that were read, runs.content.digest()'s; runs of older versions have none."""

    image_id: Count
    batch: Count
    path: str
    group: str
    label: ClassNumber
    digest: Digest | None = None


class OfFailure(OfImage, kw_only=True):
    """Of an image that could not be adapted to."""

    error: str


class OfAnswer(OfImage, kw_only=True):
    """Of an image that was adapted to."""

    loss: list[Real | None]
    accepted: bool
    evaluations: Count
    seconds: Seconds


class OfClasses(OfAnswer, kw_only=True):
    """Of an image with an answer: probabilities before and after."""

    prediction_before: ClassNumber
    prediction: ClassNumber
    confidence_before: Share
    confidence: Share
    top_before: list[tuple[ClassNumber, Share]]
    top: list[tuple[ClassNumber, Share]]


class OfMaps(OfAnswer, kw_only=True):
    """Of an image with a map: scores before and after, of the same names."""

    score_before: dict[ScoreName, Real | None]
    score: dict[ScoreName, Real | None]


class Data(msgspec.Struct, kw_only=True):
    """The data set of a config."""

    name: str
    root: str | None = None
    corruptions: list[str] = []
    severities: list[int] = []
    split: str | None = None


class Config(msgspec.Struct, kw_only=True):
    """config.json, as far as every version writes it."""

    data: Data
    task: str
    adapt: dict[str, Values | dict[str, Values]]
    classes: list[str] = []


class Summary(msgspec.Struct, kw_only=True):
    """summary.json. records: digest of the records.jsonl that it sums up; summaries of older versions have none."""

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
    """The lines of a records file, the first to the last; a last one without its end, of a run that was killed, is left out.

    Args:
        task: the run's, which the records have to be of; where it is left out, that of the first answer.

    Raises:
        ValueError: a whole line is no record, or one of another task; the message names file, line and field.
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
                raise ValueError(f"{path}, line {number}, is no record: {error}; {REMEDY}") from error
            yield record


def check_record(record: Any) -> type[OfImage]:
    """The kind of a record.

    Raises:
        ValueError: it is none; the message names the field and its value.
    """
    kind: type[OfImage] = OfClasses
    if isinstance(record, dict):
        kind = OfFailure if "error" in record else OfMaps if "score" in record else OfClasses
    check(record, kind)
    if kind is OfMaps and set(record["score"]) != set(record["score_before"]):
        raise ValueError(f"score has {', '.join(record['score'])} and score_before {', '.join(record['score_before'])}")
    return kind


def check(value: Any, kind: type[msgspec.Struct]) -> Any:
    """JSON as a struct of this kind.

    Raises:
        ValueError: it is none; the message names the field and its value.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        place = re.search(r"\$\.(\w+)", str(error))
        if place is None or not isinstance(value, dict) or place[1] not in value:
            raise ValueError(str(error)) from error
        raise ValueError(f"{place[1]} is {str(value[place[1]])[:40]!r}: {error}") from error


def read_object(path: Path, kind: type[msgspec.Struct]) -> dict[str, Any]:
    """The JSON object of a run's file, which fits the schema.

    Raises:
        ValueError: it does not; the message names the file, the field and its value.
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
    """To 6 digits, which is what float32 holds for sure; None, which JSON has for it, where it is no number or beyond LARGEST."""
    return float(f"{value:.6g}") if abs(value) <= LARGEST else None


def line_of(record: Record) -> str:
    """A record as its line."""
    return json.dumps(record, allow_nan=False) + "\n"


def _refuse(constant: str) -> None:
    raise ValueError(f"it has {constant}, which is no JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys each stand once: of two, every reader would take another."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {next(name for name in names if names.count(name) > 1)[:40]!r} twice")
    return found
