"""The image data sets of `dtta evaluate`, by name."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dtta_fast.data.base import Images, Maps

__all__ = ["Images", "Maps", "holds_maps", "open_images", "subsample"]


@dataclass(frozen=True)
class _Asked:
    """The arguments of `open_images`, validated for the data set."""

    name: str
    root: Path
    corruptions: Sequence[str]
    severities: Sequence[int]
    split: str
    size: int


@dataclass(frozen=True)
class _Reader:
    """How to open a data set, and which arguments it takes."""

    open: Callable[[_Asked], Images | Maps]
    needs: str = "the folder that holds it"
    corrupted: bool = False
    splits: tuple[str, ...] = ()  # the first is the default; "": the data set itself defines its splits
    maps: bool = False


def _readers() -> dict[str, _Reader]:
    from dtta_fast.data import arrays, driving, folder, imagenet, lists, maps, shards, wilds

    found = {
        "imagenet": _Reader(lambda a: imagenet.open_imagenet(a.root)),
        "imagenet-c": _Reader(lambda a: imagenet.open_imagenet_c(a.root, a.corruptions, a.severities), corrupted=True),
        "imagenet-v2": _Reader(lambda a: imagenet.open_imagenet_v2(a.root)),
        "objectnet": _Reader(lambda a: imagenet.open_objectnet(a.root)),
        "folder": _Reader(lambda a: folder.open_folder(a.root)),
        "digits": _Reader(lambda a: arrays.open_digits(a.split), needs="", splits=("test", "validation", "train")),
        "digits-c": _Reader(
            lambda a: arrays.DigitsC(a.split, a.corruptions, a.severities),
            needs="",
            corrupted=True,
            splits=("test", "validation", "train"),
        ),
        "hf": _Reader(
            lambda a: arrays.open_hugging_face(str(a.root), a.split),
            needs="an id of the hub or a folder",
            splits=("",),
        ),
        "webdataset": _Reader(lambda a: shards.open_webdataset(a.root), needs="a tar file, a folder of them, or a pattern of their names"),
        "ade20k": _Reader(lambda a: maps.Ade20k(a.root, a.split, a.size), splits=("validation", "training"), maps=True),
        "ade20k-c": _Reader(lambda a: maps.Ade20kC(a.root, a.corruptions, a.severities, a.size), corrupted=True, maps=True),
        "cityscapes": _Reader(lambda a: driving.open_cityscapes(a.root, a.split, a.size), splits=("val", "train"), maps=True),
        "acdc": _Reader(
            lambda a: driving.open_acdc(a.root, a.corruptions, a.severities, a.split, a.size),
            corrupted=True,
            splits=("val", "train"),
            maps=True,
        ),
        "coop": _Reader(lambda a: lists.open_coop(a.root, a.split), splits=("test", "val", "train")),
        "wilds": _Reader(lambda a: wilds.open_wilds(a.root, a.split), splits=wilds.SPLITS),
        "image-list": _Reader(lambda a: lists.open_image_list(a.root), needs="a text file, or a folder of them"),
        "nyuv2": _Reader(lambda a: maps.NyuV2(a.root, a.split, a.size), splits=("test", "train"), maps=True),
        "map-folder": _Reader(lambda a: maps.open_map_folder(a.root, a.size), maps=True),
    }
    wnids = _Reader(lambda a: imagenet.open_wnid_folders(a.root, a.name))
    cifar_c = _Reader(lambda a: arrays.CifarC(a.name, a.root, a.corruptions, a.severities), corrupted=True)
    found |= dict.fromkeys(imagenet.FOLDERS, wnids) | dict.fromkeys(arrays.CIFAR_C, cifar_c)
    for name, splits in arrays.TORCHVISION.items():
        found[name] = _Reader(lambda a: arrays.open_torchvision(a.name, a.root, a.split), splits=splits)
    return dict(sorted(found.items()))


def open_images(
    name: str,
    root: Path | None,
    *,
    corruptions: Sequence[str] = (),
    severities: Sequence[int] = (),
    split: str | None = None,
    size: int | None = None,
) -> Images | Maps:
    """Opens a data set by name.

    Args:
        name: name of the data set or of its layout, such as "imagenet-c" or "folder"; an unknown name raises an error that lists all names.
        root: location of the data: a folder; for "webdataset" also a tar file or a pattern; for "hf" also a Hub id; None for the digits.
        corruptions, severities: selection for a corrupted data set. By default all that are present; for "digits-c", its own defaults.
        split: for data sets with splits; by default the test split, or else the validation split.
        size: for data sets with maps, which require it: side length in pixels of the square that images and maps are resized and cropped
            to.

    Raises:
        ValueError: the name is unknown, an argument is missing or does not apply, or the files do not match the data set's layout; the
            message says what is there. ImportError: a library is missing; the message names the extra to install.
    """
    readers, reader = _readers(), _reader(name)
    if root is None and reader.needs:
        raise ValueError(f"root is missing: {name} needs {reader.needs}")
    if root is not None and not reader.needs:
        raise ValueError(f"root is {str(root)!r}; {name} is generated and reads no files: leave it out, or read your images with 'folder'")
    for argument, values in (("corruptions", corruptions), ("severities", severities)):
        if values and not reader.corrupted:
            corrupted = ", ".join(other for other in readers if readers[other].corrupted)
            raise ValueError(f"{argument} is {list(values)}, which {name} does not have; the corrupted sets are {corrupted}")
        if len(set(values)) < len(values):
            raise ValueError(f"{argument} is {list(values)}; name each once")
    if split is not None and not reader.splits:
        raise ValueError(f"split is {split!r}; {name} has no splits: leave it out, and give the split's own folder as root")
    if split is not None and reader.splits != ("",) and split not in reader.splits:
        raise ValueError(f"split is {split!r}; {name} has {', '.join(reader.splits)}")
    if reader.maps and (size is None or size < 1):
        raise ValueError(f"{name} is a set of images with maps, and size is {size}: give the pixels that a side is resized to")
    if size is not None and not reader.maps:
        raise ValueError(f"{name} is a set of images without maps, of their own sizes, and size is {size}: leave it out")
    chosen = split or (reader.splits[0] if reader.splits else "")
    return reader.open(_Asked(name, root or Path(), tuple(corruptions), tuple(severities), chosen, size or 0))


def holds_maps(name: str) -> bool:
    """Returns whether the data set of this name holds images with maps rather than classes.

    Raises:
        ValueError: the name is unknown.
    """
    return _reader(name).maps


def _reader(name: str) -> _Reader:
    readers = _readers()
    if name not in readers:
        raise ValueError(f"name is {name!r}; choose one of {', '.join(readers)}")
    return readers[name]


def subsample(data: Images | Maps, per_class: int, seed: int, among: Sequence[int] | None = None) -> list[int]:
    """Selects `per_class` images of each class and group, or of each group if there are no labels, and returns their sorted indices.

    among: the indices to select from; all by default.

    If there are fewer images, all are selected. The selection depends on the images' names without corruption and severity, so every
    corruption gets the same images.

    Raises:
        ValueError: per_class is below 1.
    """
    if per_class < 1:
        raise ValueError(f"per_class is {per_class}; give 1 or more")
    labels = getattr(data, "labels", None)
    parts: dict[tuple[str, int | None], list[tuple[bytes, int]]] = defaultdict(list)
    for i in range(len(data)) if among is None else among:
        group = data.groups[i]
        shown = f"{seed}/{uncorrupted(data.names[i], group)}"
        rank = hashlib.blake2b(shown.encode("utf-8", "surrogateescape"), digest_size=8).digest()
        parts[group, None if labels is None else int(labels[i])].append((rank, i))
    return sorted(i for part in parts.values() for _, i in sorted(part)[:per_class])


def corruption_of(name: str, group: str) -> str | None:
    """Returns the corruption in a group such as fog3, going by the name of one of its images; None for a group without a severity."""
    return group[:-1] if group[-1:].isdigit() and uncorrupted(name, group) != name else None


def uncorrupted(name: str, group: str) -> str:
    """Strips corruption and severity from a name.

    In the group gaussian_noise5, gaussian_noise/5/n01440764/1.JPEG becomes n01440764/1.JPEG, also within noise/.
    """
    prefix = f"/{group[:-1]}/{group[-1:]}"
    for mark in "/#":
        _, found, rest = f"/{name}".partition(prefix + mark)
        if found:
            return rest
    return name
