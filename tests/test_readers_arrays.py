"""Readers of arrays, tables and tar shards on small files of the real layouts."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets as tv
from PIL import Image

from dtta_fast.data.corruptions import DIGITS_C, corrupt
from dtta_fast.data.digits import load_digits
from dtta_fast.data.images import open_images, subsample


def _encoded(value: int, size: tuple[int, int] = (4, 3), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(buffer, kind)
    return buffer.getvalue()


def _write(path: Path, data: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


# --- CIFAR-10-C


@pytest.mark.parametrize(("name", "folder"), [("cifar10-c", "CIFAR-10-C"), ("cifar100-c", "CIFAR-100-C"), ("cifar10-c", "")])
def test_cifar_c_severities_are_fifths(tmp_path, name, folder):
    pixels = {kind: np.random.default_rng(seed).integers(0, 256, (50, 32, 32, 3), np.uint8) for seed, kind in enumerate(("fog", "snow"))}
    (tmp_path / folder).mkdir(exist_ok=True)
    for kind, array in pixels.items():
        np.save(tmp_path / folder / f"{kind}.npy", array)
    np.save(tmp_path / folder / "labels.npy", np.tile(np.arange(10), 5))
    data = open_images(name, tmp_path, severities=[5, 2])
    assert data.groups == ["fog5"] * 10 + ["fog2"] * 10 + ["snow5"] * 10 + ["snow2"] * 10
    assert data.labels == [*range(10)] * 4
    assert len(data.classes) == (10 if name == "cifar10-c" else 100)
    assert data.names[13] == "fog/2#3"
    assert len(set(data.names)) == 40
    whole = len(pickle.dumps(data))
    for found in (data, pickle.loads(pickle.dumps(data))):
        assert torch.equal(found[13], torch.from_numpy(pixels["fog"][13]).permute(2, 0, 1))
        assert torch.equal(found[29], torch.from_numpy(pixels["snow"][49]).permute(2, 0, 1))
    assert len(pickle.dumps(data)) == whole < 50 * 32 * 32 * 3  # no array travels with it
    assert len({data.names[i].split("#")[1] for i in subsample(data, 1, 0)}) == 10
    assert len(open_images(name, tmp_path)) == 100
    with pytest.raises(ValueError, match=r"corruptions has 'frost', which is not in .*; there are fog, snow"):
        open_images(name, tmp_path, corruptions=["frost"])
    with pytest.raises(ValueError, match=r"severities has 6, which fog in .*; there are 1, 2, 3, 4, 5"):
        open_images(name, tmp_path, severities=[6])


def test_cifar_c_files_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match=r"labels.npy is missing: give the folder of CORRUPTION.npy"):
        open_images("cifar10-c", tmp_path)
    np.save(tmp_path / "labels.npy", np.arange(10))
    with pytest.raises(ValueError, match="holds no corruption"):
        open_images("cifar10-c", tmp_path)
    np.save(tmp_path / "fog.npy", np.zeros((50, 4, 4, 3), np.uint8))
    assert open_images("cifar10-c", tmp_path, severities=[3]).labels == [*range(10)]  # labels of one severity serve all
    for wrong in (np.zeros((49, 4, 4, 3), np.uint8), np.zeros((50, 4, 4, 3), np.float32), np.zeros((50, 3, 4, 4), np.uint8)):
        np.save(tmp_path / "fog.npy", wrong)
        with pytest.raises(ValueError, match=r"fog.npy is .*; it has 5 equal parts of uint8"):
            open_images("cifar10-c", tmp_path)
    np.save(tmp_path / "fog.npy", np.zeros((60, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match=r"labels.npy has 10 labels for the 60 images of fog.npy"):
        open_images("cifar10-c", tmp_path)
    (tmp_path / "fog.npy").write_bytes(b"\x93NUMPY cut")
    with pytest.raises(ValueError, match=r"fog.npy cannot be read as an array"):
        open_images("cifar10-c", tmp_path)
    np.save(tmp_path / "labels.npy", np.arange(11))
    with pytest.raises(ValueError, match=r"labels 0 .. 10; cifar10-c has 0 .. 9"):
        open_images("cifar10-c", tmp_path)


# --- torchvision's files


def _present(path, md5=None):
    return Path(path).is_file()


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(tmp_path, monkeypatch, name):
    monkeypatch.setattr(tv.cifar, "check_integrity", _present)  # ours are no files of 10,000 images
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3072), np.uint8)
    with pytest.raises(
        ValueError, match=f"{'batches.meta' if name == 'cifar10' else 'meta'} is missing; {name} is torchvision's {name.upper()}"
    ):
        open_images(name, tmp_path)
    if name == "cifar10":
        folder, parts, key, meta = "cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], "labels", "batches.meta"
        names = {"label_names": ["airplane", "automobile", "bird"]}
    else:
        folder, parts, key, meta = "cifar-100-python", ["train"], "fine_labels", "meta"
        names = {"fine_label_names": ["apple", "aquarium_fish", "baby"]}
    for part in [*parts, "test" if name == "cifar100" else "test_batch"]:
        _write(tmp_path / folder / part, pickle.dumps({"data": pixels, key: [2, 0, 1]}))
    _write(tmp_path / folder / meta, pickle.dumps(names))
    data = open_images(name, tmp_path)
    assert torch.equal(data[1], torch.from_numpy(pixels[1].reshape(3, 32, 32)))
    assert (data.labels, data.names) == ([2, 0, 1], ["test#0", "test#1", "test#2"])
    assert data.classes[1] in ("automobile", "aquarium fish")
    assert len(open_images(name, tmp_path, split="train")) == 3 * len(parts)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="cannot be read: RuntimeError: Dataset not found or corrupted"):
        open_images(name, tmp_path)


def test_cifar_c_has_torchvision_s_names(tmp_path):
    """The 100 are in the order of their names, which the labels follow."""
    np.save(tmp_path / "labels.npy", np.arange(5))
    np.save(tmp_path / "fog.npy", np.zeros((25, 2, 2, 3), np.uint8))
    ten, hundred = (open_images(name, tmp_path).classes for name in ("cifar10-c", "cifar100-c"))
    assert ten == ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    assert len(set(hundred)) == 100
    assert list(hundred) == sorted(hundred)
    assert (hundred[1], hundred[19], hundred[20], hundred[52], hundred[99]) == ("aquarium fish", "cattle", "chair", "oak tree", "worm")


def test_fashion_mnist(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 28, 28), np.uint8)
    raw = tmp_path / "FashionMNIST" / "raw"
    for part in ("train", "t10k"):
        for kind, array in (("images-idx3", pixels), ("labels-idx1", np.array([9, 0], np.uint8))):
            head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
            _write(raw / f"{part}-{kind}-ubyte", head + array.tobytes())
    data = open_images("fashion-mnist", tmp_path)
    assert torch.equal(data[0], torch.from_numpy(pixels[0]).expand(3, 28, 28))
    assert [data.classes[label] for label in data.labels] == ["Ankle boot", "T-shirt/top"]
    (raw / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(ValueError, match="t10k-labels-idx1-ubyte is missing"):
        open_images("fashion-mnist", tmp_path)


def test_food101(tmp_path):
    base = tmp_path / "food-101"
    _write(base / "meta" / "test.json", json.dumps({"waffles": ["waffles/1"], "apple_pie": ["apple_pie/7", "apple_pie/8"]}))
    for name in ("waffles/1", "apple_pie/7"):
        _write(base / "images" / f"{name}.jpg", _encoded(50, kind="JPEG"))
    data = open_images("food101", tmp_path)
    assert dict(zip(data.names, data.labels, strict=True)) == {
        "food-101/images/waffles/1.jpg": 1,
        "food-101/images/apple_pie/7.jpg": 0,
        "food-101/images/apple_pie/8.jpg": 0,
    }
    assert data.classes == ("apple pie", "waffles")
    assert data[0].shape == (3, 3, 4)
    with pytest.raises(ValueError, match=r"apple_pie/8.jpg cannot be read as an image"):
        data[2]
    with pytest.raises(ValueError, match=r"train.json is missing; food101 is torchvision's Food101"):
        open_images("food101", tmp_path, split="train")


def test_aircraft(tmp_path):
    base = tmp_path / "fgvc-aircraft-2013b" / "data"
    _write(base / "variants.txt", "707-320\nA300B4\n")
    _write(base / "images_variant_test.txt", "0034309 A300B4\n0034958 707-320\n")
    for number in ("0034309", "0034958"):
        _write(base / "images" / f"{number}.jpg", _encoded(50, kind="JPEG"))
    data = open_images("aircraft", tmp_path)
    assert (data.labels, data.classes) == ([1, 0], ("707-320", "A300B4"))
    assert data.names[0] == "fgvc-aircraft-2013b/data/images/0034309.jpg"
    assert data[1].shape == (3, 3, 4)
    _write(base / "images_variant_test.txt", "0034309 Concorde\n")
    with pytest.raises(ValueError, match="cannot be read: KeyError: 'Concorde'"):
        open_images("aircraft", tmp_path)


def test_pets(tmp_path):
    base = tmp_path / "oxford-iiit-pet"
    _write(base / "annotations" / "test.txt", "Abyssinian_201 1 1 1\namerican_bulldog_203 2 2 1\n")
    for name in ("Abyssinian_201", "american_bulldog_203"):
        _write(base / "images" / f"{name}.jpg", _encoded(50, kind="PNG" if name[0] == "A" else "JPEG"))  # some of theirs are no JPEG either
    data = open_images("pets", tmp_path)
    assert (data.labels, data.classes) == ([0, 1], ("Abyssinian", "American Bulldog"))
    assert [data[i].shape for i in range(2)] == [(3, 3, 4)] * 2
    with pytest.raises(ValueError, match=r"trainval.txt is missing; pets is torchvision's OxfordIIITPet"):
        open_images("pets", tmp_path, split="trainval")


def test_flowers102(tmp_path, monkeypatch):
    io_ = pytest.importorskip("scipy.io")
    monkeypatch.setattr(tv.flowers102, "check_integrity", _present)
    base = tmp_path / "flowers-102"
    for number in (1, 2, 3):
        _write(base / "jpg" / f"image_{number:05d}.jpg", _encoded(50 * number, kind="JPEG"))
    io_.savemat(base / "imagelabels.mat", {"labels": np.array([[77, 1, 102]])})
    io_.savemat(base / "setid.mat", {"tstid": np.array([[3, 1]]), "trnid": np.array([[2, 1]]), "valid": np.array([[2, 1]])})
    data = open_images("flowers102", tmp_path)
    assert data.names == ["flowers-102/jpg/image_00003.jpg", "flowers-102/jpg/image_00001.jpg"]
    assert (data.labels, len(data.classes), data.classes[0]) == ([101, 76], 102, "pink primrose")
    assert int(data[0].float().mean().round()) == 150


# --- digits


def test_digits_and_their_corruptions():
    images, labels = load_digits("validation")
    data = open_images("digits", None, split="validation")
    assert torch.equal(data[7].float(), (images[7] * 255).round())
    assert (data.labels, data.classes[3], len(open_images("digits", None))) == (labels.tolist(), "three", 500)
    hard = open_images("digits-c", None, split="validation", corruptions=["contrast", "fog"])
    assert hard.groups == [f"contrast{DIGITS_C['contrast']}"] * 300 + [f"fog{DIGITS_C['fog']}"] * 300
    assert torch.equal(hard[307].float(), (corrupt(images, "fog", DIGITS_C["fog"])[7] * 255).round())
    assert hard.names[307] == f"fog/{DIGITS_C['fog']}#7"
    assert hard.labels == labels.tolist() * 2
    assert len(subsample(hard, 2, 0)) == 40
    easy = open_images("digits-c", None, split="validation", corruptions=["brightness"], severities=[1, 2])
    assert easy.groups == ["brightness1"] * 300 + ["brightness2"] * 300
    with pytest.raises(ValueError, match="corruptions has 'saturate', for which no severity is set"):
        open_images("digits-c", None, corruptions=["saturate"])
    with pytest.raises(ValueError, match="name is 'rain'"):
        open_images("digits-c", None, corruptions=["rain"], severities=[1])


# --- Hugging Face's datasets


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The library, with a cache of its own and no way to the hub."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return datasets


def _table(hub, labels=(1, 0), names=("cat", "dog"), kept=True):
    rows = {"text": ["a", "b"], "picture": [{"bytes": _encoded(v), "path": None} for v in (10, 20)], "animal": list(labels)}
    features = {
        "text": hub.Value("string"),
        "picture": hub.Image(),
        "animal": hub.ClassLabel(names=list(names)) if kept else hub.Value("int64"),
    }
    return hub.Dataset.from_dict(rows, hub.Features(features))


def test_saved_table(tmp_path, hub):
    hub.DatasetDict({"train": _table(hub, (0, 0)), "test": _table(hub)}).save_to_disk(tmp_path / "both")
    data = open_images("hf", tmp_path / "both")
    assert (data.names, data.labels, data.classes) == (["test#0", "test#1"], [1, 0], ("cat", "dog"))
    for found in (data, pickle.loads(pickle.dumps(data))):
        assert (found[1].shape, found[1].unique().tolist()) == ((3, 3, 4), [20])
    assert open_images("hf", tmp_path / "both", split="train").labels == [0, 0]
    with pytest.raises(ValueError, match=r"split is 'val'; .* has train, test"):
        open_images("hf", tmp_path / "both", split="val")
    _table(hub, (-1, -1)).save_to_disk(tmp_path / "unlabelled")
    assert open_images("hf", tmp_path / "unlabelled").labels is None
    _table(hub, kept=False).save_to_disk(tmp_path / "numbers")
    assert (open_images("hf", tmp_path / "numbers").labels, len(open_images("hf", tmp_path / "numbers"))) == (None, 2)
    _table(hub, (-1, 1)).save_to_disk(tmp_path / "some")
    with pytest.raises(ValueError, match=r"the column 'animal' of .* has -1; its classes are 0 .. 1"):
        open_images("hf", tmp_path / "some")
    _table(hub).remove_columns("picture").save_to_disk(tmp_path / "text")
    with pytest.raises(ValueError, match="has no column of images, only text, animal"):
        open_images("hf", tmp_path / "text")
    with pytest.raises(ValueError, match="'nobody/nothing' cannot be opened as a data set"):
        open_images("hf", Path("nobody/nothing"))


def test_image_folder_by_datasets(tmp_path, hub):
    for name, value in (("cat", 10), ("dog", 20)):
        _write(tmp_path / "set" / "test" / name / "1.png", _encoded(value))
    _write(tmp_path / "set" / "train" / "cat" / "2.png", _encoded(30))
    _write(tmp_path / "set" / "test" / "dog" / "2.png", _encoded(40)[:45])
    data = open_images("hf", tmp_path / "set")
    assert (data.labels, data.classes) == ([0, 1, 1], ("cat", "dog"))
    assert int(data[1][0, 0, 0]) == 20
    with pytest.raises(ValueError, match=r"test#2.* cannot be read as an image"):
        data[2]


# --- webdataset


def _tar(path: Path, members: dict[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            content = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_shards(tmp_path):
    root = tmp_path / "test"
    _tar(root / "0.tar", {"./s0.webp": _encoded(10, kind="WEBP"), "./s0.cls": "2", "./._s0.webp": "no image", "__meta__.json": "{}"})
    first = {"a/s1.JPG": _encoded(30, (9, 7), "JPEG"), "a/s1.seg.png": _encoded(99), "a/s1.json": "{}", "a/s1.cls": "0\n"}
    _tar(root / "1.tar", {**first, "a/v1.5/s2.cls": "1", "a/v1.5/s2.png": _encoded(40)})
    _write(root / "nshards.txt", "2")
    _write(tmp_path / "classnames.txt", "aeroplane\nbicycle\nbird\n")
    data = open_images("webdataset", root)
    assert data.names == ["0.tar/s0", "1.tar/a/s1", "1.tar/a/v1.5/s2"]
    assert (data.labels, data.classes) == ([2, 0, 1], ("aeroplane", "bicycle", "bird"))
    for found in (data, pickle.loads(pickle.dumps(data))):
        assert [int(found[i].float().mean().round()) for i in range(3)] == [10, 30, 40]
        assert found[1].shape == (3, 7, 9)
    for pattern in ("{0..1}.tar", "{0,1}.tar", "*.tar"):
        assert open_images("webdataset", root / pattern).labels == [2, 0, 1]
    assert open_images("webdataset", root / "1.tar").names == ["1.tar/a/s1", "1.tar/a/v1.5/s2"]
    with pytest.raises(ValueError, match=r"2.tar is missing; give a tar file"):
        open_images("webdataset", root / "{0..2}.tar")
    with pytest.raises(ValueError, match=r"holds no .tar file"):
        open_images("webdataset", tmp_path)
    _tar(root / "2.tar", {"s3.png": _encoded(1), "s3.cls": "3"})
    with pytest.raises(ValueError, match=r"2.tar, sample s3 has the label '3'; .cls is 0 .. 2"):
        open_images("webdataset", root)


def test_pattern_keeps_its_noughts(tmp_path):
    for number in ("009", "010"):
        _tar(tmp_path / f"shard-{number}.tar", {f"{number}.png": _encoded(int(number))})
    data = open_images("webdataset", tmp_path / "shard-{009..010}.tar")
    assert (data.names, data.labels, data.classes) == (["shard-009.tar/009", "shard-010.tar/010"], None, ())


def test_shards_that_do_not_fit(tmp_path):
    picture = _encoded(10)
    for members, message in (
        ({"s.txt": "no picture"}, r"has no image of the sample s: it has txt"),
        ({"a.png": picture, "a.cls": "1", "b.png": picture}, r"x.tar/b has no .cls, while 1 samples have one"),
        ({"a.png": picture, "a.cls": "cat"}, r"sample a has the label 'cat'; .cls is 0 .. classes - 1"),
        ({"a.png": picture, "a.cls": "-1"}, r"sample a has the label '-1'"),
        ({"a.png": picture, "./a.PNG": picture}, r"x.tar has a.png twice"),
        ({}, "hold no sample"),
    ):
        with pytest.raises(ValueError, match=message):
            open_images("webdataset", _tar(tmp_path / "x.tar", members))
    whole = _tar(tmp_path / "cut.tar", {"a.png": picture, "b.png": bytes(5000)}).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:3000])
    (tmp_path / "small.tar").write_bytes(gzip.compress(whole))
    for name in ("cut.tar", "small.tar"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as a tar file"):
            open_images("webdataset", tmp_path / name)
    data = open_images("webdataset", _tar(tmp_path / "bad.tar", {"a.png": picture[:50]}))
    with pytest.raises(ValueError, match=r"sample bad.tar/a cannot be read as an image"):
        data[0]
