"""Readers of files on small trees of the real layouts: any folder, ImageNet and its family, maps, and what all readers share."""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch.utils.data import DataLoader

from dtta_fast.data.folder import read_images
from dtta_fast.data.images import open_images, subsample

TENCH, GOLDFISH, HAMMERHEAD, CASSETTE, CRANE = "n01440764", "n01443537", "n01494475", "n02978881", "n03126707"


def _save(path: Path, value: int = 100, size: tuple[int, int] = (5, 4), **options) -> None:
    """A picture of one grey, size (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path, **options)


def _junk(folder: Path) -> None:
    for name in (".DS_Store", "LICENSE", "README.txt", "._1.jpg"):
        (folder / name).write_bytes(b"no image")


# --- what read() gives


def test_images_keep_their_size_and_suffixes_any_case(tmp_path):
    _save(tmp_path / "a.JPEG", size=(224, 224))
    _save(tmp_path / "b.Png", size=(7, 3))
    _junk(tmp_path)
    data = open_images("folder", tmp_path)
    assert data.names == ["a.JPEG", "b.Png"]
    assert [tuple(data[i].shape) for i in range(len(data))] == [(3, 224, 224), (3, 3, 7)]
    assert data[0].dtype == torch.uint8
    assert (data.labels, data.classes, data.outputs, data.groups) == (None, (), None, ["folder", "folder"])


def test_every_mode_becomes_rgb(tmp_path):
    red = Image.new("RGB", (8, 8), (200, 30, 30))
    red.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    Image.new("L", (8, 8), 77).save(tmp_path / "grey.jpg", quality=100)
    Image.new("1", (8, 8), 1).save(tmp_path / "one_bit.png")
    Image.fromarray(np.full((8, 8), 51_400, np.uint16)).save(tmp_path / "sixteen.png")  # 200 of 255
    red.quantize(4).save(tmp_path / "palette.png")
    red.quantize(4).save(tmp_path / "see_through.png", transparency=bytes([255, 0]))
    Image.new("RGBA", (8, 8), (200, 30, 30, 0)).save(tmp_path / "alpha.png")
    Image.new("LA", (8, 8), (77, 128)).save(tmp_path / "grey_alpha.png")
    expected = {"grey": (77,) * 3, "one_bit": (255,) * 3, "sixteen": (200,) * 3, "grey_alpha": (77,) * 3}
    data = open_images("folder", tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i, name in enumerate(data.names):
            image = data[i]
            assert image.shape == (3, 8, 8)
            wanted = torch.tensor(expected.get(Path(name).stem, (200, 30, 30)))
            assert (image.int() - wanted[:, None, None]).abs().max() <= 2, name


def test_exif_turns_the_image(tmp_path):
    image = Image.new("RGB", (6, 4), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 6, 2))  # the upper half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise: the upper half comes to the right
    image.save(tmp_path / "turned.png", exif=exif)
    found = open_images("folder", tmp_path)[0]
    assert found.shape == (3, 6, 4)
    assert found[0, 0].tolist() == [0, 0, 255, 255]


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in ("cut.jpg", "cut.png"):
        Image.fromarray(noise).save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "page.jpg").write_text("<html>not found</html>")
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "floats.tif")
    _save(tmp_path / "gone.png")
    _save(tmp_path / "huge.png", size=(90, 70))
    data = open_images("folder", tmp_path)
    (tmp_path / "gone.png").unlink()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)  # huge.png lies between it and its double, where PIL only warns
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for i, name in enumerate(data.names):
            with pytest.raises(ValueError, match=f"{name} cannot be read as an image"):
                data[i]
        with pytest.raises(ValueError, match="it has 6300 pixels, more than"):
            data[data.names.index("huge.png")]
    assert len(data) == 7


# --- any folder


def test_folder_of_classes(tmp_path):
    for folder, value in (("b", 10), ("a", 20), ("c", 30)):
        _save(tmp_path / folder / "x.png", value)
    _save(tmp_path / "a" / "deeper" / "y.png", 40)
    _junk(tmp_path / "b")
    _junk(tmp_path)
    (tmp_path / ".git").mkdir()
    data = open_images("folder", tmp_path)
    assert data.names == ["a/x.png", "a/deeper/y.png", "b/x.png", "c/x.png"]
    assert data.labels == [0, 0, 1, 2]
    assert data.classes == ("a", "b", "c")
    assert [int(data[i][0, 0, 0]) for i in range(4)] == [20, 40, 10, 30]


def test_folders_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="missing does not exist, or is not a folder"):
        open_images("folder", tmp_path / "missing")
    _junk(tmp_path)
    with pytest.raises(ValueError, match="holds no class folder and no file ending in"):
        open_images("folder", tmp_path)
    _save(tmp_path / "a" / "x.png")
    (tmp_path / "b").mkdir()
    _junk(tmp_path / "b")
    with pytest.raises(ValueError, match=r"b holds no file ending in .*: fill the class, or remove"):
        open_images("folder", tmp_path)
    _save(tmp_path / "b" / "x.png")
    _save(tmp_path / "loose.png")
    with pytest.raises(ValueError, match=r"loose.png beside them"):
        open_images("folder", tmp_path)


def test_calibration_s_images_leave_hidden_files_out(tmp_path):
    _save(tmp_path / "sub" / "x.png", size=(8, 6))
    _junk(tmp_path / "sub")
    assert read_images(tmp_path, 4, 9).shape == (1, 3, 4, 4)
    with pytest.raises(ValueError, match="most is 0; give 1 or more"):
        read_images(tmp_path, 4, 0)


# --- the ImageNet family


@pytest.mark.parametrize("below", ["", "val"])
def test_imagenet_labels_are_a_model_s_outputs(tmp_path, below):
    for wnid in (CRANE, TENCH):
        _save(tmp_path / below / wnid / "ILSVRC2012_val_00000293.JPEG")
    if below:
        _save(tmp_path / "train" / GOLDFISH / "x.JPEG")
    data = open_images("imagenet", tmp_path)
    assert data.names == [f"{TENCH}/ILSVRC2012_val_00000293.JPEG", f"{CRANE}/ILSVRC2012_val_00000293.JPEG"]
    assert data.labels == [0, ImageNetInfo("imagenet-1k").label_names().index(CRANE)]
    assert data.classes[0] == "tench"
    assert (len(data.classes), len(set(data.classes)), data.outputs) == (1000, 1000, None)  # prompts may not be alike
    assert data.groups == ["imagenet"] * 2


def test_imagenet_refuses_other_folders(tmp_path):
    _save(tmp_path / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(ValueError, match="has no class folders; imagenet is folders of images named by wnid"):
        open_images("imagenet", tmp_path)
    _save(tmp_path / TENCH / "x.JPEG")
    _save(tmp_path / "n00000001" / "x.JPEG")
    with pytest.raises(ValueError, match="n00000001 is not a class of imagenet: its 1000 are wnids, such as n01440764"):
        open_images("imagenet", tmp_path)


@pytest.mark.parametrize("name", ["imagenet-sketch", "imagenet-stylized"])
def test_sets_of_all_classes(tmp_path, name):
    _save(tmp_path / GOLDFISH / "sketch_0.JPEG")
    data = open_images(name, tmp_path)
    assert (data.labels, data.groups, len(data.classes), data.outputs) == ([1], [name], 1000, None)


def test_sets_of_200_classes_know_their_outputs(tmp_path):
    for name, wnids, outsider in (("imagenet-a", ["n01498041", "n02007558"], TENCH), ("imagenet-r", [GOLDFISH, HAMMERHEAD], CASSETTE)):
        for wnid in wnids:
            _save(tmp_path / name / wnid / "0.jpg")
        (tmp_path / name / "README.txt").touch()
        data = open_images(name, tmp_path / name)
        everywhere = ImageNetInfo("imagenet-1k").label_names()
        assert len(data.outputs) == len(set(data.outputs)) == len(data.classes) == 200
        assert [data.outputs[label] for label in data.labels] == [everywhere.index(wnid) for wnid in wnids]
        assert data.outputs == tuple(sorted(data.outputs))
        _save(tmp_path / name / outsider / "0.jpg")
        with pytest.raises(ValueError, match=f"{outsider} is not a class of {name}: its 200 are wnids"):
            open_images(name, tmp_path / name)
    assert data.classes[data.labels[0]] == "goldfish"


def test_imagenet_v2_s_folders_are_numbers(tmp_path):
    for folder in ("0", "1", "10", "2", "999"):
        _save(tmp_path / folder / "abc.jpeg")
    data = open_images("imagenet-v2", tmp_path)
    assert data.names == [f"{folder}/abc.jpeg" for folder in (0, 1, 2, 10, 999)]
    assert data.labels == [0, 1, 2, 10, 999]
    _save(tmp_path / "1000" / "abc.jpeg")
    with pytest.raises(ValueError, match=r"has the folder '1000'; ImageNet-V2 is folders 0 .. 999"):
        open_images("imagenet-v2", tmp_path)
    with pytest.raises(ValueError, match="has no class folders"):
        open_images("imagenet-v2", tmp_path / "0")


@pytest.mark.parametrize("category", ["", "noise/"])
def test_imagenet_c_with_and_without_its_categories(tmp_path, category):
    for place in ("gaussian_noise/1", "gaussian_noise/5", "shot_noise/5"):
        for wnid in (GOLDFISH, TENCH):
            _save(tmp_path / f"{category}{place}" / wnid / "ILSVRC2012_val_00000293.JPEG", size=(224, 224))
    _save(tmp_path / "frost" / "3" / TENCH / "ILSVRC2012_val_00000293.JPEG")
    data = open_images("imagenet-c", tmp_path)
    assert data.groups == ["frost3"] + [group for group in ("gaussian_noise1", "gaussian_noise5", "shot_noise5") for _ in range(2)]
    assert data.labels == [0, 0, 1, 0, 1, 0, 1]
    assert data.names[1] == f"{category}gaussian_noise/1/{TENCH}/ILSVRC2012_val_00000293.JPEG"
    assert data[1].shape == (3, 224, 224)
    some = open_images("imagenet-c", tmp_path, corruptions=["shot_noise", "gaussian_noise"], severities=[5])
    assert some.groups == ["shot_noise5"] * 2 + ["gaussian_noise5"] * 2
    with pytest.raises(ValueError, match=r"corruptions has 'rain', which is not in .*; there are frost, gaussian_noise, shot_noise"):
        open_images("imagenet-c", tmp_path, corruptions=["rain"])
    with pytest.raises(ValueError, match=r"severities has 1, which shot_noise in .* does not have; there are 5"):
        open_images("imagenet-c", tmp_path, corruptions=["gaussian_noise", "shot_noise"], severities=[1])
    with pytest.raises(ValueError, match="holds no corruption"):
        open_images("imagenet-c", tmp_path / f"{category}gaussian_noise" / "1" / TENCH)


def _objectnet(root: Path, folders: tuple[str, ...] = ("air_freshener", "alarm_clock", "backpack"), images: str = "images") -> Path:
    """Three classes, of which two are ImageNet's too, one of these divided there; lines in an order of their own."""
    names = {"analog clock": 409, "digital clock": 530, "backpack, back pack, knapsack, packsack, rucksack, haversack": 414}
    mappings = root / "mappings"
    mappings.mkdir(parents=True, exist_ok=True)
    labels = {"air_freshener": "Air freshener", "alarm_clock": "Alarm clock", "backpack": "Backpack"}
    (mappings / "folder_to_objectnet_label.json").write_text(json.dumps(labels))
    shared = {"Backpack": next(name for name in names if name.startswith("back")), "Alarm clock": "analog clock; digital clock"}
    (mappings / "objectnet_to_imagenet_1k.json").write_text(json.dumps(shared))
    lines = ["kit fox, Vulpes macrotis", *reversed(names)]
    (mappings / "imagenet_to_label_2012_v2").write_text("\n".join(lines) + "\n")
    ids = {str(names.get(name, 278)): line for line, name in enumerate(lines)}
    (mappings / "pytorch_to_imagenet_2012_id.json").write_text(json.dumps(ids))
    for folder in folders:
        picture = Image.new("RGB", (20, 12), (255, 0, 0))
        picture.paste((9, 9, 9), (2, 2, 18, 10))
        (root / images / folder).mkdir(parents=True)
        picture.save(root / images / folder / "0a1b.png")
    return root


