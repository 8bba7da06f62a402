"""Builds the report page: the content of each section, rendered with a template."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dtta_fast.metrics import calibration_error
from dtta_fast.report import figures
from dtta_fast.report.cards import Card, ReadImage, cards_of, no_image
from dtta_fast.report.exchange import corruption_figures
from dtta_fast.report.measures import ACCURACY, Estimate, Measure, Scale, estimate, gains_by, loss_steps, measures, number, reliability
from dtta_fast.report.reading import Run
from dtta_fast.report.svg import Plot
from dtta_fast.runs.config import flattened

TEMPLATES = Path(__file__).parent / "templates"
ENVIRONMENT = Environment(
    loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
GROUPS, CLASSES, FAILURES = 100, 30, 200  # maximum numbers shown
SECONDS = Scale("Seconds", percent=False)


class Cell(NamedTuple):
    """A table cell. sort: sort key of its column; note: shown in smaller type; good: whether the value is an improvement."""

    text: str
    sort: float | str = ""
    note: str = ""
    good: bool | None = None


NONE = Cell("–")


class Row(NamedTuple):
    """A table row. unit: unit of its values, shown after its name; mark: whether the row is highlighted."""

    name: str
    cells: Sequence[Cell]
    unit: str = ""
    mark: bool = False


@dataclass(frozen=True)
class Figure:
    """Plots, a table of their values and a note about them."""

    plots: Sequence[Plot]
    note: str = ""
    heads: Sequence[str] = ()
    rows: Sequence[Row] = ()


@dataclass(frozen=True)
class Answers:
    """A run and its measures, which several sections need."""

    run: Run
    measures: Sequence[Measure]

    @property
    def leading(self) -> Measure | None:
        return self.measures[0] if self.measures else None


def make_page(runs: Sequence[Run], read_image: ReadImage = no_image) -> str:
    """Renders one page about runs of one task, as returned by reading.read_runs.

    The page embeds its figures, styles and images, so it loads no external resources.

    Args:
        read_image: returns the thumbnail image for (run, image_id), or None. If it raises ValueError, ImportError or OSError, the page
            shows the error.
    """
    names = [run.name for run in runs]
    found = [Answers(run, measures(run)) for run in runs]
    cards: list[Card] = []
    notes: list[str] = []
    for i, answers in enumerate(found):
        some, why = cards_of(answers.run, i, answers.leading, read_image)
        cards += some
        notes += [f"No thumbnails of {answers.run.name}: {why}"] if why else []
    cards.sort(key=lambda card: -abs(card.change))
    script = (TEMPLATES / "script.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    failures = [(i, record) for i, run in enumerate(runs) for record in run.failed]
    return ENVIRONMENT.get_template("report.html").render(
        runs=runs,
        colours=[figures.colour(i) for i in range(len(runs))],
        script=Markup(script),
        digest=digest,
        summary=_summary(found),
        sections=[
            ("groups", "Gain by group", _groups(found)),
            ("classes", "Gain by class", _classes(found)),
            ("reliability", "Reliability", _reliability(found)),
            ("cost", "Cost", _cost(found)),
            ("loss", "Loss", _loss(found)),
            ("images", "Images", cards),
            ("phases", "Time", _phases(runs)),
            ("failures", "Failed images", failures),
            ("config", "Config", _compared([flattened(run.config) for run in runs])),
            ("environment", "Environment", _compared([run.environment for run in runs])),
        ],
        cards=cards,
        card_groups=sorted({card.group for card in cards}),
        notes=notes,
        failures=failures[:FAILURES],
        more_failures=len(failures) - FAILURES,
        names=names,
    )


def _summary(found: Sequence[Answers]) -> list[Row]:
    """Builds the summary table with one column per run; rows without a value in any run are omitted."""
    rows: dict[str, tuple[str, list[Cell]]] = {}

    def put(i: int, name: str, unit: str, cell: Cell) -> None:
        rows.setdefault(name, (unit, [NONE] * len(found)))[1][i] = cell

    for i, answers in enumerate(found):
        run = answers.run
        for measure in answers.measures:
            label, unit = measure.scale.label, ("%" if measure.scale.percent else "") + (", less is better" if measure.scale.less else "")
            unit = unit.removeprefix(", ")
            for when, values in (("before", measure.before), ("after", measure.after)):
                put(i, f"{label} {when}", unit, _estimated(estimate(values), measure.scale))
            gain = "Gain" if len(answers.measures) == 1 else f"Gain of {label[0].lower()}{label[1:]}"
            unit = "percentage points" if measure.scale.percent else "before − after" if measure.scale.less else "after − before"
            put(i, gain, unit, _estimated(estimate(measure.gain), measure.scale, sign=True))
        if answers.leading is not None:
            gain_of, total = answers.leading.gain, len(answers.leading.gain)
            is_answer = answers.leading.scale is ACCURACY
            for name, count in (
                ("Answers turned right" if is_answer else "Images that became better", int((gain_of > 0).sum())),
                ("Answers turned wrong" if is_answer else "Images that became worse", int((gain_of < 0).sum())),
            ):
                put(i, name, "images", Cell(f"{count:,}", note=f"{number(100 * count / total)} %"))
            if is_answer:
                for when, values, suffix in (("before", answers.leading.before, "_before"), ("after", answers.leading.after, "")):
                    confidence = _confidence(answers.leading, f"confidence{suffix}")
                    error = calibration_error(confidence, values)
                    put(i, f"Expected calibration error {when}", "%, 15 bins", Cell(number(100 * error)))
                for when, figures in zip(("before", "after"), corruption_figures(run, [answers.run for answers in found]), strict=True):
                    if figures is not None:
                        put(i, f"Mean corruption error (mCE) {when}", "%, AlexNet has 100", Cell(number(100 * figures.mean)))
                        if figures.relative is not None:
                            put(i, f"Relative mCE {when}", "%, AlexNet has 100", Cell(number(100 * figures.relative)))
        elif run.records and run.task == "classification":
            changed = sum(record["prediction"] != record["prediction_before"] for record in run.records)
            put(i, "Answers changed", "images", Cell(f"{changed:,}", note=f"{number(100 * changed / len(run.records))} %"))
        if run.records:
            total = len(run.records)
            put(i, "Evaluations an image", "mean", Cell(number(sum(record["evaluations"] for record in run.records) / total)))
            put(i, "Time an image", "s, mean", Cell(f"{sum(record['seconds'] for record in run.records) / total:.4g}"))
            put(i, "Adaptations kept", "% of images", Cell(number(100 * sum(bool(record["accepted"]) for record in run.records) / total)))
        put(i, "Images", "", Cell(f"{len(run.records) + len(run.failed):,}", note="so far" if run.unfinished else ""))
        put(i, "Failed images", "", Cell(f"{len(run.failed):,}", good=False if run.failed else None))
    return [Row(name, cells, unit) for name, (unit, cells) in rows.items()]


def _estimated(value: Estimate, scale: Scale, sign: bool = False) -> Cell:
    """Formats a value with its interval; a change is green or red if its interval excludes 0."""
    sure = sign and (value.low > 0 or value.high < 0)
    note = f"{scale.shown(value.low, sign)} to {scale.shown(value.high, sign)}"
    return Cell(scale.shown(value.value, sign), value.value, note, value.value > 0 if sure else None)


def _confidence(measure: Measure, key: str) -> torch.Tensor:
    return torch.tensor([record[key] for record in measure.records], dtype=torch.float64, device="cpu")


def _gain_unit(scale: Scale) -> str:
    if scale.percent:
        return f"gain of {scale.label.lower()}, percentage points"
    return f"gain of {scale.label.lower()}{', before − after' if scale.less else ''}"


def _groups(found: Sequence[Answers]) -> Figure | None:
    """Shows the gain by group, in dataset order."""
    leading = [answers.leading for answers in found if answers.leading is not None]
    if not leading:
        return None
    gains = [{} if answers.leading is None else gains_by(answers.leading, lambda record: record["group"]) for answers in found]
    everyone = list(dict.fromkeys(name for part in gains for name in part))
    largest = set(sorted(everyone, key=lambda name: max(abs(float(part[name].mean())) for part in gains if name in part))[-GROUPS:])
    shown = [name for name in everyone if name in largest]
    values = [[estimate(part[name]) if name in part else None for part in gains] for name in shown]
    note = "" if len(shown) == len(everyone) else f"The {GROUPS} of {len(everyone):,} groups with the largest changes."
    return _bar_figure("groups", "Gain by group", shown, values, [len(_most(gains, name)) for name in shown], found, leading[0].scale, note)


def _classes(found: Sequence[Answers]) -> Figure | None:
    """Shows the gain of the classes with the largest changes, sorted by decreasing gain."""
    leading = [answers.leading for answers in found if answers.leading is not None]
    if not leading or leading[0].scale is not ACCURACY:
        return None
    gains = [{} if answers.leading is None else gains_by(answers.leading, lambda record: record["label"]) for answers in found]
    means = [{label: float(gain.mean()) for label, gain in part.items()} for part in gains]
    labels = sorted({label for part in means for label in part})
    chosen = sorted(labels, key=lambda label: -max(abs(part[label]) for part in means if label in part))[:CLASSES]
    chosen.sort(key=lambda label: -sum(part.get(label, 0.0) for part in means))
    note = "" if len(chosen) == len(labels) else f"The {CLASSES} of {len(labels):,} classes with the largest changes."
    named = next((answers.run for answers in found if answers.run.classes), found[0].run)
    counts = [len(_most(gains, label)) for label in chosen]
    values: list[list[Estimate | float | None]] = [[part.get(label) for part in means] for label in chosen]
    return _bar_figure("classes", "Gain by class", [named.class_name(label) for label in chosen], values, counts, found, ACCURACY, note)


def _most(parts: Sequence[Mapping[Any, torch.Tensor]], key: Any) -> torch.Tensor:
    """Returns the values of the run with the most images of a group or class, because an unfinished run has fewer."""
    return max((part[key] for part in parts if key in part), key=len)


def _bar_figure(
    key: str,
    title: str,
    names: Sequence[str],
    values: Sequence[Sequence[Estimate | float | None]],
    counts: Sequence[int],
    found: Sequence[Answers],
    scale: Scale,
    note: str,
) -> Figure:
    runs = [answers.run.name for answers in found]
    rows = [figures.BarRow(name, part) for name, part in zip(names, values, strict=True)]
    plot = figures.bars(key, title, rows, runs, scale, unit=_gain_unit(scale))
    table = [
        Row(row.name, [Cell(f"{count:,}", count), *(_gain_cell(value, scale) for value in row.values)])
        for row, count in zip(rows, counts, strict=True)
    ]
    return Figure([plot], note, ["Images", *runs] if len(runs) > 1 else ["Images", "Gain"], table)


def _gain_cell(value: Estimate | float | None, scale: Scale) -> Cell:
    if value is None:
        return NONE
    return _estimated(value, scale, sign=True) if isinstance(value, Estimate) else Cell(scale.shown(value, sign=True), value)


def _reliability(found: Sequence[Answers]) -> Figure | None:
    """Shows one reliability plot per run."""
    plots = []
    for i, answers in enumerate(found):
        if answers.leading is not None and answers.leading.scale is ACCURACY:
            before = reliability(_confidence(answers.leading, "confidence_before"), answers.leading.before)
            after = reliability(_confidence(answers.leading, "confidence"), answers.leading.after)
            plots.append(figures.reliability_plot(f"reliability-{i}", answers.run.name, i, before, after))
    note = "On the diagonal, answers are right as often as they are confident. A dot's area is its share of the images."
    return Figure(plots, note) if plots else None


def _cost(found: Sequence[Answers]) -> Figure | None:
    """Shows the runs as points and, for a single run, the distribution of its evaluations."""
    plots, points, note = [], [], ""
    for i, answers in enumerate(found):
        if answers.leading is not None:
            records, measure = answers.leading.records, answers.leading
            evaluations = sum(record["evaluations"] for record in records) / len(records)
            points.append(figures.CostPoint(answers.run.name, i, evaluations, float(measure.before.mean()), estimate(measure.after)))
            scale = measure.scale
    if points:
        plots.append(figures.cost_plot("cost", points, scale))
        note = "Hollow: before, at no cost. Filled: after, with its 95 % interval."
    if len(found) == 1 and found[0].run.records:
        plots.append(figures.cumulative_plot("cumulative", [int(record["evaluations"]) for record in found[0].run.records]))
    return Figure(plots, note) if plots else None


def _loss(found: Sequence[Answers]) -> Figure | None:
    curves = [(answers.run.name, i, loss_steps(answers.run.records)) for i, answers in enumerate(found)]
    curves = [curve for curve in curves if curve[2]]
    note = "The mean over the images that took the step, and their quartiles."
    return Figure([figures.loss_plot("loss", curves)], note) if curves else None


def _phases(runs: Sequence[Run]) -> Figure | None:
    """Shows the seconds of each phase, the longest first, and of the whole run."""
    phases = list(dict.fromkeys(name for run in runs for name in run.seconds))
    if not phases:
        return None
    phases.sort(key=lambda name: -max(run.seconds.get(name, 0.0) for run in runs))
    rows = [figures.BarRow(name, [run.seconds.get(name) for run in runs]) for name in phases]
    plot = figures.bars("phases", "Seconds by phase", rows, [run.name for run in runs], SECONDS, sign=False, unit="seconds")
    table = [Row(row.name, [NONE if value is None else Cell(f"{value:,.2f}", float(value)) for value in row.values]) for row in rows]  # type: ignore[arg-type]
    walls = [run.wall_seconds for run in runs]
    if any(wall is not None for wall in walls):
        table.append(Row("whole run", [NONE if wall is None else Cell(f"{wall:,.2f}", wall) for wall in walls], mark=True))
    heads = [run.name for run in runs] if len(runs) > 1 else ["Seconds"]
    return Figure([plot], "", heads, table)


def _compared(parts: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Lists the values of each run by name and marks those that differ between runs that have any."""
    rows = []
    for name in dict.fromkeys(name for part in parts for name in part):
        texts = [None if not part else _plain(part[name]) if name in part else "–" for part in parts]
        told = [text for text in texts if text is not None]
        rows.append(Row(name, [NONE if text is None else Cell(text) for text in texts], mark=len(set(told)) > 1))
    return rows


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
