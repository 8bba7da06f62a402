"""Opens files that may come from anybody: plain ones only, and only up to a size."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

MOST_TEXT = 2**24  # bytes of a list or of a JSON file: ImageNet's longest list has 10^6


def open_plain(path: str | Path, most: int) -> BinaryIO:
    """Opens a plain file of up to `most` bytes for reading, or a link to one.

    Devices and pipes have no end, and opening one may wait for ever.

    Raises:
        ValueError: it is a folder, a device, a pipe or a socket, it is larger, or its name is none. OSError: it cannot be opened.
    """
    _check(os.stat(path), most)
    file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115 - the caller closes it
    try:
        _check(os.fstat(file.fileno()), most)  # of what was opened, whatever lies there by now
    except BaseException:
        file.close()
        raise
    return file


def read_text(path: str | Path, most: int = MOST_TEXT) -> str:
    """The text of a plain UTF-8 file of up to `most` bytes.

    Raises:
        ValueError: as open_plain(), or it is not UTF-8. OSError: it cannot be read.
    """
    with open_plain(path, most) as file:
        found = file.read(most + 1)  # what /proc shows is of 0 bytes, and goes on
    if len(found) > most:
        raise ValueError(f"it has more than {most} bytes")
    return found.decode("utf-8")


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _check(found: os.stat_result, most: int) -> None:
    if not stat.S_ISREG(found.st_mode):
        kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
        kind = next((name for is_kind, name in kinds if is_kind(found.st_mode)), "a device")
        raise ValueError(f"it is {kind}, not a plain file")
    if found.st_size > most:
        raise ValueError(f"it has {found.st_size} bytes, and {most} is the most")
