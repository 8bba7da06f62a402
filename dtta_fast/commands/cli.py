"""The command `dtta`."""

from __future__ import annotations

import dataclasses
import inspect
import io
import os
import select
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from dtta_fast import presets
from dtta_fast.commands.adapt import Adapt
from dtta_fast.commands.bench import Bench
from dtta_fast.commands.calibrate import Calibrate
from dtta_fast.commands.common import option, shown
from dtta_fast.commands.demo import Demo
from dtta_fast.commands.doctor import Doctor
from dtta_fast.commands.env import Env
from dtta_fast.commands.evaluate import Evaluate
from dtta_fast.commands.export import Export
from dtta_fast.commands.profile import Profile
from dtta_fast.commands.report import Report

COMMANDS: tuple[Any, ...] = (Demo, Adapt, Doctor, Evaluate, Report, Calibrate, Bench, Profile, Export, Env)
ABOUT = """Test-time adaptation of vision models by diffusion feedback.

Begin with: dtta demo. Help on a subcommand, such as adapt: dtta adapt --help."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command; bad input prints a one-line error and exits with status 2."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # avoid errors from characters that the terminal cannot encode
    try:
        start = None
        if arguments[:1] == ["evaluate"]:
            start, arguments = Evaluate.start(arguments)
        command: Any = tyro.cli(_commands(arguments, start), prog="dtta", description=ABOUT, args=arguments)
        command.run()
        if _reader_is_gone():
            sys.exit(141)
    except SystemExit:  # after --help, and errors of usage
        _reader_is_gone()
        raise
    except KeyboardInterrupt:
        print(shown(f"dtta {' '.join(arguments[:1])}: stopped"), file=sys.stderr)
        sys.exit(130)
    except (ValueError, TypeError, ImportError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            sys.exit(141)
        print(shown(f"dtta {' '.join(arguments[:1])}: {error}"), file=sys.stderr)
        sys.exit(2)


def _reader_is_gone() -> bool:
    """Flushes the output; returns whether its reader, such as `head`, has closed the pipe. Nothing more is then written to it."""
    gone = False
    try:
        sys.stdout.flush()
        if hasattr(select, "poll"):  # the failed write may have emptied the buffer
            poll = select.poll()
            poll.register(sys.stdout.fileno(), 0)
            gone = any(event & select.POLLERR for _, event in poll.poll(0))
    except BrokenPipeError:
        gone = True
    except (OSError, ValueError):  # no file, as in a notebook
        return False
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain when it flushes at its end
    return gone


def _commands(arguments: Sequence[str], start: Evaluate | None = None) -> Any:
    """Builds the union of the commands; settings that start from a preset, or from `start`, use its values as defaults.

    The called command has its full description, the others only one line.
    """
    found = None
    for kind in COMMANDS:
        name = kind.__name__.lower()
        fields = {field.name: field for field in dataclasses.fields(kind)}
        if arguments[:1] != [name]:
            command: Any = tyro.conf.subcommand(name, description=(inspect.getdoc(kind) or "").partition("\n\n")[0])
        elif start is not None and kind is Evaluate:
            command = tyro.conf.subcommand(name, default=start)
        elif "config" in fields:
            preset = presets.get(option(arguments, "--preset") or str(fields["preset"].default))
            usual: Any = fields["config"].default
            if usual.precheck == "off":  # measuring commands adapt every image, under any preset
                preset = preset.replace(precheck="off")
            required = [field for field, own in fields.items() if own.default is dataclasses.MISSING]
            command = tyro.conf.subcommand(name, default=kind(**dict.fromkeys(required, tyro.MISSING), config=preset))
        else:
            command = tyro.conf.subcommand(name)
        annotated: Any = Annotated[kind, command]
        found = annotated if found is None else found | annotated
    return found
