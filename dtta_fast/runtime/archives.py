"""Checks a zip archive before torch reads it, so that every reader finds the same members and no name leads out of its folder."""

from __future__ import annotations

import os
import stat
import struct
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dtta_fast.runtime.files import open_plain

END, LOCATOR, END64, CENTRAL, LOCAL, AFTER = b"PK\5\6", b"PK\6\7", b"PK\6\6", b"PK\1\2", b"PK\3\4", b"PK\7\x08"
IN_64 = 0xFFFFFFFF  # value of a 32-bit field whose number is stored in the extra field
MOST_MEMBERS = 2**16
MOST_DIRECTORY = 2**25  # maximum bytes of the directory
MOST_NAME = 511  # maximum bytes of a member name; torch's reader truncates longer ones


@dataclass(frozen=True)
class _Member:
    name: bytes
    flags: int
    method: int
    check: int
    packed: int
    size: int
    offset: int


def check_archive(path: str | Path) -> None:
    """Checks that an archive can be read in only one way.

    Python's zipfile and torch's reader locate the directory by different rules, so a file could present a different one to each. This check
    requires contiguous members from the first byte on, followed by the directory and its end record, and nothing else.

    Raises:
        ValueError: the file is not an archive; it has bytes that belong to nothing; a member is compressed, encrypted, duplicated, a link,
            or has a name that leads out of its folder; or two readers would read it differently. OSError: the file cannot be read.
    """
    with open_plain(path, 2**63) as file:
        size = os.fstat(file.fileno()).st_size
        begin, end, count = _directory(file, size)
        members = _members(_at(file, begin, end - begin), count)
        names: set[str] = set()
        for member in members:
            _check_name(member.name)
            if (folded := unicodedata.normalize("NFC", member.name.decode("utf-8").casefold())) in names:
                raise ValueError(f"its member {_shown(member.name)} is there twice")
            names.add(folded)
        place = 0
        for member in sorted(members, key=lambda member: member.offset):
            if member.offset != place:
                raise ValueError(f"it has bytes before its member {_shown(member.name)} that belong to none, or to two")
            place = _end_of(file, member, begin)
        if place != begin:
            raise ValueError("it has bytes before its directory that belong to no member")


def _directory(file: BinaryIO, size: int) -> tuple[int, int, int]:
    """Returns the start and end offsets of the directory, and the number of members it lists."""
    if size < 22:
        raise ValueError("it is not a zip archive")
    at = size - 22
    mark, disk, first, here, count, length, begin, comment = struct.unpack("<4s4H2IH", _at(file, at, 22))
    if mark != END or comment:
        raise ValueError("it is not a zip archive, is cut, or has a comment or other bytes at its end")
    end = at
    if at >= 76 and _at(file, at - 20, 4) == LOCATOR:  # torch writes both forms of the end record
        end = at - 76
        _, disk64, place, disks = struct.unpack("<4sIQI", _at(file, at - 20, 20))
        found = struct.unpack("<4sQ2H2I4Q", _at(file, end, 56))
        mark, rest, _, _, this, start, here64, count64, length64, begin64 = found
        if mark != END64 or rest != 44 or place != end or (disk64, disks, this, start) != (0, 1, 0, 0) or here64 != count64:
            raise ValueError("its two ends do not fit together")
        for short, long, most in ((here, here64, 0xFFFF), (count, count64, 0xFFFF), (length, length64, IN_64), (begin, begin64, IN_64)):
            if short not in (long, most):
                raise ValueError("its two ends do not say the same")
        here, count, length, begin = here64, count64, length64, begin64
    if disk or first or here != count or not 0 < count <= MOST_MEMBERS or not 0 < length <= MOST_DIRECTORY:
        raise ValueError(f"it is not a zip archive of one file with 1 to {MOST_MEMBERS} members")
    if begin + length != end:
        raise ValueError("its directory is not where its end says")
    return begin, end, count