@pytest.mark.parametrize("images", ["images", ""])
def test_objectnet_s_mapping_and_border(tmp_path, images):
    data = open_images("objectnet", _objectnet(tmp_path, images=images))
    assert data.names == ["alarm_clock/0a1b.png", "backpack/0a1b.png"]  # no air freshener in ImageNet
    assert data.classes == ("Alarm clock", "Backpack")
    assert data.labels == [0, 1]
    assert data.outputs == (409, 414)
    assert data.further == ((530, 0),)
    assert data[0].shape == (3, 8, 16)
    assert data[0].unique().tolist() == [9]


def test_objectnet_says_what_it_lacks(tmp_path):
    with pytest.raises(ValueError, match="has no folder of the 2 classes that ImageNet has too"):
        open_images("objectnet", _objectnet(tmp_path / "a", ("air_freshener",)))
    with pytest.raises(ValueError, match=r"bathtub is not a class of .*folder_to_objectnet_label.json"):
        open_images("objectnet", _objectnet(tmp_path / "b", ("bathtub", "backpack")))
    root = _objectnet(tmp_path / "c")
    for file in ("imagenet_to_label_2012_v2", "pytorch_to_imagenet_2012_id.json"):
        (root / "mappings" / file).rename(root / "kept")
        with pytest.raises(ValueError, match=f"{file} is missing: ObjectNet's archive"):
            open_images("objectnet", root)
        (root / "kept").rename(root / "mappings" / file)
    (root / "mappings" / "objectnet_to_imagenet_1k.json").write_text(json.dumps({"Backpack": "rucksack"}))
    with pytest.raises(ValueError, match=r"mappings does not fit together: .*rucksack"):
        open_images("objectnet", root)


