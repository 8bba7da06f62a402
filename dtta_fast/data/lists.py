"""Data sets whose images and labels stand in list files: CoOp's splits of the CLIP sets, and lists of a path and a label a line."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from dtta_fast.data.folder import ImageFiles, read_lines
from dtta_fast.runtime.files import read_text


def open_coop(root: Path, split: str) -> ImageFiles:
    """Opens a data set with one of CoOp's splits (Zhou et al. 2022, arXiv 2109.01134), on which CLIPs are usually compared.

    The folder holds split_zhou_NAME.json, with [path, label, class name] for each image of train, val and test; and the images, whose
    paths are relative to the folder or to one of its subfolders. CoOp has such files for Caltech101, DTD, EuroSAT, Flowers102, Food101,
    Oxford Pets, Stanford Cars, SUN397 and UCF101 (frames).

    Args:
        root: the folder. split: "train", "val" or "test".

    Raises:
        ValueError: the file is missing, there are several, or it has other contents; or its images are not there.
    """
    listed = sorted(root.glob("split_zhou_*.json")) if os.path.isdir(root) else []
    if len(listed) != 1:
        found = f"holds {len(listed)} of them" if listed else "holds none"
        raise ValueError(f"{root} {found}: give the folder of a data set with its split_zhou_NAME.json, as CoOp's DATASETS.md lists them")
    names: dict[int, str] = {}
    rows: list[tuple[str, int]] = []
    try:
        found = json.loads(read_text(listed[0]))
        for part in ("train", "val", "test"):
            for path, label, name in found[part]:
                if type(label) is not int or names.setdefault(label, str(name)) != name:
                    raise ValueError(
                        f"{part} has [{path!r}, {label!r}, {name!r}], and the label is not a number, or has another name elsewhere"
                    )
                if part == split:
                    rows.append((str(path), label))
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{listed[0]} is not a split of CoOp: {error!r}; it needs [path, label, class name] for train, val and test"
        ) from error
    if sorted(names) != list(range(len(names))) or len(set(names.values())) < len(names) or not rows:
        raise ValueError(f"{listed[0]} has the labels {sorted(names)[:5]}, ..; they have to be 0, 1, .. with a name for each")
    return _files(root, listed[0], rows, [names[k].replace("_", " ") for k in sorted(names)], ["coop"] * len(rows))


def open_image_list(root: Path) -> ImageFiles:
    """Opens lists of images: text files with a path and a label a line, as DomainNet-126 and VisDA-C come.

    Each file is a domain, and a group of its own: real_list.txt is the group real. Paths are relative to the files' folder, or to one of
    its subfolders. A class is named after the folder that all of its images lie in, if there is one for each class.

    Args:
        root: a text file, or a folder of them.

    Raises:
        ValueError: there is no such file, a line is not a path with a label, or an image is not there.
    """
    listed = (
        [root]
        if os.path.isfile(root)
        else sorted(path for path in root.glob("*.txt") if path.name[0] != ".")
        if os.path.isdir(root)
        else []
    )
    if not listed:
        raise ValueError(f"{root} is not a text file and holds none; give a list with a path and a label a line, or a folder of such lists")
    rows: list[tuple[str, int]] = []
    groups: list[str] = []
    for path in listed:
        for row, line in enumerate(read_lines(path), 1):
            if not line.strip():
                continue
            stated = re.fullmatch(r"(.*\S)\s+([0-9]{1,6})", line.strip())
            if stated is None:
                raise ValueError(f"{path}, line {row}, is {line[:60]!r}; write a path, a space, and the number of a class")
            rows.append((stated[1], int(stated[2])))
            groups.append(re.sub("_list$", "", path.stem))
    if not rows:
        raise ValueError(f"{listed[0]} names no image")
    count = 1 + max(label for _, label in rows)
    folders: dict[int, set[str]] = {}
    for place, number in rows:
        folders.setdefault(number, set()).add(PurePosixPath(place).parent.name)
    names = [next(iter(folders.get(k, ()))) if len(folders.get(k, ())) == 1 else "" for k in range(count)]
    if len(set(names)) < count or "" in names:
        names = [f"class {k}" for k in range(count)]
    return _files(listed[0].parent, listed[0], rows, [name.replace("_", " ") for name in names], groups)


def _files(root: Path, listed: Path, rows: Sequence[tuple[str, int]], classes: Sequence[str], groups: Sequence[str]) -> ImageFiles:
    """Returns the images of a list, whose paths are relative to the root or to one of its subfolders."""
    for path, _ in rows:
        parts: Any = PurePosixPath(path)
        if parts.is_absolute() or ".." in parts.parts or "\0" in path:
            raise ValueError(f"{listed} names {path[:80]!r}, which may lie outside of {root}: paths are relative, and without ..")
    places = [root, *sorted(place for place in root.iterdir() if os.path.isdir(place))]
    above = next((place for place in places if rows and os.path.isfile(place / rows[0][0])), None)
    if above is None:
        shown = repr(rows[0][0][:80]) if rows else "no image"
        raise ValueError(f"{listed} names {shown}, which is neither in {root} nor in a folder there: put the images beside the list")
    names = [(above / path).relative_to(root).as_posix() for path, _ in rows]
    return ImageFiles(root, names, groups, [label for _, label in rows], classes)
