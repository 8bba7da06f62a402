"""Opens untrusted files: only regular files, and only up to a maximum size."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

MOST_TEXT = 2**24  # maximum bytes of a list or a JSON file; ImageNet's longest list has 10^6


def open_plain(path: str | Path, most: int) -> BinaryIO:
    """Opens a regular file of up to `most` bytes, or a link to one, for reading.

    Devices and pipes have no end, and opening one may block forever.

    Raises:
        ValueError: the path is a folder, a device, a pipe or a socket, the file is larger, or the path is not a valid name. OSError: the
            file cannot be opened.
    """
    _check(os.stat(path), most)
    file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115 - the caller closes it
    try:
        _check(os.fstat(file.fileno()), most)  # check the opened file, since the path may have been replaced
    except BaseException:
        file.close()
        raise
    return file


def read_text(path: str | Path, most: int = MOST_TEXT) -> str:
    """Reads the text of a regular UTF-8 file of up to `most` bytes.

    Raises:
        ValueError: as in open_plain(), or the file is not UTF-8. OSError: the file cannot be read.
    """
    with open_plain(path, most) as file:
        found = file.read(most + 1)  # files in /proc report 0 bytes but have content
    if len(found) > most:
        raise ValueError(f"it has more than {most} bytes")
    return found.decode("utf-8-sig")  # some editors begin a file with a byte order mark


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _check(found: os.stat_result, most: int) -> None:
    if not stat.S_ISREG(found.st_mode):
        kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
        kind = next((name for is_kind, name in kinds if is_kind(found.st_mode)), "a device")
        raise ValueError(f"it is {kind}, not a plain file")
    if found.st_size > most:
        raise ValueError(f"it has {found.st_size} bytes, and {most} is the most")
