"""ImageNet and its variants: folders of images by class, numbered like the outputs of a 1000-class model."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo

from dtta_fast.data.base import chosen_corruptions
from dtta_fast.data.folder import ImageFiles, class_files, read_lines, subfolders
from dtta_fast.runtime.files import read_text

# name -> timm's file that lists its wnids; None means all 1000
FOLDERS = {
    "imagenet-a": "imagenet_a_synsets.txt",
    "imagenet-r": "imagenet_r_synsets.txt",
    "imagenet-sketch": None,
    "imagenet-stylized": None,
}
# replacements for first names that two classes share, because prompts must be distinct
OWN_NAMES = {"n02012849": "crane bird", "n03126707": "construction crane", "n03710637": "maillot", "n03710721": "tank suit"}


@cache
def _wnids() -> dict[str, int]:
    """Maps each wnid to its output index."""
    return {wnid: output for output, wnid in enumerate(ImageNetInfo("imagenet-1k").label_names())}


@cache
def imagenet_classes() -> tuple[str, ...]:
    """Returns the 1000 class names in the order of a model's outputs: the first name of each class, all distinct."""
    found = ImageNetInfo("imagenet-1k")
    return tuple(OWN_NAMES.get(wnid, found.label_name_to_description(wnid).split(",")[0]) for wnid in found.label_names())


def open_imagenet(root: Path) -> ImageFiles:
    """Opens the validation images, in wnid folders in root or root/val.

    Raises:
        ValueError: there is no class folder, or one is empty or its name is not one of the 1000 wnids.
    """
    root = root / "val" if os.path.isdir(root / "val") else root
    return open_wnid_folders(root, "imagenet")


def open_wnid_folders(root: Path, name: str) -> ImageFiles:
    """Opens class folders named by wnid: ImageNet, -Sketch and -Stylized, and -A and -R, which have 200 of the 1000 classes.

    Raises:
        ValueError: as for `open_imagenet`.
    """
    listed = FOLDERS.get(name)
    if listed is None:
        outputs, numbers = None, _wnids()
    else:
        wnids = sorted((files("timm.data") / "_info" / listed).read_text().split())
        outputs, numbers = [_wnids()[wnid] for wnid in wnids], {wnid: label for label, wnid in enumerate(wnids)}
    names, labels = class_files(root, _numbered(root, subfolders(root), numbers, name))
    classes = imagenet_classes() if outputs is None else [imagenet_classes()[output] for output in outputs]
    return ImageFiles(root, names, [name] * len(names), labels, classes, outputs)


def open_imagenet_v2(root: Path) -> ImageFiles:
    """Opens one of ImageNet-V2's three variants: class folders 0 .. 999, named by output index.

    Raises:
        ValueError: there is no class folder, or one is empty or its name is not a number in 0 .. 999.
    """
    folders = subfolders(root)
    wrong = [folder for folder in folders if not (folder.isascii() and folder.isdigit() and int(folder) < 1000)]
    if wrong or not folders:
        some = f"has the folder {wrong[0]!r}" if wrong else "has no class folders"
        raise ValueError(f"{root} {some}; ImageNet-V2 is folders 0 .. 999: give the folder of one variant, which holds them")
    names, labels = class_files(root, [(folder, int(folder)) for folder in sorted(folders, key=int)])
    return ImageFiles(root, names, ["imagenet-v2"] * len(names), labels, imagenet_classes())


def open_imagenet_c(root: Path, corruptions: Sequence[str] = (), severities: Sequence[int] = ()) -> ImageFiles:
    """Opens ImageNet-C: CORRUPTION/SEVERITY/wnid in root, or in the folders of its archives (noise, blur, weather, digital, extra).

    Raises:
        ValueError: as for `open_imagenet`, or a corruption or severity is missing; the message lists those that exist.
    """
    places: dict[str, str] = {}
    there: dict[str, set[int]] = {}
    for folder in subfolders(root):
        inner = subfolders(root / folder)
        is_corruption = any(name.isdigit() for name in inner)
        for place in [folder] if is_corruption else [f"{folder}/{name}" for name in inner]:
            severe = {int(name) for name in subfolders(root / place) if name.isascii() and name.isdigit()}
            if severe:
                corruption = place.rpartition("/")[2]
                places[corruption], there[corruption] = place, severe
    names: list[str] = []
    groups: list[str] = []
    labels: list[int] = []
    for corruption, severity in chosen_corruptions(there, corruptions, severities, root):
        place = f"{places[corruption]}/{severity}"
        folders = [(f"{place}/{wnid}", label) for wnid, label in _numbered(root / place, subfolders(root / place), _wnids(), "imagenet-c")]
        found, numbers = class_files(root, folders)
        names += found
        labels += numbers
        groups += [f"{corruption}{severity}"] * len(found)
    return ImageFiles(root, names, groups, labels, imagenet_classes())


