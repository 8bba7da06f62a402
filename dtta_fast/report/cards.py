"""The images that changed most, with thumbnails."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from PIL import Image

from dtta_fast.report.figures import Pair, pairs_plot
from dtta_fast.report.measures import Measure, changes, number, probability
from dtta_fast.report.reading import Run
from dtta_fast.report.svg import Plot
from dtta_fast.runs.records import Record

MOST = 12  # maximum number of cards per kind and run
SIDE = 96  # maximum side length of a thumbnail in pixels
CLASSES = 4  # maximum number of classes per card
SMALL = 0.005  # probabilities below it are omitted, except for answers and the true class
ReadImage: TypeAlias = Callable[[Run, int], Image.Image | None]


@dataclass(frozen=True)
class Card:
    """An image. kind: improved, harmed, or (without labels) changed; run: number of the run; change: as in measures.changes."""

    kind: str
    run: int
    path: str
    group: str
    truth: str
    change: float
    shown: str
    confidence: float
    thumbnail: str | None
    plot: Plot


def no_image(run: Run, image_id: int) -> Image.Image | None:
    """Returns no image, so that the page has no thumbnails."""
    return None


def cards_of(run: Run, number_of_run: int, measure: Measure | None, read_image: ReadImage) -> tuple[list[Card], str | None]:
    """Returns the cards of a run and, if thumbnails could not be read, the reason."""
    found = changes(run, measure)
    better = sorted((change for change in found if change[0] > 0), key=lambda change: -change[0])[:MOST]
    worse = sorted((change for change in found if change[0] < 0), key=lambda change: change[0])[:MOST]
    kind = "improved" if measure is not None else "changed"
    cards, why = [], None
    for i, (name, change, record) in enumerate([*((kind, *part) for part in better), *(("harmed", *part) for part in worse)]):
        picture = None
        if why is None:
            try:
                picture = read_image(run, record["image_id"])
            except (ValueError, ImportError, OSError) as error:
                why = str(error)
        cards.append(_card(run, number_of_run, measure, f"image-{number_of_run}-{i}", name, change, record, picture))
    return cards, why


def _card(
    run: Run, number_of_run: int, measure: Measure | None, key: str, kind: str, change: float, record: Record, picture: Image.Image | None
) -> Card:
    if run.task == "classification":
        pairs, confidence = _class_pairs(run, record), float(record["confidence"])
        truth = "" if record["label"] is None else run.class_name(record["label"])
        shown = "" if measure is None else f"{number(100 * change, 0, sign=True)} points"
    else:
        assert measure is not None  # only classification runs can lack a measure
        pairs, confidence, truth = _score_pairs(record), 0.0, ""
        shown = measure.scale.shown(change, sign=True)
    plot = pairs_plot(key, f"{record['path']}, before and after", pairs, number_of_run)
    thumbnail = None if picture is None else _embedded(picture)
    return Card(kind, number_of_run, str(record["path"]), str(record["group"]), truth, change, shown, confidence, thumbnail, plot)


def _class_pairs(run: Run, record: Record) -> list[Pair]:
    """Returns the most likely classes after and before and the true class, sorted by probability after."""
    answers = [k for k in (record["label"], record["prediction"], record["prediction_before"]) if k is not None]
    listed = [int(k) for pair in zip(record["top"], record["top_before"], strict=False) for k, p in pair if p >= SMALL]
    chosen = list(dict.fromkeys([*answers, *listed]))[:CLASSES]
    pairs = []
    for k in chosen:
        before, after = probability(record["top_before"], k), probability(record["top"], k)
        shown = f"{number(100 * before, 0)} → {number(100 * after, 0)} %"
        pairs.append(Pair(run.class_name(k), before, after, shown, k == record["label"]))
    return sorted(pairs, key=lambda pair: -pair.after)


def _score_pairs(record: Record) -> list[Pair]:
    """Returns each score, with bars scaled by the larger of the two values if it exceeds 1."""
    pairs = []
    for name, after in record["score"].items():
        before = record["score_before"].get(name)
        if before is not None and after is not None:
            full = max(1.0, before, after)
            pairs.append(Pair(name, max(0.0, before) / full, max(0.0, after) / full, f"{before:.3f} → {after:.3f}"))
    return pairs


def _embedded(picture: Image.Image) -> str:
    """Encodes an image as a data URL of at most SIDE pixels; small images are stored losslessly."""
    picture = picture.convert("RGB")
    small = max(picture.size) <= SIDE
    if not small:
        picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG" if small else "JPEG", quality=85)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"
