"""`dtta evaluate`."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.table import Table

from dtta_fast.commands.common import (
    OutFile,
    check_apart,
    check_path,
    checked_device,
    holds,
    names_of,
    option,
    progress_bar,
    quiet,
    shown,
    terminal,
    write_json,
)
from dtta_fast.report.measures import scale_of
from dtta_fast.runs.config import RunConfig, flattened, read_yaml, with_settings, yaml_value
from dtta_fast.runs.evaluate import evaluate
from dtta_fast.runs.folder import OF_RUN
from dtta_fast.runs.reference_names import is_reference
from dtta_fast.runs.streams import batches_of
from dtta_fast.runs.summary import error_lines
from dtta_fast.runs.tracking import Tracker, require, tracker
from dtta_fast.runs.worker import open_data

Tracked = Literal["tensorboard", "trackio", "wandb"]


def _preset_hint(value: str) -> str:
    return f"(default: {'as protocol and task want' if value == 'None' else value})"


@dataclass(frozen=True)
class Evaluate:
    """Adapt a model to a dataset image by image and record each result; the same command resumes an interrupted run.

    Settings come from a preset, then from a YAML file with the same names, then from flags. The dotted names of the reference
    implementation are accepted too, in the YAML file and as NAME=VALUE arguments.

    Example: dtta evaluate runs/digits --per-class 5 --preset FAST --steps 5
    """

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT", help_behavior_hint="(required)")]
    """Folder of the run; created if missing."""
    settings: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: none)")] = None
    """YAML file with settings, such as the config.json of another run."""
    preset: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint=_preset_hint)] = None
    """Starting point of the adaptation settings; if omitted, FAST, ONLINE or DENSE, depending on protocol and task."""
    scale: Literal["none", "ray"] = "none"
    """Work distribution: none, or ray (Ray Data, one worker per GPU or CPU core). Processes of torchrun share the work without ray."""
    overwrite: bool = False
    """Start over in OUT: replace the existing run there, or start next to files that belong to no run, which are kept."""
    track: Annotated[Tracked | None, tyro.conf.arg(metavar="{tensorboard,trackio,wandb}", help_behavior_hint="(default: nowhere)")] = None
    """Tracker that also receives the running accuracy and cost (needs the extra of that name)."""
    json: OutFile = None
    """Also write the summary to this file."""
    run_config: Annotated[RunConfig, tyro.conf.arg(name="")] = dataclasses.field(default_factory=RunConfig)
    """What to run: data, models and protocol."""

    @classmethod
    def start(cls, arguments: Sequence[str]) -> tuple[Evaluate, list[str]]:
        """Returns the settings of the preset and the YAML file, which the flags then override, and the arguments that are flags.

        Raises:
            ValueError: a preset or setting is unknown, or a file cannot be read.
        """
        dotted: dict[str, Any] = {}
        flags = []
        for argument in arguments:
            name, equals, value = argument.removeprefix("--").partition("=")
            if equals and is_reference(name):
                try:
                    dotted[name] = yaml_value(value)
                except ValueError as error:
                    raise ValueError(f"{name} is {value[:40]!r}: {error}") from error
            else:
                flags.append(argument)
        path = option(flags, "--settings")
        in_path = flattened(read_yaml(Path(path))) if path else {}
        for name, value in in_path.items():  # the help prints them to the terminal as defaults
            texts = [text for text in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(text, str)]
            if any(not text.isprintable() for text in texts):
                raise ValueError(f"{shown(path)} has {shown(name)} {shown(texts)}, with characters that are not printable: take them out")
        settings = {**in_path, **dotted}
        in_file = settings.pop("preset", None)
        named = option(flags, "--preset") or in_file
        for name in ("protocol", "task"):
            given = option(flags, f"--{name}")
            if given is not None:
                settings[name] = given
                if name == "protocol":  # it determines the mode and overrides a mode from a file
                    settings = {field: value for field, value in settings.items() if field not in ("mode", "adapt.mode")}
        settings = {"preset": named or _usual_preset(settings), **settings}
        run, mode = with_settings(RunConfig(), settings), option(flags, "--mode")
        if mode in ("episodic", "online") and mode != run.adapt.mode:
            fitting = "--protocol episodic" if mode == "episodic" else "--protocol online, or continual"
            raise ValueError(f"--mode is {mode!r} with protocol {run.protocol!r}, which decides it: give {fitting}, and leave --mode out")
        return cls(out=tyro.MISSING, preset=named, run_config=run), flags

    def run(self) -> None:
        """Raises ValueError for bad settings, data or models, or a folder in use or with another run, and OSError if the disk is full."""
        quiet()
        check_path("json", self.json, holds("groups", "environment", "wall_seconds"))
        check_apart(out=self.out, json=self.json)
        places = [] if self.json is None else [self.json, Path(os.path.realpath(self.json))]
        if any(os.path.realpath(place.parent) == os.path.realpath(self.out) and re.fullmatch(OF_RUN, place.name) for place in places):
            raise ValueError(f"json is {str(self.json)!r}, which is a name of the run's own files: give another")
        checked_device(self.run_config.device)
        if self.track is not None:
            require(self.track)
        run = self.run_config
        if len(run.classes) == 1 and Path(run.classes[0]).suffix.lower() in (".txt", ".json"):  # a file, as for the other commands
            names = names_of(run.classes[0])
            if isinstance(names, dict):
                raise ValueError(f"classes is {run.classes[0]!r}, which holds prompts; a run takes names alone: give a list of names")
            run = dataclasses.replace(run, classes=tuple(names))

        def sent() -> Tracker | None:
            """Starts the tracker with the first records: by then the folder belongs to this run and the settings are known to be valid."""
            first = os.environ.get("RANK", "0") == "0"
            return tracker(self.track, self.out, run.described()) if self.track and first else None

        with progress_bar() as progress:
            total = sum(map(len, batches_of(run, open_data(run)))) if progress.console.is_terminal else None
            bar, running = progress.add_task("loading models", total=total), Running(sent)

            def advance(records: list[dict[str, Any]]) -> None:
                running.add(records)
                progress.update(bar, description=shown(running), advance=len(records))

            try:
                found = evaluate(run, self.out, scale=self.scale, overwrite=self.overwrite, advance=advance)
            finally:
                running.close()
        if not found:
            return  # not the first process
        write_json(self.json, found)
        _print_summary(found, self.out)


class Running:
    """Running means over the images so far, for the progress bar and the tracker."""

    def __init__(self, start: Callable[[], Tracker | None]) -> None:
        self._start, self._images = start, 0
        self._sent: Tracker | None = None
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, records: list[dict[str, Any]]) -> None:
        """Adds the records of a batch and sends the current means."""
        if not self._images:
            self._sent = self._start()
        self._images += len(records)
        for record in records:
            for name, value in _values(record).items():
                self._sums[name] = self._sums.get(name, 0.0) + value
                self._counts[name] = self._counts.get(name, 0) + 1
        if self._sent is not None:
            self._sent.log(self._images, self.means())

    def close(self) -> None:
        if self._sent is not None:
            self._sent.close()

    def means(self) -> dict[str, float]:
        return {name: self._sums[name] / self._counts[name] for name in self._sums}

    def __str__(self) -> str:
        found = self.means()
        scores = [name for name in found if name.endswith("_before")]
        shown = []
        for name in scores:
            score = name.removesuffix("_before")
            scale = scale_of(score)
            shown.append(f"{score} {scale.shown(found[name])} -> {scale.shown(found[score])} {scale.unit}".strip())
        return ", ".join([*shown, f"{found['seconds']:.3f} s/image"] if "seconds" in found else ["adapting"])


def _values(record: dict[str, Any]) -> dict[str, float]:
    """Returns the values of a record that are averaged."""
    if "error" in record:
        return {}
    found = {"seconds": record["seconds"], "evaluations": float(record["evaluations"])}
    if "score" in record:
        for suffix in ("_before", ""):
            found |= {f"{name}{suffix}": value for name, value in record[f"score{suffix}"].items() if value is not None}
    elif record["label"] is not None:
        found |= {f"accuracy{suffix}": float(record[f"prediction{suffix}"] == record["label"]) for suffix in ("_before", "")}
    return found


def _usual_preset(settings: dict[str, Any]) -> str:
    if settings.get("task") in ("segmentation", "depth"):
        return "DENSE"
    modes = (settings.get(name) for name in ("protocol", "mode", "adapt.mode"))
    return "ONLINE" if any(mode in ("online", "continual") for mode in modes) or settings.get("tta.online") else "FAST"


def _print_summary(found: dict[str, Any], out: Path) -> None:
    table = Table(title=f"{found['images']} images, {found['errors'] or 'none'} failed; {shown(out)}")
    scores = [name for name in found if isinstance(found[name], dict) and "gain" in found[name]]
    heads = [f"{shown(name)} {when} {scale_of(name).unit}".strip() for name in scores for when in ("before", "after")]
    heads = heads or ["before %", "after %", "gain"]
    table.add_column("", no_wrap=True)
    for head in (*heads, "evals/img", "s/img"):
        table.add_column(head, justify="right")

    def add(name: str, row: dict[str, Any]) -> None:
        if scores and scores[0] in row:
            values = [scale_of(score).shown(row[score][when]) for score in scores for when in ("before", "after")]
        elif "accuracy" in row:
            values = [f"{100 * row['accuracy_before']:.1f}", f"{100 * row['accuracy']:.1f}", f"{100 * row['gain']:+.1f}"]
        else:
            values = ["-"] * len(heads)
        cost = [f"{row['evaluations_per_image']:.1f}", f"{row['seconds_per_image']:.3f}"] if "seconds_per_image" in row else ["-", "-"]
        table.add_row(shown(name), *values, *cost)

    for name, row in found["groups"].items():
        add(name, row)
    table.add_section()
    add("all", found)
    terminal().print(table)
    if "mce" in found:
        terminal().print(f"mCE: {100 * found['mce_before']:.1f} -> {100 * found['mce']:.1f} % of AlexNet's error")
    for line in error_lines(found):
        print(shown(line))
