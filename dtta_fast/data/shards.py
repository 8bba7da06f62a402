"""webdataset shards: tar files in which members with the same name form a sample."""

from __future__ import annotations

import io
import os
import re
import sys
import tarfile
from collections.abc import Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from dtta_fast.data.base import Images
from dtta_fast.data.folder import SUFFIXES, read_lines
from dtta_fast.runtime.files import open_plain
from dtta_fast.runtime.pictures import MOST_BYTES, read_pixels

# webdataset's own rule: a sample's key is everything before the first dot of the file's name
MOST_SHARDS = 100_000  # the most names that a pattern may expand to
MOST_LABEL = 512  # the most bytes to read of a .cls file
_MEMBER = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)


class Shards(Images):
    """Samples from tar files, indexed once and read by seeking. The image is found by its extension, the label in .cls.

    `classes` are the lines of classnames.txt, if that file is in the shards' folder or its parent.

    Args:
        paths: uncompressed tar files.

    Raises:
        ValueError: a file is not a tar file or is truncated; a sample has no image or occurs twice; a label is not a number, is missing
            although other samples have one, or is out of the classes' range.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        common = Path(os.path.commonpath([path.parent for path in paths]))
        self._spans: list[tuple[Path, int, int]] = []
        self.names = names = []
        labels: list[int | None] = []
        listed = next((place / "classnames.txt" for place in (common, common.parent) if (place / "classnames.txt").is_file()), None)
        self.classes = tuple(line.strip() for line in read_lines(listed) if line.strip()) if listed else ()
        for path in paths:
            shard = path.relative_to(common).as_posix()
            for key, members in _samples(path).items():
                image = next((extension for extension in members if f".{extension}" in SUFFIXES), None)
                if image is None:
                    raise ValueError(f"{path} has no image of the sample {key}: it has {', '.join(members)}")
                names.append(f"{shard}/{key}")
                self._spans.append((path, *members[image]))
                labels.append(_label(path, key, members["cls"], self.classes) if "cls" in members else None)
        if not names:
            raise ValueError(f"{paths[0]} and the other {len(paths) - 1} shards hold no sample")
        known = [label for label in labels if label is not None]
        if known and len(known) < len(labels):
            raise ValueError(f"{names[labels.index(None)]} has no .cls, while {len(known)} samples have one; label all or none")
        self.labels = known or None
        self.groups = ["webdataset"] * len(names)

    def read(self, index: int) -> Tensor:
        path, offset, size = self._spans[index]
        name = f"{path}, sample {self.names[index]}"
        if size > MOST_BYTES:
            raise ValueError(f"{name} cannot be read as an image: it has {size} bytes, and {MOST_BYTES} is the most")
        return read_pixels(io.BytesIO(_bytes(path, offset, size, name)), name)


def open_webdataset(root: Path) -> Shards:
    """Opens a tar file, a folder of tar files, or a pattern.

    In a pattern, {000..009} and {a,b} expand to files that must exist; * and ? match existing files.

    Raises:
        ValueError: there is no file, or as for `Shards`.
    """
    if os.path.isdir(root):  # pathlib raises if the name is too long
        paths = sorted(path for path in root.iterdir() if path.suffix.lower() == ".tar" and not path.name.startswith("."))
        if not paths:
            raise ValueError(f"{root} holds no .tar file; give the folder that does, or a pattern")
        return Shards(paths)
    paths = []
    for pattern in [str(root)] if os.path.exists(root) else _braces(str(root)):
        found = sorted(glob(pattern)) if has_magic(pattern) and not os.path.exists(pattern) else [pattern]
        if not found or not os.path.isfile(found[0]):
            raise ValueError(f"{pattern} is missing; give a tar file, a folder of tar files, or a pattern such as shard-{{000..009}}.tar")
        paths += [Path(path) for path in found]
    return Shards(paths)


def _braces(pattern: str) -> list[str]:
    """Expands braces: shard-{08..10}.tar to three names, {a,b} to two."""
    found = [pattern]
    while match := re.search(r"\{([^{}]*)\}", found[0]):
        middle: Sequence[str] = match[1].split(",")
        span = re.fullmatch(r"([0-9]{1,9})\.\.([0-9]{1,9})", match[1])
        numbers = range(int(span[1]), int(span[2]) + 1) if span else range(len(middle))
        if len(found) * len(numbers) > MOST_SHARDS:
            raise ValueError(f"root is {pattern!r}, which names more than {MOST_SHARDS} files: give the folder that holds them")
        if span:
            middle = [str(number).zfill(len(span[1])) for number in numbers]
        begin, end = match[0], len(match[0])
        if not all(begin in whole for whole in found):
            raise ValueError(f"root is {pattern!r}, with braces in braces: give one pair of braces a part of the name")
        found = [whole[: (at := whole.index(begin))] + part + whole[at + end :] for whole in found for part in middle]
        if not found:
            raise ValueError(f"root is {pattern!r}, whose {begin} is empty: give the first number before the last")
    return found


def _samples(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Indexes a tar file: key -> extension -> (offset, size in bytes), in file order."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with _opened(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            whole = os.fstat(file.fileno()).st_size
            for member in archive:
                # a negative size makes tarfile go back and loop forever; a size past the end makes a read allocate that much memory
                if member.size < 0 or member.offset_data + member.size > whole or member.issparse():
                    raise tarfile.ReadError(f"its member {member.name!r} has {member.size} bytes, which are not there")
                match = _MEMBER.fullmatch(member.name.removeprefix("./"))
                if not member.isreg() or match is None or member.name.startswith("__"):  # __ marks metadata of the shard
                    continue
                key, extension = match[1], match[2].lower()
                if extension in samples.setdefault(key, {}):
                    raise ValueError(f"{path} has {key}.{extension} twice: a sample's name is its own")
                samples[key][extension] = member.offset_data, member.size
    except (tarfile.TarError, OSError, EOFError, OverflowError, MemoryError, RecursionError, UnicodeError) as error:
        raise ValueError(f"{path} cannot be read as a tar file: {error}; unpack .gz first, as members are read by seeking") from error
    return samples


def _opened(path: Path) -> BinaryIO:
    try:
        return open_plain(path, sys.maxsize)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a tar file: {error}") from error


def _label(path: Path, key: str, span: tuple[int, int], classes: tuple[str, ...]) -> int:
    name = f"{path}, sample {key}"
    text = _bytes(path, span[0], min(span[1], MOST_LABEL), name).decode("ascii", "replace").strip()
    if not re.fullmatch(r"[0-9]{1,9}", text) or (classes and int(text) >= len(classes)):
        raise ValueError(f"{name} has the label {text[:20]!r}; .cls is 0 .. {len(classes) - 1 if classes else 'classes - 1'}")
    return int(text)


def _bytes(path: Path, offset: int, size: int, name: str) -> bytes:
    try:
        with open_plain(path, sys.maxsize) as file:
            file.seek(offset)
            return file.read(size)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} cannot be read: {error}") from error
