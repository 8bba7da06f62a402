"""Writes files whole: what was there before stays until the new one is on the disk."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from pathlib import Path

MOST_NAME = 255  # bytes of a name on the usual file systems
MOST_PATH = 4095
# Windows has none of them: it makes no links without a privilege, and does not wait for pipes
_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
_BYTES = getattr(os, "O_BINARY", 0)  # on Windows line ends would be changed otherwise


def write_whole(path: Path, content: str | bytes, *, follow: bool = True) -> None:
    """Writes a file so that it is the old one or the new one, whatever happens in between; a device or a pipe is written to directly.

    Args:
        follow: a link stays one, and the file that it leads to is written; without, only a plain file is replaced.

    Raises:
        OSError: it cannot be written; what was there is kept. ValueError: it is no plain file, and links are not followed.
    """
    data = _bytes(content)
    try:
        if not follow:
            check_plain(path)
        elif path.exists() and not path.is_file():  # before the links are followed: a pipe's own name is none that can be opened
            path.write_bytes(data)
            return
        place = Path(os.path.realpath(path)) if follow else path
        if follow and place.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        put(draft(place, data), place)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror}; what was there is kept") from error


def draft(path: Path, content: str | bytes) -> Path:
    """A new file beside another, of a name that nobody can foresee, with what that one is to hold; it is on the disk.

    Raises:
        OSError: it cannot be written; nothing of it is left.
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
    """Gives a draft its name, for good.

    Raises:
        OSError: it cannot be renamed; the draft is gone.
    """
    try:
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def write_all(descriptor: int, data: bytes) -> None:
    """Writes all of it to an open file."""
    written = 0
    while written < len(data):
        written += os.write(descriptor, data[written:])


def open_plain_own(path: Path, flags: int) -> int:
    """Opens a file of a run's own, which is made where it is missing; a link is not followed, and a pipe not waited for.

    Raises:
        ValueError: it is no plain file. OSError: it cannot be opened.
    """
    check_plain(path)
    descriptor = os.open(path, flags | os.O_CREAT | _NO_LINK | _BYTES, 0o644)
    try:
        _check_mode(path, os.fstat(descriptor).st_mode)  # of what was opened, whatever lies there by now
    except ValueError:
        os.close(descriptor)
        raise
    return descriptor


def check_plain(path: Path) -> None:
    """Raises ValueError where a name of a run's own files is a link, a folder, a pipe or a device; it may be missing."""
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
    return content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content  # names may hold bytes that are no text


def _sync(folder: Path) -> None:
    """Waits until the disk has the folder's names: what is written next must not outlive what was renamed before."""
    if os.name == "nt":
        return  # Windows opens no folder, and its file system keeps a journal of names
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
