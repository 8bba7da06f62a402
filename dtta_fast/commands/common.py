"""What several subcommands do."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dtta_fast.config import AdaptConfig
from dtta_fast.runs.folder import CONFIG, OF_LEFTOVER, OF_LOCK, OF_RUN
from dtta_fast.runs.writing import check_name, write_whole

Settings = Annotated[AdaptConfig, tyro.conf.arg(name="")]  # each a flag of its own; under a name tyro boxes what it refuses
OutFile = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: not written)")]
Name = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: the digits zoo)")]

MOST_RESULT = 2**28  # bytes of a JSON result: a Chrome trace is the largest


def check_path(name: str, path: Path | None, ours: Callable[[Path], bool] = lambda path: False) -> None:
    """Raises ValueError, naming the argument, where a result may not be written to: before the work, not after it.

    Args:
        ours: whether a file is an earlier result of the same kind, which a new one may replace; no other file that holds anything is.
    """
    if path is None:
        return
    check_name(name, path)
    place = Path(os.path.realpath(path))
    if path.is_dir() or place.is_symlink() or not place.parent.is_dir():  # a link still: one that leads to itself
        raise ValueError(f"{name} is {str(path)!r}, where the result cannot be written: give a file in a folder that exists")
    plain = path.is_file() or not path.exists()
    if not os.access(place.parent if plain else path, os.W_OK):
        raise ValueError(f"{name} is {str(path)!r}, where the result cannot be written: give a place that you may write to")
    for file in (path, place):
        if re.fullmatch(f"{OF_RUN}|{OF_LEFTOVER}", file.name) and (file.parent / CONFIG).is_file():
            raise ValueError(f"{name} is {str(path)!r}, which is a file of the run in this folder: give another name")
    if re.fullmatch(OF_LOCK, place.name) and place.is_file():
        raise ValueError(f"{name} is {str(path)!r}, which may be the lock of a run that is going: give another name")
    if path.is_file() and path.stat().st_size and not ours(path):
        raise ValueError(f"{name} is {str(path)!r}, a file that is no earlier result of this command: give another name, or remove it")


def check_apart(**paths: Path | None) -> None:
    """Raises ValueError where two results would be written to one file."""
    seen: dict[str, str] = {}
    for name, path in paths.items():
        if path is not None and (other := seen.setdefault(os.path.realpath(path), name)) != name:
            raise ValueError(f"{name} is {str(path)!r}, and so is {other}: give each a file of its own")


def holds(*keys: str) -> Callable[[Path], bool]:
    """Whether a file is a JSON object with these keys."""

    def check(path: Path) -> bool:
        if path.stat().st_size > MOST_RESULT:
            return False
        try:
            found = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return False
        return isinstance(found, dict) and set(keys) <= set(found)

    return check


def is_page(path: Path) -> bool:
    """Whether a file is a page of `dtta report` or `dtta profile`, by its title."""
    with path.open("rb") as file:
        head = re.match(rb"\s*<!doctype html>.*?<title>([^<]*)</title>", file.read(2**20), re.DOTALL)
    return head is not None and re.search(rb"\xe2\x80\x93 dtta (report|profile)$", head[1].strip()) is not None


def write_json(path: Path | None, result: Any) -> None:
    """Writes a result whole, or not at all; nothing where there is no path."""
    if path is not None:
        write_whole(path, json.dumps(result, indent=2) + "\n")


def shown(value: object) -> str:
    """Text from outside for a terminal: a line of printable characters, the others as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))


def terminal(*, stderr: bool = False) -> Console:
    """For text that may come from outside, put through shown(): a [name] is no markup, and :name: no emoji."""
    return Console(stderr=stderr, markup=False, emoji=False)


def option(arguments: Sequence[str], flag: str) -> str | None:
    """The value of a flag, wherever it stands; of one that stands several times the last, which is the one that counts."""
    found, rest = None, iter(arguments)
    for argument in rest:
        if argument.startswith(f"{flag}="):
            found = argument.partition("=")[2]
        elif argument == flag:
            found = next(rest, found)
    return found


def names_of(classes: str) -> list[str]:
    """Of a list separated by commas."""
    return [name.strip() for name in classes.split(",")]


def quiet() -> None:
    """Switches off the libraries' own bars and reports: what a command prints is for scripts too, and a report shows names of a file as
    they are."""
    from diffusers.utils.logging import disable_progress_bar as quiet_diffusers
    from transformers.utils import logging as transformers_logging
    from transformers.utils.logging import disable_progress_bar as quiet_transformers

    quiet_diffusers()
    quiet_transformers()
    transformers_logging.set_verbosity_error()


def progress_bar() -> Progress:
    """On standard error, where that is a terminal; it goes when the work is done."""
    console = terminal(stderr=True)
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def checked_device(name: str) -> torch.device:
    """Raises ValueError where there is no such device."""
    try:
        device = torch.device(name)
        torch.empty(0, dtype=torch.float32, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: a torch built without CUDA
        raise ValueError(f"device is {name!r}, which is not here: {str(error).splitlines()[0]}") from error
    return device