def open_objectnet(root: Path) -> ImageFiles:
    """Opens the 113 ObjectNet classes shared with ImageNet, in root or root/images, with mappings/ alongside.

    The images' red border is cut off. If a class corresponds to several ImageNet classes, the first output is in `outputs` and the others
    are in `further`.

    Raises:
        ValueError: a mapping or a class folder is missing, or a folder is not in the mappings.
    """
    images = root / "images" if os.path.isdir(root / "images") else root
    mappings = next((place / "mappings" for place in (root, root.parent) if os.path.isdir(place / "mappings")), root / "mappings")
    label_of: dict[str, str] = _mapping(mappings / "folder_to_objectnet_label.json")
    names_of: dict[str, str] = _mapping(mappings / "objectnet_to_imagenet_1k.json")
    line_of: dict[str, int] = _mapping(mappings / "pytorch_to_imagenet_2012_id.json")
    lines = mappings / "imagenet_to_label_2012_v2"
    if not os.path.isfile(lines):
        raise ValueError(f"{lines} is missing: ObjectNet's archive has it beside its images")
    known = [line.strip() for line in read_lines(lines)]
    try:
        output_of = {known[int(line)]: int(output) for output, line in line_of.items()}
        shared = sorted(folder for folder, label in label_of.items() if label in names_of)
        outputs = [[output_of[name.strip()] for name in names_of[label_of[folder]].split(";")] for folder in shared]
        if not all(0 <= output < 1000 for output in output_of.values()):
            raise ValueError("an output beside 0 .. 999")
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise ValueError(f"{mappings} does not fit together: {error!r} is in one of its files and not in another") from error
    there = [folder for folder in subfolders(images) if folder != "mappings"]
    unknown = [folder for folder in there if folder not in label_of]
    if unknown:
        raise ValueError(f"{images / unknown[0]} is not a class of {mappings / 'folder_to_objectnet_label.json'}")
    numbers = {folder: label for label, folder in enumerate(shared)}
    names, labels = class_files(images, [(folder, numbers[folder]) for folder in there if folder in numbers])
    if not names:
        raise ValueError(f"{images} has no folder of the {len(shared)} classes that ImageNet has too, such as {', '.join(shared[:3])}")
    classes = [label_of[folder] for folder in shared]
    data = ImageFiles(images, names, ["objectnet"] * len(names), labels, classes, [first for first, *_ in outputs], border=2)
    data.further = tuple((output, label) for label, (_, *others) in enumerate(outputs) for output in others)
    return data


def _mapping(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(read_text(path))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: ObjectNet's archive has mappings/ beside images/") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(value, (str, int)) for value in found.values()):
        raise ValueError(f"{path} is not a mapping of names to names or numbers; get it again from ObjectNet's archive")
    return found


def _numbered(root: Path, folders: Sequence[str], numbers: dict[str, int], name: str) -> list[tuple[str, int]]:
    """Returns (folder, label) pairs for wnid folders."""
    if not folders:
        raise ValueError(f"{root} has no class folders; {name} is folders of images named by wnid, such as {next(iter(numbers))}")
    wrong = [folder for folder in folders if folder not in numbers]
    if wrong:
        such = f"its {len(numbers)} are wnids, such as {next(iter(numbers))}"
        raise ValueError(f"{root / wrong[0]} is not a class of {name}: {such}; give the folder that holds them, or move this one away")
    return [(folder, numbers[folder]) for folder in folders]
