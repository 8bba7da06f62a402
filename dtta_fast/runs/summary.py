"""Summarises the records of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from dtta_fast.metrics import bootstrap_interval, calibration_error
from dtta_fast.runtime.warn import warn

LEAST_PER_CLASS = 3  # images per class from which another numbering of the classes can show

Record = Mapping[str, Any]


def by_group(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Groups records by corruption and severity, or by the data set's own groups, in order of first appearance."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record["group"], []).append(record)
    return found


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """Summarises all records and each group: counts, cost, and accuracy or scores before and after with 95 % intervals over images."""
    return {**_figures(records), "groups": {name: _figures(part) for name, part in by_group(records).items()}}


def _figures(records: Sequence[Record]) -> dict[str, Any]:
    sound = [record for record in records if "error" not in record]
    found: dict[str, Any] = {"images": len(records), "errors": len(records) - len(sound)}
    if not sound:
        return found
    for key in ("evaluations", "seconds"):
        found[f"{key}_per_image"] = sum(record[key] for record in sound) / len(sound)
    found["accepted"] = sum(record["accepted"] for record in sound) / len(sound)
    if "score" in sound[0]:
        for name in dict.fromkeys(name for record in sound for name in record["score"]):
            pairs = [(record, record["score_before"].get(name), record["score"].get(name)) for record in sound]
            told = [record for record, *scores in pairs if None not in scores]  # a map without labels has no scores
            if not told:
                continue
            scores = ([record[key][name] for record in told] for key in ("score_before", "score"))
            before, after = (torch.tensor(part, dtype=torch.float64, device="cpu") for part in scores)
            found[name] = {
                "before": float(before.mean()),
                "after": float(after.mean()),
                "gain": float((after - before).mean()),
                "gain_interval": bootstrap_interval(after - before),
            }
        return found
    known = [record for record in sound if record["label"] is not None]
    if not known:
        return found
    labels = torch.tensor([record["label"] for record in known], dtype=torch.int64, device="cpu")
    right = [
        torch.tensor([_number(record[key]) for record in known], dtype=torch.int64, device="cpu") == labels
        for key in ("prediction_before", "prediction")
    ]
    before, after = (part.double() for part in right)
    confidence = [
        torch.tensor([record[key] for record in known], dtype=torch.float64, device="cpu") for key in ("confidence_before", "confidence")
    ]
    return {
        **found,
        "accuracy_before": float(before.mean()),
        "accuracy": float(after.mean()),
        "interval_before": bootstrap_interval(before),
        "interval": bootstrap_interval(after),
        "gain": float((after - before).mean()),
        "gain_interval": bootstrap_interval(after - before),
        "negative_flips": float((right[0] & ~right[1]).double().mean()),
        "calibration_error_before": calibration_error(confidence[0], right[0]),
        "calibration_error": calibration_error(confidence[1], right[1]),
    }


def warn_of_numbering(records: Sequence[Record]) -> None:
    """Warns if most answers are wrong, but would be right under another numbering of the classes: the model's order is then another."""
    known = [record for record in records if "error" not in record and record.get("label") is not None and "prediction_before" in record]
    count = 1 + max((max(record["label"], _number(record["prediction_before"])) for record in known), default=0)
    if len(known) < LEAST_PER_CLASS * count:
        return
    table = torch.zeros(count, count, dtype=torch.int64, device="cpu")
    for record in known:
        if record["prediction_before"] is not None:
            table[record["label"], record["prediction_before"]] += 1
    most, usual = table.max(1)
    right, renumbered = int(table.diagonal().sum()), int(most.sum())
    if len(set(usual.tolist())) == count and renumbered > 0.7 * len(known) and right < 0.5 * renumbered:
        shown = ", ".join(f"{label} as {answer}" for label, answer in enumerate(usual.tolist()) if label != answer)
        warn(
            f"{right / len(known):.1%} of the source model's answers are right, and {renumbered / len(known):.1%} would be if the classes "
            f"were numbered differently (class {shown[:80]}): give classes in the order of the model's outputs"
        )


def _number(prediction: int | None) -> int:
    """Maps a prediction outside the data set's classes to -1, which counts as wrong."""
    return -1 if prediction is None else prediction


def error_lines(found: Mapping[str, Any]) -> list[str]:
    """Returns one line per group in the format common to such tools: error % [gaussian_noise5]: 43.56%."""
    return [f"error % [{name}]: {100 * (1 - group['accuracy']):.2f}%" for name, group in found["groups"].items() if "accuracy" in group]
