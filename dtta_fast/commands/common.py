"""Helpers shared by several subcommands."""

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
from dtta_fast.data.folder import read_lines
from dtta_fast.runs.folder import CONFIG, OF_LEFTOVER, OF_LOCK, OF_RUN
from dtta_fast.runs.writing import check_name, write_whole
from dtta_fast.runtime.files import read_text

Settings = Annotated[AdaptConfig, tyro.conf.arg(name="")]  # one flag per setting; with a name, tyro boxes what it rejects
OutFile = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: not written)")]
Name = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: the digits zoo)")]

MOST_RESULT = 2**28  # maximum size of a JSON result in bytes; a Chrome trace is the largest


def check_path(name: str, path: Path | None, ours: Callable[[Path], bool] = lambda path: False) -> None:
    """Raises ValueError, naming the argument, if a result must not be written to this path. Call it before the work starts.

    Args:
        ours: tells whether a file is an earlier result of the same kind, which may be replaced; any other non-empty file is kept.
    """
    if path is None:
        return
    check_name(name, path)
    place = Path(os.path.realpath(path))
    if path.is_dir() or place.is_symlink() or not place.parent.is_dir():  # still a link after realpath: it points to itself
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
        raise ValueError(f"{name} is {str(path)!r}, a file that is not an earlier result of this command: give another name, or remove it")


def check_apart(**paths: Path | None) -> None:
    """Raises ValueError if two results would be written to the same file."""
    seen: dict[str, str] = {}
    for name, path in paths.items():
        if path is not None and (other := seen.setdefault(os.path.realpath(path), name)) != name:
            raise ValueError(f"{name} is {str(path)!r}, and so is {other}: give each a file of its own")


def holds(*keys: str) -> Callable[[Path], bool]:
    """Returns a function that checks whether a file is a JSON object with these keys."""

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
    """Checks by its title whether a file is a page written by `dtta report` or `dtta profile`."""
    with path.open("rb") as file:
        head = re.match(rb"\s*<!doctype html>.*?<title>([^<]*)</title>", file.read(2**20), re.DOTALL)
    return head is not None and re.search(rb"\xe2\x80\x93 dtta (report|profile)$", head[1].strip()) is not None


def write_json(path: Path | None, result: Any) -> None:
    """Writes a result atomically: the whole file or nothing. Does nothing if `path` is None."""
    if path is not None:
        write_whole(path, json.dumps(result, indent=2, allow_nan=False) + "\n")


def shown(value: object) -> str:
    """Makes external text safe for a terminal: one line of printable characters, with all others escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))


def terminal(*, stderr: bool = False) -> Console:
    """Returns a console for external text that was passed through shown(): it does not parse [name] as markup or :name: as an emoji."""
    return Console(stderr=stderr, markup=False, emoji=False)


def option(arguments: Sequence[str], flag: str) -> str | None:
    """Returns the value of a flag at any position; if the flag is repeated, the last value, which takes precedence."""
    found, rest = None, iter(arguments)
    for argument in rest:
        if argument.startswith(f"{flag}="):
            found = argument.partition("=")[2]
        elif argument == flag:
            found = next(rest, found)
    return found


def names_of(classes: str) -> list[str] | dict[str, list[str]]:
    """Reads the class names, or the prompts of each class by its name, that --classes stands for.

    That is a comma-separated list; a .txt file with one name a line; a .json file with a list of names, or an object of a prompt or a list
    of prompts for each name; or imagenet, for ImageNet's 1000 names.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    if classes == "imagenet":
        from dtta_fast.data.imagenet import imagenet_classes

        return list(imagenet_classes())
    path = Path(classes)
    if "," in classes or path.suffix.lower() not in (".txt", ".json"):
        names = [name.strip() for name in classes.split(",")]
        if len(names) < 2:
            raise ValueError(f"classes is {classes!r}; give at least two names, separated by commas, or a .txt or .json file of them")
        return names
    if not os.path.isfile(path):
        raise ValueError(f"classes is {classes!r}, and there is no such file; give one, or names separated by commas")
    if path.suffix.lower() == ".txt":
        return [line.strip() for line in read_lines(path) if line.strip()]
    try:
        found = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"classes is {classes!r}, which is not a JSON file that can be read: {error}") from error
    if isinstance(found, dict):
        found = {name: [prompts] if isinstance(prompts, str) else prompts for name, prompts in found.items()}
    groups = [found] if isinstance(found, list) else list(found.values()) if isinstance(found, dict) else [None]
    if not found or not all(isinstance(group, list) and group and all(isinstance(text, str) for text in group) for group in groups):
        raise ValueError(f"classes is {classes!r}; it has to hold a list of names, or an object of a prompt or prompts for each name")
    return found


def quiet() -> None:
    """Disables the progress bars and reports of the libraries: scripts read a command's output too, and such a report prints names from
    a file unescaped."""
    from diffusers.utils.logging import disable_progress_bar as quiet_diffusers
    from transformers.utils import logging as transformers_logging
    from transformers.utils.logging import disable_progress_bar as quiet_transformers

    quiet_diffusers()
    quiet_transformers()
    transformers_logging.set_verbosity_error()


def progress_bar() -> Progress:
    """Returns a progress bar on standard error, shown only if that is a terminal; it disappears when the work is done."""
    console = terminal(stderr=True)
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def checked_device(name: str) -> torch.device:
    """Returns the device; raises ValueError if it is not available."""
    try:
        device = torch.device(name)
        torch.empty(0, dtype=torch.float32, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: torch was built without CUDA
        raise ValueError(f"device is {name!r}, which is not available: {str(error).splitlines()[0]}") from error
    return device