# --- maps


def _ade(root: Path, image: str, label: int = 1) -> None:
    _save(root / image, size=(2, 2))
    annotation = root / "annotations" / "validation" / f"{Path(image).stem}.png"
    annotation.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((2, 2), label, np.uint8)).save(annotation)


def test_ade20k_and_its_corruptions(tmp_path):
    for image in ("images/validation/ADE_val_1.jpg", "fog/3/ADE_val_1.jpg", "fog/5/ADE_val_1.jpg", "snow/5/ADE_val_1.jpg"):
        _ade(tmp_path, image, 150)
    clean = open_images("ade20k", tmp_path, size=2)
    assert (clean.names, clean.groups, clean.classes) == (["images/validation/ADE_val_1.jpg"], ["ade20k"], ())
    (tmp_path / "objectInfo150.txt").write_text(
        "Idx\tRatio\tTrain\tVal\tName\n" + "".join(f"{i}\t0.1\t9\t9\tthing{i}, other\n" for i in range(1, 151)),
    )
    hard = open_images("ade20k-c", tmp_path, size=2)
    assert hard.names == ["fog/3/ADE_val_1.jpg", "fog/5/ADE_val_1.jpg", "snow/5/ADE_val_1.jpg"]
    assert hard.groups == ["fog3", "fog5", "snow5"]
    assert (len(hard.classes), hard.classes[149]) == (150, "thing150")
    image, labels = hard[1]
    assert (image.shape, labels.tolist()) == ((3, 2, 2), [[149] * 2] * 2)
    assert open_images("ade20k-c", tmp_path, severities=[5], corruptions=["fog"], size=2).groups == ["fog5"]
    assert len(subsample(hard, 1, 0)) == 3
    with pytest.raises(ValueError, match="severities has 3, which snow in"):
        open_images("ade20k-c", tmp_path, severities=[3], size=2)
    (tmp_path / "objectInfo150.txt").write_text("1\twall\n")
    with pytest.raises(ValueError, match=r"objectInfo150.txt is not ADE20K's"):
        open_images("ade20k", tmp_path, size=2)


