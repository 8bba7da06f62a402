"""What several subcommands do."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dtta_fast.config import AdaptConfig

Settings = Annotated[AdaptConfig, tyro.conf.arg(name="")]  # each a flag of its own; under a name tyro boxes what it refuses
OutFile = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: not written)")]
Name = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: the digits zoo)")]


def check_path(name: str, path: Path | None) -> None:
    """Raises ValueError, naming the argument, where a result cannot be written to: before the work, not after it."""
    if path is None:
        return
    folder = path.resolve().parent
    if path.is_dir() or not folder.is_dir():
        raise ValueError(f"{name} is {str(path)!r}, where the result cannot be written: give a file in a folder that exists")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise ValueError(f"{name} is {str(path)!r}, where the result cannot be written: give a place that you may write to")


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
    """No bars of the libraries' own: what a command prints is for scripts too."""
    from diffusers.utils.logging import disable_progress_bar as quiet_diffusers
    from transformers.utils.logging import disable_progress_bar as quiet_transformers

    quiet_diffusers()
    quiet_transformers()


def progress_bar() -> Progress:
    """On standard error, where that is a terminal; it goes when the work is done."""
    terminal = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal)


def checked_device(name: str) -> torch.device:
    """Raises ValueError where there is no such device."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: a torch built without CUDA
        raise ValueError(f"device is {name!r}, which is not here: {str(error).splitlines()[0]}") from error
    return device
