"""Images stored in arrays or tables: CIFAR-C's .npy files, torchvision's data sets, the digits, and Hugging Face's `datasets`."""

from __future__ import annotations

import io
import json
import os
import sys
import tokenize
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtta_fast.data.base import Images, chosen_corruptions
from dtta_fast.data.corruptions import DIGITS_C, corrupt
from dtta_fast.data.digits import DIGITS, load_digits
from dtta_fast.data.folder import ImageFiles
from dtta_fast.runtime.defaults import float32_on_cpu
from dtta_fast.runtime.files import open_plain, read_text
from dtta_fast.runtime.pictures import check_size, read_pixels

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR100 = tuple(
    """apple,aquarium fish,baby,bear,beaver,bed,bee,beetle,bicycle,bottle,bowl,boy,bridge,bus,butterfly,camel,can,castle,caterpillar,cattle,
    chair,chimpanzee,clock,cloud,cockroach,couch,crab,crocodile,cup,dinosaur,dolphin,elephant,flatfish,forest,fox,girl,hamster,house,kangaroo,
    keyboard,lamp,lawn mower,leopard,lion,lizard,lobster,man,maple tree,motorcycle,mountain,mouse,mushroom,oak tree,orange,orchid,otter,
    palm tree,pear,pickup truck,pine tree,plain,plate,poppy,porcupine,possum,rabbit,raccoon,ray,road,rocket,rose,sea,seal,shark,shrew,skunk,
    skyscraper,snail,snake,spider,squirrel,streetcar,sunflower,sweet pepper,table,tank,telephone,television,tiger,tractor,train,trout,tulip,
    turtle,wardrobe,whale,willow tree,wolf,woman,worm""".replace("\n    ", "").split(",")
)
CIFAR_C = {"cifar10-c": ("CIFAR-10-C", CIFAR10), "cifar100-c": ("CIFAR-100-C", CIFAR100)}
# name -> splits, with the default first
TORCHVISION = {
    "cifar10": ("test", "train"),
    "cifar100": ("test", "train"),
    "fashion-mnist": ("test", "train"),
    "food101": ("test", "train"),
    "aircraft": ("test", "val", "train", "trainval"),
    "pets": ("test", "trainval"),
    "flowers102": ("test", "val", "train"),
    "dtd": ("test", "val", "train"),
    "cars": ("test", "train"),
}


class CifarC(Images):
    """CIFAR-10-C or CIFAR-100-C: CORRUPTION.npy, uint8 [5 n, H, W, 3] from severity 1 up, and labels.npy, in root or root/CIFAR-10-C.

    Raises:
        ValueError: a file, corruption or severity is missing, or an array has the wrong dtype or shape; the message names the file.
    """

    def __init__(self, name: str, root: Path, corruptions: Sequence[str] = (), severities: Sequence[int] = ()) -> None:
        folder, self.classes = CIFAR_C[name]
        self._root = root / folder if os.path.isdir(root / folder) else root
        self._arrays: dict[str, NDArray[np.uint8]] = {}
        path = self._root / "labels.npy"
        truth = _load_array(path)
        if truth.ndim != 1 or not np.issubdtype(truth.dtype, np.integer):
            raise ValueError(f"{path} is {truth.dtype} of shape {list(truth.shape)}; labels are one whole number an image")
        if len(truth) and (truth.min() < 0 or truth.max() >= len(self.classes)):
            raise ValueError(f"{path} has labels {truth.min()} .. {truth.max()}; {name} has 0 .. {len(self.classes) - 1}")
        there = {file.stem: {1, 2, 3, 4, 5} for file in self._root.glob("*.npy") if file.name != "labels.npy" and file.name[0] != "."}
        self.names, self.groups = [], []
        self._rows: list[tuple[str, int]] = []
        labels: list[int] = []
        for corruption, severity in chosen_corruptions(there, corruptions, severities, self._root):
            images = self._array(corruption)
            each = len(images) // 5
            if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or len(images) != 5 * each or not each:
                form = f"{images.dtype} of shape {list(images.shape)}"
                raise ValueError(f"{self._root / corruption}.npy is {form}; it has 5 equal parts of uint8 [n, H, W, 3]")
            check_size(images.shape[2], images.shape[1], f"an image of {self._root / corruption}.npy ")
            if len(truth) not in (each, len(images)):
                raise ValueError(f"{path} has {len(truth)} labels for the {len(images)} images of {corruption}.npy")
            first = each * (severity - 1)
            self._rows += [(corruption, first + i) for i in range(each)]
            self.names += [f"{corruption}/{severity}#{i}" for i in range(each)]
            self.groups += [f"{corruption}{severity}"] * each
            labels += truth[first : first + each].tolist() if len(truth) == len(images) else truth.tolist()
        self.labels = labels

    def _array(self, corruption: str) -> NDArray[np.uint8]:
        if corruption not in self._arrays:
            self._arrays[corruption] = _load_array(self._root / f"{corruption}.npy")
        return self._arrays[corruption]

    def read(self, index: int) -> Tensor:
        corruption, row = self._rows[index]
        return torch.from_numpy(np.array(self._array(corruption)[row])).permute(2, 0, 1).contiguous()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_arrays": {}}  # a memory-mapped array would be pickled in full