def test_folder_of_maps_is_labels_by_its_classes(tmp_path):
    _save(tmp_path / "images" / "a.jpg", size=(2, 2))
    (tmp_path / "maps").mkdir()
    Image.fromarray(np.ones((2, 2), np.uint8)).save(tmp_path / "maps" / "a.png")
    depth = open_images("map-folder", tmp_path, size=2)
    assert (depth.names, depth.groups, depth.classes) == (["images/a.jpg"], ["map-folder"], ())
    assert depth[0][1].unique().tolist() == pytest.approx([0.001])
    (tmp_path / "classes.txt").write_text("floor\nwall\n")
    labels = open_images("map-folder", tmp_path, size=2)
    assert (labels.classes, labels[0][1].unique().tolist()) == (("floor", "wall"), [1])
    (tmp_path / "classes.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"classes.txt has no name"):
        open_images("map-folder", tmp_path, size=2)


def test_nyu_by_its_folder_and_in_another_process(tmp_path):
    h5py, io_ = pytest.importorskip("h5py"), pytest.importorskip("scipy.io")
    with h5py.File(tmp_path / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"], file["depths"] = np.full((3, 3, 4, 4), 9, np.uint8), np.ones((3, 4, 4), np.float32)
    io_.savemat(tmp_path / "splits.mat", {"trainNdxs": np.array([[1]]), "testNdxs": np.array([[2], [3]])})
    data = open_images("nyuv2", tmp_path, size=4)
    assert (data.names, data.groups) == (["nyu_depth_v2_labeled.mat#2", "nyu_depth_v2_labeled.mat#3"], ["nyuv2"] * 2)
    data[0]
    assert pickle.loads(pickle.dumps(data))[1][1].unique().tolist() == [1]
    assert len(open_images("nyuv2", tmp_path, size=4, split="train")) == 1


# --- what all share


def test_workers_of_a_loader_read_the_same(tmp_path):
    for i in range(4):
        _save(tmp_path / f"{i}.png", 50 * i)
    data = pickle.loads(pickle.dumps(open_images("folder", tmp_path)))
    found = torch.stack(list(DataLoader(data, batch_size=None, num_workers=2)))
    assert found[:, 0, 0, 0].tolist() == [0, 50, 100, 150]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "imagenet-x"}, r"name is 'imagenet-x'; choose one of acdc, ade20k, .*webdataset"),
        ({"name": "imagenet", "root": None}, "root is missing: imagenet needs the folder that holds it"),
        ({"name": "digits"}, "digits is generated and reads no files: leave it out"),
        ({"name": "imagenet", "corruptions": ["fog"]}, r"corruptions is \['fog'\], which imagenet does not have; the corrupted sets are"),
        ({"name": "folder", "severities": [1]}, r"severities is \[1\], which folder does not have"),
        ({"name": "imagenet-c", "severities": [5, 5]}, "name each once"),
        ({"name": "imagenet-r", "split": "val"}, "split is 'val'; imagenet-r has no splits"),
        ({"name": "pets", "split": "train"}, "split is 'train'; pets has test, trainval"),
        ({"name": "ade20k"}, "ade20k is a set of images with maps, and size is None"),
        ({"name": "folder", "size": 4}, "folder is a set of images without maps, .* and size is 4: leave it out"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        open_images(**{"root": tmp_path, **arguments})


def test_subsample_takes_the_same_images_of_every_corruption(tmp_path):
    for place in ("noise/gaussian_noise/1", "noise/gaussian_noise/5", "blur/defocus_blur/5"):
        for wnid, count in ((TENCH, 12), (GOLDFISH, 2)):
            for i in range(count):
                _save(tmp_path / place / wnid / f"{i}.JPEG", size=(1, 1))
    data = open_images("imagenet-c", tmp_path)
    found = subsample(data, 3, seed=0)
    assert found == sorted(set(found))
    per_group = {group: [data.names[i].split("/", 3)[3] for i in found if data.groups[i] == group] for group in set(data.groups)}
    first = per_group["gaussian_noise1"]
    assert [name.split("/")[0] for name in first] == [TENCH] * 3 + [GOLDFISH] * 2
    assert all(names == first for names in per_group.values())
    assert len(per_group) == 3
    drawn = {tuple(subsample(data, 3, seed)) for seed in range(10)}
    assert len(drawn) > 5  # of 220
    counts = np.zeros(12)
    for seed in range(300):
        for i in subsample(data, 3, seed)[:3]:
            counts[int(Path(data.names[i]).stem)] += 1
    assert counts.min() > 40  # of 75 expected, 7.5 standard deviation
    with pytest.raises(ValueError, match="per_class is 0; give 1 or more"):
        subsample(data, 0, 0)


def test_subsample_without_labels_counts_images(tmp_path):
    for i in range(5):
        _save(tmp_path / f"{i}.png")
    data = open_images("folder", tmp_path)
    assert len(subsample(data, 2, 0)) == 2
    assert subsample(data, 9, 0) == [0, 1, 2, 3, 4]
