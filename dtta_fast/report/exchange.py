"""Figures of runs in the forms that others print: mean corruption errors, a LaTeX table of errors, and RobustBench's model_info."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dtta_fast.data.images import corruption_of
from dtta_fast.report.reading import Run
from dtta_fast.runs.corruption_error import ALEXNET, SEVERITIES, CorruptionError, corruption_error

WHEN = ("_before", "")
HEAD = "% dtta report: error in %, lower is better; needs the packages booktabs and graphicx"  # first line of a LaTeX table
ROBUSTBENCH = {"imagenet-c": "imagenet", "cifar10-c": "cifar10", "cifar100-c": "cifar100"}  # data sets of theirs, by ours
CLEAN_OF = {"imagenet-c": ("imagenet",), "cifar10-c": ("cifar10",), "cifar100-c": ("cifar100",)}  # the images without corruption
ESCAPES = {"\\": r"\textbackslash{}", **{c: f"\\{c}" for c in "&%$#_{}"}, "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def group_errors(run: Run, suffix: str) -> dict[str, float]:
    """Returns the top-1 error of each group with labels; suffix "_before" is for the unadapted model."""
    right: dict[str, list[bool]] = {}
    for record in run.records:
        if record.get("label") is not None:
            right.setdefault(record["group"], []).append(record[f"prediction{suffix}"] == record["label"])
    return {name: 1 - sum(part) / len(part) for name, part in right.items()}


def clean_error(run: Run, runs: Sequence[Run], suffix: str) -> float | None:
    """Returns the error on clean images, from the run among `runs` that has the same models and settings; None if there is none."""
    for other in runs:
        alike = _without_data(other.config) == _without_data(run.config) and _images_of(other) == _images_of(run)
        if _data(other) in CLEAN_OF.get(_data(run), ()) and alike:
            errors = group_errors(other, suffix)
            if errors and not other.unfinished:
                return sum(errors.values()) / len(errors)
    return None


def is_clean(run: Run) -> bool:
    """Returns whether a run is on the clean images that one of RobustBench's corrupted data sets is made of."""
    return any(_data(run) in names for names in CLEAN_OF.values())


def corruption_figures(run: Run, runs: Sequence[Run]) -> tuple[CorruptionError | None, CorruptionError | None]:
    """Returns the corruption errors before and after of a finished run on all of ImageNet-C; None for any other run."""
    if _data(run) != "imagenet-c" or run.unfinished:
        return None, None
    before, after = (corruption_error(group_errors(run, suffix), clean_error(run, runs, suffix)) for suffix in WHEN)
    return before, after


def latex_table(runs: Sequence[Run]) -> str:
    r"""Returns a LaTeX table (booktabs) of the top-1 error in % by corruption, one column each, with two rows per run: before and after.

    Severities of a corruption are averaged. The last columns are the mean over the corruptions and, for runs on all of ImageNet-C, mCE.

    Raises:
        ValueError: a run has no labelled images, or is not of classification.
    """
    rows: list[tuple[str, dict[str, float], CorruptionError | None]] = []
    for run in runs:
        for suffix, name, figures in zip(WHEN, ("source", "adapted"), corruption_figures(run, runs), strict=True):
            errors = group_errors(run, suffix) if run.task == "classification" else {}
            if not errors:
                raise ValueError(f"{run.name} has no labelled images, and a table of errors needs them: leave the run out")
            by_name: dict[str, list[float]] = {}
            paths = {record["group"]: record["path"] for record in run.records}
            for group, error in errors.items():
                by_name.setdefault(corruption_of(paths[group], group) or group, []).append(error)
            rows.append((f"{run.name}, {name}", {group: sum(part) / len(part) for group, part in by_name.items()}, figures))
    columns = list(dict.fromkeys(name for _, errors, _ in rows for name in errors))
    with_mce = any(figures is not None for *_, figures in rows)
    heads = ["", *(rf"\rotatebox{{70}}{{{_escaped(name.replace('_', ' '))}}}" for name in columns), "mean", *["mCE"] * with_mce]
    lines = [
        HEAD,
        rf"\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}",
        r"\toprule",
        " & ".join(heads) + r" \\",
        r"\midrule",
    ]
    for name, errors, figures in rows:
        cells = [f"{100 * errors[column]:.1f}" if column in errors else "--" for column in columns]
        cells.append(f"{100 * sum(errors.values()) / len(errors):.1f}")
        if with_mce:
            cells.append("--" if figures is None else f"{100 * figures.mean:.1f}")
        lines.append(" & ".join([_escaped(name), *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def model_info(run: Run, runs: Sequence[Run]) -> tuple[str, dict[str, Any]]:
    """Returns RobustBench's name of the data set, and what its model_info/DATA/corruptions/NAME.json holds, from the adapted answers.

    Fields that a run cannot know, such as the authors, are None. clean_acc comes from the run on clean images among `runs`, if any.

    Raises:
        ValueError: RobustBench has no such data set, or the run is unfinished or lacks a corruption or severity.
    """
    if _data(run) not in ROBUSTBENCH:
        raise ValueError(f"{run.name} is on {_data(run)!r}; RobustBench's leaderboards of corruptions are of {', '.join(ROBUSTBENCH)}")
    if run.unfinished:
        raise ValueError(f"{run.name} is not finished: {run.unfinished}")
    errors = group_errors(run, "")
    lacking = [f"{name}{s}" for name in ALEXNET for s in SEVERITIES if f"{name}{s}" not in errors]
    if lacking:
        raise ValueError(f"{run.name} lacks {len(lacking)} of RobustBench's 75 corruptions and severities, such as {lacking[0]}")
    clean, figures = clean_error(run, runs, ""), corruption_figures(run, runs)[1]
    return ROBUSTBENCH[_data(run)], {
        "link": None,
        "name": run.name,
        "authors": None,
        "additional_data": None,
        "number_forward_passes": None,
        "dataset": ROBUSTBENCH[_data(run)],
        "venue": None,
        "architecture": str(run.config.get("model")),
        "eps": None,
        "clean_acc": None if clean is None else _percent(1 - clean),
        "reported": None,
        "corruptions_acc": _percent(1 - sum(errors.values()) / len(errors)),
        "corruptions_mce": None if figures is None else _percent(figures.mean),
        "autoattack_acc": None,
        "footnote": "Adapts to the test images, by dtta_fast.",
    }


def _percent(value: float) -> str:
    return str(round(100 * value, 2))


def _data(run: Run) -> str:
    return str(run.config.get("data", {}).get("name", ""))


def _images_of(run: Run) -> tuple[Any, Any]:
    """Returns what selects a run's images, besides its data set."""
    data = run.config.get("data", {})
    return data.get("per_class"), data.get("subset")


def _without_data(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config without the entries that may differ between a corrupted and a clean run of the same models and settings."""
    return {name: value for name, value in config.items() if name not in ("data", "stream")}


def _escaped(text: str) -> str:
    """Escapes text for LaTeX."""
    return "".join(ESCAPES.get(character, character) for character in text)
