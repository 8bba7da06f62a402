"""Sets of images for `dtta evaluate`: what a reader gives, and how one is opened by its name."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from dtta_fast.data.maps import Maps


class Images(Dataset[Tensor], ABC):
    """Items are images, uint8 [3, H, W], each of its own size.

    names: of each image, unique: its path relative to the root, with slashes, or file#number, or shard/key.
    groups: of each image: corruption and severity, such as "gaussian_noise5", else one name for all.
    labels: class number of each image, an index into `classes` where there are names; None where the images are not labelled.
    classes: names for people; () where there are none.
    outputs: for sets of fewer classes than the 1000 of ImageNet: which of a model's 1000 outputs each class is. None: class k is output k.
    further: (output, class) pairs, the outputs beside `outputs` that mean a class too: ObjectNet's bicycle is two classes of ImageNet.

    Readers pickle without open files, for the workers of a DataLoader.
    """

    names: Sequence[str]
    groups: Sequence[str]
    labels: Sequence[int] | None = None
    classes: tuple[str, ...] = ()
    outputs: tuple[int, ...] | None = None
    further: tuple[tuple[int, int], ...] = ()

    @abstractmethod
    def read(self, index: int) -> Tensor:
        """Image `index` as uint8 [3, H, W]: turned as its EXIF says; grey, palette and CMYK as RGB, alpha dropped.

        Raises:
            ValueError: the file is missing, truncated, no image, or has too many pixels; the message names it.
        """

    def __getitem__(self, index: int) -> Tensor:
        return self.read(index)

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class _Asked:
    """The arguments of `open_images`, checked for the set they are for."""

    name: str
    root: Path
    corruptions: Sequence[str]
    severities: Sequence[int]
    split: str
    size: int


@dataclass(frozen=True)
class _Reader:
    """How a set is opened, and which arguments it takes."""

    open: Callable[[_Asked], Images | Maps]
    needs: str = "the folder that holds it"
    corrupted: bool = False
    splits: tuple[str, ...] = ()  # the first is the default; "": the set says itself what there is
    maps: bool = False


def _readers() -> dict[str, _Reader]:
    from dtta_fast.data import arrays, folder, imagenet, maps, shards

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
    """The data set of this name.

    Args:
        name: of the set or of its layout, such as "imagenet-c" or "folder"; a wrong one lists them all.
        root: where it lies: a folder, for "webdataset" also a tar file or a pattern, for "hf" also an id of the hub; None for the digits.
        corruptions, severities: of a corrupted set; all that are there where they are left out, for "digits-c" its own.
        split: for the sets that have splits; the test split, else the validation split, where it is left out.
        size: of sets of maps alone, which need it: pixels of the square that images and maps are resized and cropped to.

    Raises:
        ValueError: an unknown name, an argument that the set lacks or does not take, or files that are not as the set's are; the message
            says what is there. ImportError: a library is missing; the message names the extra to install.
    """
    readers, reader = _readers(), _reader(name)
    if root is None and reader.needs:
        raise ValueError(f"root is missing: {name} needs {reader.needs}")
    if root is not None and not reader.needs:
        raise ValueError(f"root is {str(root)!r}; {name} is made, not read: leave it out")
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
    """Whether the set of this name holds images with maps, and not with classes.

    Raises:
        ValueError: an unknown name.
    """
    return _reader(name).maps


def _reader(name: str) -> _Reader:
    readers = _readers()
    if name not in readers:
        raise ValueError(f"name is {name!r}; choose one of {', '.join(readers)}")
    return readers[name]


def subsample(data: Images | Maps, per_class: int, seed: int) -> list[int]:
    """Indices, in order, of `per_class` images of each class and group, or of each group where there are no labels; all where it has fewer.

    An image is chosen by its name without corruption and severity, so that every corruption has the same images.

    Raises:
        ValueError: per_class below 1.
    """
    if per_class < 1:
        raise ValueError(f"per_class is {per_class}; give 1 and more")
    labels = getattr(data, "labels", None)
    parts: dict[tuple[str, int | None], list[tuple[bytes, int]]] = defaultdict(list)
    for i, (name, group) in enumerate(zip(data.names, data.groups, strict=True)):
        shown = f"{seed}/{_uncorrupted(name, group)}"
        rank = hashlib.blake2b(shown.encode("utf-8", "surrogateescape"), digest_size=8).digest()
        parts[group, None if labels is None else int(labels[i])].append((rank, i))
    return sorted(i for part in parts.values() for _, i in sorted(part)[:per_class])


def _uncorrupted(name: str, group: str) -> str:
    """gaussian_noise/5/n01440764/1.JPEG of the group gaussian_noise5, also within noise/, as n01440764/1.JPEG."""
    prefix = f"/{group[:-1]}/{group[-1:]}"
    for mark in "/#":
        _, found, rest = f"/{name}".partition(prefix + mark)
        if found:
            return rest
    return name


def chosen_corruptions(
    there: dict[str, set[int]], corruptions: Sequence[str], severities: Sequence[int], where: Path
) -> list[tuple[str, int]]:
    """Pairs of a corruption and a severity that are asked for, by what is there; all where nothing is asked for.

    Raises:
        ValueError: nothing is there, or less than is asked for.
    """
    if not there:
        raise ValueError(f"{where} holds no corruption, such as gaussian_noise; give the folder that does")
    pairs = []
    for corruption in corruptions or sorted(there):
        if corruption not in there:
            raise ValueError(f"corruptions has {corruption!r}, which is not in {where}; there are {', '.join(sorted(there))}")
        for severity in severities or sorted(there[corruption]):
            if severity not in there[corruption]:
                some = ", ".join(map(str, sorted(there[corruption])))
                raise ValueError(f"severities has {severity!r}, which {corruption} in {where} does not have; there are {some}")
            pairs.append((corruption, severity))
    return pairs