def _members(directory: bytes, count: int) -> list[_Member]:
    found, at = [], 0
    while at < len(directory):
        if directory[at : at + 4] != CENTRAL or len(directory) - at < 46:
            raise ValueError("its directory is damaged")
        flags, method, _, _, check, packed, size, name_length, extra_length, comment, disk, _, attributes, offset = struct.unpack(
            "<8x4H3I5H2I", directory[at : at + 46]
        )
        at += 46
        name, extra = directory[at : at + name_length], directory[at + name_length : at + name_length + extra_length]
        at += name_length + extra_length
        if at > len(directory) or comment or disk:
            raise ValueError("its directory is damaged, or has comments")
        size, packed, offset = _wide(extra, [size, packed, offset])
        if stat.S_ISLNK(attributes >> 16):
            raise ValueError(f"its member {_shown(name)} is a link")
        found.append(_Member(name, flags, method, check, packed, size, offset))
    if len(found) != count:
        raise ValueError(f"its directory has {len(found)} members, and its end says {count}")
    return found


def _wide(extra: bytes, numbers: list[int]) -> list[int]:
    """Resolves 32-bit numbers, replacing those that are too large for 32 bits by the values from the extra field."""
    fields, at = [], 0
    while at < len(extra):
        if len(extra) - at < 4:
            raise ValueError("its directory has a damaged extra field")
        kind, length = struct.unpack("<2H", extra[at : at + 4])
        if at + 4 + length > len(extra):
            raise ValueError("its directory has a damaged extra field")
        if kind == 1:
            fields.append(extra[at + 4 : at + 4 + length])
        at += 4 + length
    missing = numbers.count(IN_64)
    if len(fields) != bool(missing) or (missing and len(fields[0]) != 8 * missing):
        raise ValueError("its directory gives the size of a member twice, or not at all")
    given = iter(struct.unpack(f"<{missing}Q", fields[0]) if missing else ())
    return [next(given) if number == IN_64 else number for number in numbers]


def _check_name(name: bytes) -> None:
    """Checks the raw bytes of a name as torch reads them, since zipfile cuts names at a NUL and converts separators."""
    try:
        text = name.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"its member {_shown(name)} is not named in UTF-8") from error
    leads_out = any(not part.strip(" .") for part in text.split("/"))  # "", ".", "..", and names that Windows treats as these
    if leads_out or len(name) > MOST_NAME or any(mark in "\\:" or not mark.isprintable() for mark in text):
        raise ValueError(f"its member {_shown(name)} has a name that leads out of its folder, or is none")


def _end_of(file: BinaryIO, member: _Member, directory: int) -> int:
    """Returns the end offset of a member, including the data descriptor that may follow it.

    Raises:
        ValueError: the member is compressed, encrypted or incomplete, or its own header does not match the directory.
    """
    if member.method or member.packed != member.size:
        raise ValueError(f"its member {_shown(member.name)} is compressed, and could unpack to any size")
    if member.flags & 1 or member.offset + 30 > directory:
        raise ValueError(f"its member {_shown(member.name)} is encrypted, or not there")
    head = _at(file, member.offset, 30)
    mark, flags, method, check, packed, size, name_length, extra_length = struct.unpack("<4s2x2H4x3I2H", head)
    name = _at(file, member.offset + 30, name_length)
    if mark != LOCAL or (flags, method) != (member.flags, member.method) or name != member.name:
        raise ValueError(f"its member {_shown(member.name)} is {_shown(name)} where it lies")
    later = bool(flags & 8)  # its sizes follow the data
    for own, whole in ((check, member.check), (packed, member.packed), (size, member.size)):
        if own not in (whole, IN_64, *((0,) if later else ())):
            raise ValueError(f"its member {_shown(member.name)} has other sizes where it lies")
    end = member.offset + 30 + name_length + extra_length + member.packed
    if end > directory:
        raise ValueError(f"its member {_shown(member.name)} has {member.packed} bytes, which are not there")
    if not later:
        return end
    for form in ("<4s3I", "<4sI2Q"):
        length = struct.calcsize(form)
        numbers = (member.check, member.packed, member.size)
        if end + length <= directory and _at(file, end, length) == _packed(form, numbers):
            return end + length
    raise ValueError(f"its member {_shown(member.name)} has other sizes after it")


def _packed(form: str, numbers: tuple[int, int, int]) -> bytes | None:
    try:
        return struct.pack(form, AFTER, *numbers)
    except struct.error:  # a number exceeds 32 bits
        return None


def _at(file: BinaryIO, place: int, length: int) -> bytes:
    file.seek(place)
    found = file.read(length)
    if len(found) != length:
        raise ValueError("it is cut")
    return found


def _shown(name: bytes) -> str:
    return repr(name[:80].decode("utf-8", "backslashreplace"))
