"""Measures that a report shows for the images of a run: answers or scores before and after, by group and by class, and their cost."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dtta_fast.metrics import bootstrap_interval
from dtta_fast.report.reading import Run
from dtta_fast.runs.records import Record


class Scale(NamedTuple):
    """How a measure is named and printed. less: smaller is better; metres: its unit is metres."""

    label: str
    percent: bool = True
    less: bool = False
    metres: bool = False

    @property
    def unit(self) -> str:
        return "%" if self.percent else "m" if self.metres else ""

    def shown(self, value: float, sign: bool = False) -> str:
        """Formats a value: percentages with one decimal place, other values with four."""
        return number(100 * value, 1, sign) if self.percent else number(value, 4, sign)


ACCURACY = Scale("Accuracy")
SCALES = {
    "mean_iou": Scale("Mean intersection over union"),
    "mean_class_accuracy": Scale("Mean class accuracy"),
    "abs_rel": Scale("Absolute relative error", percent=False, less=True),
    "rmse": Scale("Root mean square error in metres", percent=False, less=True, metres=True),
    "delta1": Scale("Pixels within a factor of 1.25"),
    "delta2": Scale("Pixels within a factor of 1.25²"),
    "delta3": Scale("Pixels within a factor of 1.25³"),
    "ssim": Scale("Structural similarity", percent=False),
}


def scale_of(name: str) -> Scale:
    """Returns the scale of a measure by its name in records and results."""
    return ACCURACY if name == "accuracy" else SCALES.get(name, Scale(name, percent=False))


class Estimate(NamedTuple):
    """A mean over images and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Measure:
    """Per-image values of N images before and after: 0 or 1 for answers, a score for maps. before, after: float64 [N]."""

    scale: Scale
    records: Sequence[Record]
    before: Tensor
    after: Tensor

    @property
    def gain(self) -> Tensor:
        """Gain per image, [N]; positive if the image improved."""
        return self.before - self.after if self.scale.less else self.after - self.before


def number(value: float, digits: int = 1, sign: bool = False) -> str:
    """Formats a number with a minus sign instead of a hyphen; a value that rounds to zero has no sign."""
    text = f"{value:+,.{digits}f}" if sign else f"{value:,.{digits}f}"
    if not any(digit in text for digit in "123456789"):
        text = text.lstrip("+-")
    return text.replace("-", "−")


def measures(run: Run) -> list[Measure]:
    """Returns the accuracy over the labelled images, or every score of maps with the main one first; empty if no image has any."""
    if run.task == "classification":
        known = [record for record in run.records if record["label"] is not None]
        answers = ([float(record[key] == record["label"]) for record in known] for key in ("prediction_before", "prediction"))
        before, after = (torch.tensor(part, dtype=torch.float64, device="cpu") for part in answers)
        return [Measure(ACCURACY, known, before, after)] if known else []
    found = []
    for name in dict.fromkeys(name for record in run.records for name in record["score"]):
        known = [record for record in run.records if None not in (record["score_before"].get(name), record["score"].get(name))]
        scores = ([record[key][name] for record in known] for key in ("score_before", "score"))
        before, after = (torch.tensor(part, dtype=torch.float64, device="cpu") for part in scores)
        if known:
            found.append(Measure(scale_of(name), known, before, after))
    return found


def estimate(values: Tensor) -> Estimate:
    """Estimates the mean of values [N], one per image."""
    return Estimate(float(values.mean()), *bootstrap_interval(values))


def gains_by(measure: Measure, key: Callable[[Record], Hashable]) -> dict[Any, Tensor]:
    """Returns the gains [n] of the images for each value of `key`, such as a group or class, in order of first appearance."""
    rows: dict[Hashable, list[int]] = {}
    for i, record in enumerate(measure.records):
        rows.setdefault(key(record), []).append(i)
    gain = measure.gain
    return {name: gain[row] for name, row in rows.items()}


class Bin(NamedTuple):
    """The images whose confidence lies in a bin: their share, mean confidence and accuracy."""

    share: float
    confidence: float
    accuracy: float


def reliability(confidence: Tensor, right: Tensor, bins: int = 15) -> list[Bin]:
    """Returns the non-empty bins for confidence [N] and correctness [N] of answers; the bins match metrics.calibration_error."""
    where = (confidence * bins).long().clamp(max=bins - 1)
    masks = [where == k for k in range(bins)]
    return [
        Bin(float(mask.double().mean()), float(confidence[mask].mean()), float(right[mask].double().mean())) for mask in masks if mask.any()
    ]


class LossStep(NamedTuple):
    """The loss of a step over the images that took it."""

    mean: float
    low: float  # first quartile
    high: float  # third quartile


def loss_steps(records: Sequence[Record]) -> list[LossStep]:
    """Returns the loss of each step that any image took."""
    found = []
    for step in range(max((len(record["loss"]) for record in records), default=0)):
        taken = [record["loss"][step] for record in records if step < len(record["loss"]) and record["loss"][step] is not None]
        if not taken:
            break
        values = torch.tensor(taken, dtype=torch.float64, device="cpu")
        low, high = torch.quantile(values, torch.tensor([0.25, 0.75], dtype=torch.float64, device="cpu")).tolist()
        found.append(LossStep(float(values.mean()), low, high))
    return found


def changes(run: Run, measure: Measure | None) -> list[tuple[float, Record]]:
    """Returns the change of each image: in the probability of the true class, or in the main score; positive for an improvement.

    A class that is not listed has probability 0, so an answer that becomes correct counts by its confidence. Images without labels cannot
    improve or get worse; those whose answer changed count by the confidence in the new answer.
    """
    if measure is None:
        return [(record["confidence"], record) for record in run.records if record.get("prediction") != record.get("prediction_before")]
    if run.task == "classification":
        return [
            (probability(record["top"], record["label"]) - probability(record["top_before"], record["label"]), record)
            for record in measure.records
        ]
    return list(zip(measure.gain.tolist(), measure.records, strict=True))


def probability(top: Sequence[Sequence[float]], label: int) -> float:
    """Looks up the probability of a class in the list of the most likely ones; 0 if it is not listed."""
    return next((float(p) for k, p in top if k == label), 0.0)
