"""Writes files whole: what was there before stays until the new one is on the disk."""

from __future__ import annotations

import os
from pathlib import Path

MOST_NAME = 255  # bytes of a name on the usual file systems
MOST_PATH = 4095


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file so that it is the old one or the new one, whatever happens in between; a device or a pipe is written to directly.

    Raises:
        OSError: it cannot be written; what was there is kept.
    """
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content  # names may hold bytes that are no text
    path = path.resolve()  # a link stays one
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    new = path.with_name(f"{os.fsdecode(os.fsencode(path.name)[:200])}.{os.getpid()}.new")
    try:
        with new.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
        _sync(path.parent)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {error.strerror}; what was there is kept") from error


def _sync(folder: Path) -> None:
    """Waits until the disk has the folder's names: what is written next must not outlive what was renamed before."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_name(argument: str, value: str | os.PathLike[str]) -> None:
    """Raises ValueError, naming the argument, where no file can have such a name."""
    try:
        name = os.fsencode(value)
    except UnicodeEncodeError as error:
        raise ValueError(f"{argument} is {str(value)[:40]!r}, which is no name of a file here: {error.reason}") from error
    longest = max(map(len, name.split(b"/")))
    if longest > MOST_NAME or len(name) > MOST_PATH:
        some = f"a part of {longest} bytes" if longest > MOST_NAME else f"{len(name)} bytes"
        raise ValueError(f"{argument} is {str(value)[:40]!r}..., which has {some}; give a path of up to {MOST_NAME} bytes between slashes")
    if b"\0" in name:
        raise ValueError(f"{argument} is {str(value)[:40]!r}, which has a zero byte in it; give a name without")
