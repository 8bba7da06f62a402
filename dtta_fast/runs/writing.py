"""Writes files atomically: the old file stays until the new one is on disk."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from pathlib import Path

MOST_NAME = 255  # bytes of a file name on common file systems
MOST_PATH = 4095
# Windows has none of these flags: creating links there requires a privilege, and opening a pipe does not block
_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
_BYTES = getattr(os, "O_BINARY", 0)  # otherwise Windows would convert line endings


def write_whole(path: Path, content: str | bytes, *, follow: bool = True) -> None:
    """Writes a file atomically: after a failure it holds either the old or the new content. A device or a pipe is written to directly.

    Args:
        follow: if True, a link stays a link and its target is written; if False, only a plain file is replaced.

    Raises:
        OSError: the file cannot be written; the old content is kept. ValueError: `follow` is False and the path is not a plain file.
    """
    data = _bytes(content)
    try:
        if not follow:
            check_plain(path)
        elif path.exists() and not path.is_file():  # before links are resolved: a pipe's resolved name cannot be opened
            path.write_bytes(data)
            return
        place = Path(os.path.realpath(path)) if follow else path
        if follow and place.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        put(draft(place, data), place)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror}; what was there is kept") from error


def draft(path: Path, content: str | bytes) -> Path:
    """Writes the new content of a file to a file beside it with an unpredictable name, and waits until it is on disk.

    Raises:
        OSError: the draft cannot be written; no part of it is left behind.
    """
    data, stem = _bytes(content), os.fsdecode(os.fsencode(path.name)[:200])
    new = path.with_name(f"{stem}.{secrets.randbelow(10**18)}.new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK | _BYTES, 0o666)
    try:
        try:
            write_all(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    return new


def put(new: Path, path: Path) -> None:
    """Renames a draft to its final path and makes the rename durable.

    Raises:
        OSError: the draft cannot be renamed; it has been deleted.
    """
    try:
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def write_all(descriptor: int, data: bytes) -> None:
    """Writes all of the data to an open file."""
    written = 0
    while written < len(data):
        written += os.write(descriptor, data[written:])


def open_plain_own(path: Path, flags: int) -> int:
    """Opens one of a run's own files and creates it if missing. Does not follow links or block on pipes.

    Raises:
        ValueError: the path is not a plain file. OSError: the file cannot be opened.
    """
    check_plain(path)
    descriptor = os.open(path, flags | os.O_CREAT | _NO_LINK | _BYTES, 0o644)
    try:
        _check_mode(path, os.fstat(descriptor).st_mode)  # checks what was opened, since the path may have been replaced meanwhile
    except ValueError:
        os.close(descriptor)
        raise
    return descriptor


def check_plain(path: Path) -> None:
    """Raises ValueError if the path of one of a run's own files is a link, folder, pipe, socket or device; it may be missing."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    _check_mode(path, mode)


def _check_mode(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kinds = ((stat.S_ISLNK, "a link"), (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
        kind = next((name for is_kind, name in kinds if is_kind(mode)), "a device")
        raise ValueError(f"{path} is {kind}, and a run's own files are plain ones: remove it, or name another folder")


def _bytes(content: str | bytes) -> bytes:
    return content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content  # names may hold bytes that are not text


def _sync(folder: Path) -> None:
    """Waits until the folder's entries are on disk, so that no later write can survive a crash that loses an earlier rename."""
    if os.name == "nt":
        return  # Windows cannot open folders this way, and its file system journals names
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_name(argument: str, value: str | os.PathLike[str]) -> None:
    """Raises ValueError, naming the argument, if the value cannot be a file name."""
    try:
        name = os.fsencode(value)
    except UnicodeEncodeError as error:
        raise ValueError(f"{argument} is {str(value)[:40]!r}, which is not a name of a file here: {error.reason}") from error
    longest = max(map(len, name.split(b"/")))
    if longest > MOST_NAME or len(name) > MOST_PATH:
        some = f"a part of {longest} bytes" if longest > MOST_NAME else f"{len(name)} bytes"
        raise ValueError(f"{argument} is {str(value)[:40]!r}..., which has {some}; give a path of up to {MOST_NAME} bytes between slashes")
    if b"\0" in name:
        raise ValueError(f"{argument} is {str(value)[:40]!r}, which has a zero byte in it; give a name without")