def _load_array(path: Path) -> NDArray[Any]:
    try:
        open_plain(path, sys.maxsize).close()
        found: Any = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(found, np.ndarray):  # an archive, despite its name
            raise ValueError("it is an archive of arrays")
        if not found.ndim:
            raise ValueError("it is a single number")
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: give the folder of CORRUPTION.npy files and labels.npy") from error
    # numpy parses the header as a Python literal and archives with zipfile, and does not catch their errors
    except (OSError, ValueError, TypeError, EOFError, OverflowError, tokenize.TokenError, zipfile.BadZipFile, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as an array: {error}") from error
    return found


class ImageArray(Images):
    """Images in memory: uint8 [N, 3, H, W]."""

    def __init__(
        self, images: Tensor, names: Sequence[str], groups: Sequence[str], labels: Sequence[int] | None, classes: tuple[str, ...]
    ) -> None:
        self._images = images
        self.names, self.groups, self.labels, self.classes = names, groups, labels, classes

    def read(self, index: int) -> Tensor:
        return self._images[index].clone()


def open_digits(split: str) -> ImageArray:
    """Opens scikit-learn's digits at 32x32.

    Raises:
        ImportError: scikit-learn is missing (extra `demo`).
    """
    images, labels = load_digits(split)  # type: ignore[arg-type]
    names = [f"{split}#{i}" for i in range(len(images))]
    return ImageArray((images * 255).round().byte(), names, ["digits"] * len(images), labels.tolist(), DIGITS)


class DigitsC(Images):
    """The corrupted digits, generated when read. By default, the corruptions and severities of DIGITS_C.

    Raises:
        ValueError: a corruption or severity is unknown. ImportError: scikit-learn or imagecorruptions-imaug is missing (extra `demo`).
    """

    classes = DIGITS

    def __init__(self, split: str, corruptions: Sequence[str] = (), severities: Sequence[int] = ()) -> None:
        self._clean, labels = load_digits(split)  # type: ignore[arg-type]
        unset = [name for name in corruptions if name not in DIGITS_C]
        if unset and not severities:
            known = ", ".join(DIGITS_C)
            raise ValueError(f"corruptions has {unset[0]!r}, for which no severity is set: give severities, or choose of {known}")
        self._pairs = [(name, severity) for name in corruptions or DIGITS_C for severity in severities or [DIGITS_C[name]]]
        for name, severity in self._pairs:
            corrupt(self._clean[:1], name, severity)  # raises for unknown ones
        digits = range(len(self._clean))
        self.names = [f"{name}/{severity}#{i}" for name, severity in self._pairs for i in digits]
        self.groups = [f"{name}{severity}" for name, severity in self._pairs for _ in digits]
        self.labels = labels.tolist() * len(self._pairs)

    def read(self, index: int) -> Tensor:
        which, i = divmod(index, len(self._clean))
        return (corrupt(self._clean[i : i + 1], *self._pairs[which], first_id=i)[0] * 255).round().byte()


def open_torchvision(name: str, root: Path, split: str) -> Images:
    """Opens one of torchvision's data sets, in the layout that torchvision unpacks below root. Nothing is downloaded.

    Raises:
        ValueError: a file is missing or damaged; the message names it. ImportError: scipy is missing (extra `data`).
    """
    from torchvision import datasets

    cifar = ("batches.meta", "test_batch", *(f"data_batch_{i}" for i in range(1, 6)))
    kinds: dict[str, tuple[Any, tuple[str, ...]]] = {
        "cifar10": (datasets.CIFAR10, tuple(f"cifar-10-batches-py/{file}" for file in cifar)),
        "cifar100": (datasets.CIFAR100, tuple(f"cifar-100-python/{file}" for file in ("meta", "test", "train"))),
        "fashion-mnist": (
            datasets.FashionMNIST,
            tuple(f"FashionMNIST/raw/{part}-{kind}-ubyte" for part in ("t10k", "train") for kind in ("images-idx3", "labels-idx1")),
        ),
        "food101": (datasets.Food101, (f"food-101/meta/{split}.json", "food-101/images")),
        "aircraft": (
            datasets.FGVCAircraft,
            tuple(f"fgvc-aircraft-2013b/data/{file}" for file in ("variants.txt", f"images_variant_{split}.txt", "images")),
        ),
        "pets": (datasets.OxfordIIITPet, (f"oxford-iiit-pet/annotations/{split}.txt", "oxford-iiit-pet/images")),
        "dtd": (datasets.DTD, (f"dtd/dtd/labels/{split}1.txt", "dtd/dtd/images")),
        "cars": (
            datasets.StanfordCars,
            (
                "stanford_cars/devkit/cars_meta.mat",
                "stanford_cars/" + ("devkit/cars_train_annos.mat" if split == "train" else "cars_test_annos_withlabels.mat"),
                f"stanford_cars/cars_{split}",
            ),
        ),
        "flowers102": (datasets.Flowers102, tuple(f"flowers-102/{file}" for file in ("setid.mat", "imagelabels.mat", "jpg"))),
    }
    kind, files = kinds[name]
    missing = [str(root / file) for file in files if not os.path.exists(root / file)]
    if missing:
        raise ValueError(f"{missing[0]} is missing; {name} is torchvision's {kind.__name__}: its download=True writes this below root")
    arrays = name in ("cifar10", "cifar100", "fashion-mnist")
    try:
        with float32_on_cpu():
            found = kind(root, train=split == "train", download=False) if arrays else kind(root, split=split, download=False)
    except ModuleNotFoundError as error:
        raise ImportError(f"{name} needs scipy: pip install 'dtta-fast[data]'") from error
    except Exception as error:  # torchvision's parsers raise many types for damaged files
        raise ValueError(f"{root / files[0]} and what is beside it cannot be read: {type(error).__name__}: {error}") from error
    classes = tuple(str(word).replace("_", " ") for word in found.classes)
    if arrays:
        pixels = torch.from_numpy(np.asarray(found.data))
        images = pixels[:, None].repeat(1, 3, 1, 1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
        names = [f"{split}#{i}" for i in range(len(images))]
        return ImageArray(images, names, [name] * len(names), np.asarray(found.targets).tolist(), classes)
    # torchvision has no public attributes for the paths and labels: its items are already decoded by its own reader
    samples = found._samples if name == "cars" else None
    paths = found._images if name == "pets" else [path for path, _ in samples] if samples else found._image_files
    labels = [label for _, label in samples] if samples else found._labels
    outside = [path for path in map(str, paths) if not _within(path, root)]  # the lists could name any file on this machine
    if outside:
        raise ValueError(f"{root / files[0]} names {outside[0]}, which lies outside of {root}: get the set again")
    names = [Path(path).relative_to(root).as_posix() for path in paths]
    return ImageFiles(root, names, [name] * len(names), [int(label) for label in labels], classes)


def _within(path: str, folder: str | Path) -> bool:
    """Returns whether a path is inside a folder, judged by its name only: links in the folder are up to its owner."""
    place, above = os.path.abspath(path), os.path.abspath(folder)
    return os.path.commonpath([place, above]) == above


class HuggingFace(Images):
    """A split from Hugging Face's `datasets`: its first image column, and its first class-label column if there is one.

    Raises:
        ValueError: there is no image column or no row, or a label is out of the classes' range.
    """

    def __init__(self, data: Any, split: str, image: str, label: str | None, root: str) -> None:
        from datasets import Image, config
        from huggingface_hub.constants import HF_HUB_CACHE

        kept = (config.HF_CACHE_HOME, config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, config.EXTRACTED_DATASETS_PATH)
        named = [str(place) for place in (root, *kept, HF_HUB_CACHE)]
        self._folders = [*named, *map(os.path.realpath, named)]  # datasets resolves links in the root
        self._data, self._image = data.select_columns([image]).cast_column(image, Image(decode=False)), image
        self.names, self.groups = [f"{split}#{i}" for i in range(len(data))], ["hf"] * len(data)
        if label is not None:
            self.classes, labels = tuple(data.features[label].names), list(data[label])
            wrong = [value for value in labels if value is None or not 0 <= value < len(self.classes)]
            if wrong and (len(wrong) < len(labels) or set(wrong) - {None, -1}):  # all -1: a test split whose labels are withheld
                raise ValueError(f"the column {label!r} of {split} has {wrong[0]}; its classes are 0 .. {len(self.classes) - 1}")
            self.labels = None if wrong else labels

    def read(self, index: int) -> Tensor:
        name, row = self.names[index], self._data[index][self._image]
        if row is None or (row["bytes"] is None and row["path"] is None):
            raise ValueError(f"{name} has no image in the column {self._image!r}")
        if row["bytes"] is None:
            if not any(_within(row["path"], folder) for folder in self._folders):  # a table could name any file on this machine
                raise ValueError(f"{name} names {row['path']}, which lies outside of {self._folders[0]} and the hub's cache: move it there")
            return read_pixels(Path(row["path"]), f"{name}, {row['path']}")
        return read_pixels(io.BytesIO(row["bytes"]), name)


def _from_disk(folder: Path) -> Any:
    """Loads a data set written by save_to_disk, reading only from its own folder.

    Raises:
        ValueError: a list of files or splits names another folder. The library raises many other types.
    """
    from datasets import load_from_disk

    splits = [folder]
    if os.path.isfile(listed := folder / "dataset_dict.json"):
        splits = [folder / _plain_name(split, listed) for split in json.loads(read_text(listed))["splits"]]
    for place in splits:
        for file in json.loads(read_text(place / "state.json"))["_data_files"]:
            open_plain(place / _plain_name(file["filename"], place / "state.json"), sys.maxsize).close()
    return load_from_disk(str(folder))


def _plain_name(name: Any, listed: Path) -> str:
    if not isinstance(name, str) or name in ("", ".", "..") or any(mark in name for mark in "/\\:\0"):
        raise ValueError(f"{listed} names {str(name)[:80]!r}, which is not a name in its folder")
    return name


def _built(root: str) -> Any:
    """Loads a folder of files or a Hub data set, reading only from there: a README's data_files could name any file on this machine.

    Raises:
        ValueError: data_files names files elsewhere. The library raises many other types.
    """
    from datasets import load_dataset_builder

    builder = load_dataset_builder(root)
    named = [str(file) for files in (builder.config.data_files or {}).values() for file in files]
    places = {os.path.abspath(root), os.path.realpath(root)} if os.path.isdir(root) else set()
    outside = [file for file in named if not (any(_within(file, place) for place in places) if places else file.startswith("hf://"))]
    if outside:
        raise ValueError(f"its data_files name {outside[0]}, which lies outside of it")
    builder.download_and_prepare()
    return builder.as_dataset()


def open_hugging_face(root: str, split: str) -> HuggingFace:
    """Opens a folder written by save_to_disk, a folder of images, or a Hub id.

    The default split is test, or else validation, or else the only split.

    Raises:
        ValueError: the data set cannot be opened, the split is missing, or as for `HuggingFace`. ImportError: `datasets` is missing (extra
            `datasets`).
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("hf needs Hugging Face's datasets: pip install 'dtta-fast[datasets]'") from error
    folder = Path(root)
    try:
        saved = any(os.path.isfile(folder / name) for name in ("dataset_dict.json", "state.json"))
        found = _from_disk(folder) if saved else _built(root)
    except Exception as error:  # errors of the Hub, the network, or third-party scripts
        raise ValueError(f"{root!r} cannot be opened as a data set: {error}; give an id of the hub or a folder") from error
    if isinstance(found, datasets.Dataset):
        found = datasets.DatasetDict({str(found.split or "data"): found})
    wanted = split or next((name for name in ("test", "validation", *found) if name in found and (name != "train" or len(found) == 1)), "")
    if wanted not in found:
        raise ValueError(f"split is {wanted!r}; {root} has {', '.join(found)}")
    features = found[wanted].features
    image = next((column for column, kind in features.items() if isinstance(kind, datasets.Image)), None)
    label = next((column for column, kind in features.items() if isinstance(kind, datasets.ClassLabel)), None)
    if image is None or not len(found[wanted]):
        lack = "rows" if image else f"column of images, only {', '.join(features)}"
        raise ValueError(f"{root}, {wanted}, has no {lack}")
    return HuggingFace(found[wanted], wanted, image, label, root)
