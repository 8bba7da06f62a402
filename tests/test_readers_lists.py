"""Data sets given by lists, and street scenes, each on a small tree of its real layout."""

import json
import socket
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dtta_fast.data.base import NO_LABEL
from dtta_fast.data.driving import CLASSES
from dtta_fast.data.imagenet import imagenet_classes
from dtta_fast.data.images import open_images
from dtta_fast.runs import models
from dtta_fast.runs.config import RunConfig
from dtta_fast.tasks import Classification


def draw(path, value, size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = value if isinstance(value, np.ndarray) else np.full((size[1], size[0], 3), value, dtype=np.uint8)
    Image.fromarray(array).save(path)


def coop(root, folder="101_ObjectCategories", classes=("face", "sea_horse")):
    splits = {}
    for split, count in (("train", 3), ("val", 1), ("test", 2)):
        splits[split] = [[f"{name}/image_{split}{i}.png", k, name] for k, name in enumerate(classes) for i in range(count)]
        for path, k, _ in splits[split]:
            draw(root / folder / path, 10 + k)
    (root / "split_zhou_Caltech101.json").write_text(json.dumps(splits))
    return splits


@pytest.mark.parametrize("folder", ["101_ObjectCategories", "."])
def test_a_split_of_coop(tmp_path, folder):
    coop(tmp_path, folder)
    data = open_images("coop", tmp_path)
    assert (len(data), data.classes, list(data.labels)) == (4, ("face", "sea horse"), [0, 0, 1, 1])
    assert data.names[2].endswith("sea_horse/image_test0.png")
    assert [int(data.read(i)[0, 0, 0]) for i in (0, 3)] == [10, 11]
    assert len(open_images("coop", tmp_path, split="train")) == 6
    splits = json.loads((tmp_path / "split_zhou_Caltech101.json").read_text())
    splits["test"] = splits["test"][:2]  # of one class alone
    (tmp_path / "split_zhou_Caltech101.json").write_text(json.dumps(splits))
    assert open_images("coop", tmp_path).classes == ("face", "sea horse")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda splits: splits.pop("test"), "is not a split of CoOp"),
        (lambda splits: splits.update(test=[["a.png", 0]]), "is not a split of CoOp"),
        (lambda splits: splits.update(test=[["a.png", 0, "another"]]), "another name elsewhere"),
        (lambda splits: splits.update(test=[["a.png", 0.5, "face"]]), "is not a number"),
        (lambda splits: splits.update(test=[["a.png", float("inf"), "face"]]), "is not a number"),
        (lambda splits: splits.update(test=[["a.png", 5, "five"]]), r"labels \[0, 1, 5\]"),
        (lambda splits: splits.update(test=[["a.png", 2, "face"]]), "a name for each"),
        (lambda splits: splits.update(test=[]), "a name for each"),
        (lambda splits: splits.update(test=[["../a.png", 0, "face"]]), "may lie outside"),
        (lambda splits: splits.update(test=[["/etc/a.png", 0, "face"]]), "may lie outside"),
        (lambda splits: splits.update(test=[["none.png", 0, "face"]]), "put the images beside the list"),
        (lambda splits: splits.update(test=[["n" * 300, 0, "face"]]), "put the images beside the list"),
    ],
)
def test_a_split_of_coop_that_does_not_fit(tmp_path, change, message):
    splits = coop(tmp_path)
    change(splits)
    (tmp_path / "split_zhou_Caltech101.json").write_text(json.dumps(splits))
    with pytest.raises(ValueError, match=message):
        open_images("coop", tmp_path)


def test_a_folder_without_a_split_or_with_two(tmp_path):
    with pytest.raises(ValueError, match="holds none"):
        open_images("coop", tmp_path)
    for name in ("A", "B"):
        (tmp_path / f"split_zhou_{name}.json").write_text("{}")
    with pytest.raises(ValueError, match="holds 2 of them"):
        open_images("coop", tmp_path)


def test_lists_of_domainnet(tmp_path):
    for domain, count in (("real", 3), ("sketch", 2)):
        rows = []
        for k, name in enumerate(("aircraft_carrier", "ant")):
            for i in range(count):
                path = f"{domain}/{name}/{domain}_{i}.png"
                draw(tmp_path / path, 20 * k + i)
                rows.append(f"{path} {k}")
        (tmp_path / f"{domain}_list.txt").write_text("\n".join(rows) + "\n\n")
    data = open_images("image-list", tmp_path)
    assert data.classes == ("aircraft carrier", "ant")
    assert list(data.groups) == ["real"] * 6 + ["sketch"] * 4
    assert list(data.labels) == [0, 0, 0, 1, 1, 1, 0, 0, 1, 1]
    assert int(data.read(5)[0, 0, 0]) == 22
    one = open_images("image-list", tmp_path / "sketch_list.txt")
    assert list(one.groups) == ["sketch"] * 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.png", "line 1, is 'a.png'"),
        ("a.png one", "the number of a class"),
        ("\n", "names no image"),
        ("../a.png 0", "may lie outside"),
        ("none.png 0", "which is neither in"),
    ],
)
def test_a_list_that_does_not_fit(tmp_path, text, message):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_images("image-list", tmp_path)
    with pytest.raises(ValueError, match="is not a text file and holds none"):
        open_images("image-list", tmp_path / "nowhere")


def test_classes_of_a_list_without_folders_have_numbers(tmp_path):
    draw(tmp_path / "flat" / "a.png", 1)
    draw(tmp_path / "flat" / "b.png", 2)
    (tmp_path / "list.txt").write_text("a.png 0\nb.png 2\n")
    data = open_images("image-list", tmp_path)
    assert data.classes == ("class 0", "class 1", "class 2")
    assert data.names == ["flat/a.png", "flat/b.png"]


def street(root, image, annotation, ids):
    draw(root / image, 100, size=(16, 8))
    draw(root / annotation, np.resize(np.array(ids, dtype=np.uint8), (8, 16)))


def test_cityscapes_ids_become_training_ids(tmp_path):
    for split in ("val", "train"):
        street(
            tmp_path,
            f"leftImg8bit/{split}/bonn/bonn_000_leftImg8bit.png",
            f"gtFine/{split}/bonn/bonn_000_gtFine_labelIds.png",
            [0, 7, 8, 33, 29, 26],
        )
    data = open_images("cityscapes", tmp_path, size=8)
    image, labels, _ = data.pair(0)
    assert data.classes[0] == "road"
    assert image.shape[1:] == (8, 16)
    assert labels.flatten()[:6].tolist() == [NO_LABEL, 0, 1, 18, NO_LABEL, 13]
    street(tmp_path, "leftImg8bit/val/bonn/bonn_000_leftImg8bit.png", "gtFine/val/bonn/bonn_000_gtFine_labelTrainIds.png", [255, 18])
    assert open_images("cityscapes", tmp_path, size=8).pair(0)[1].flatten()[:2].tolist() == [NO_LABEL, 18]  # preferred
    assert data[0][1].shape == (8, 8)
    assert len(CLASSES) == 19
    assert sorted(CLASSES.values()) == list(CLASSES.values())


def test_acdc_s_conditions_are_groups(tmp_path):
    for condition in ("fog", "night", "rain", "snow"):
        street(
            tmp_path,
            f"rgb_anon/{condition}/val/GOPR1/GOPR1_frame_1_rgb_anon.png",
            f"gt/{condition}/val/GOPR1/GOPR1_frame_1_gt_labelTrainIds.png",
            [0, 10, 255],
        )
    data = open_images("acdc", tmp_path, size=8)
    assert list(data.groups) == ["fog", "night", "rain", "snow"]
    assert data.pair(2)[1].flatten()[:3].tolist() == [0, 10, NO_LABEL]
    assert list(open_images("acdc", tmp_path, corruptions=("snow",), size=8).groups) == ["snow"]
    for arguments, message in (
        ({"corruptions": ("hail",)}, "ACDC's conditions are fog, night, rain, snow"),
        ({"severities": (3,)}, "ACDC's conditions have no severities"),
        ({"split": "train"}, "holds no"),
    ):
        with pytest.raises(ValueError, match=message):
            open_images("acdc", tmp_path, size=8, **arguments)
    (tmp_path / "gt" / "fog" / "val" / "GOPR1" / "GOPR1_frame_1_gt_labelTrainIds.png").unlink()
    with pytest.raises(ValueError, match="every image needs its map"):
        open_images("acdc", tmp_path, size=8)


def test_torchvision_s_textures(tmp_path):
    labels = tmp_path / "dtd" / "dtd" / "labels"
    labels.mkdir(parents=True)
    for split in ("train", "val", "test"):
        (labels / f"{split}1.txt").write_text("banded/banded_1.jpg\nzigzagged/zigzagged_1.jpg\n")
    for name in ("banded", "zigzagged"):
        draw(tmp_path / "dtd" / "dtd" / "images" / name / f"{name}_1.jpg", 30)
    data = open_images("dtd", tmp_path)
    assert (data.classes, list(data.labels)) == (("banded", "zigzagged"), [0, 1])
    assert data.read(1).shape == (3, 6, 8)


def test_torchvision_s_cars(tmp_path):
    from scipy import io

    kit = tmp_path / "stanford_cars" / "devkit"
    kit.mkdir(parents=True)
    annotations = np.array([("00001.jpg", 2), ("00002.jpg", 1)], dtype=[("fname", object), ("class", object)])
    io.savemat(tmp_path / "stanford_cars" / "cars_test_annos_withlabels.mat", {"annotations": annotations})
    io.savemat(kit / "cars_meta.mat", {"class_names": np.array(["AM General Hummer", "Acura RL"], dtype=object)})
    for i in (1, 2):
        draw(tmp_path / "stanford_cars" / "cars_test" / f"0000{i}.jpg", 40 * i)
    data = open_images("cars", tmp_path)
    assert (data.classes, list(data.labels)) == (("AM General Hummer", "Acura RL"), [1, 0])
    assert abs(int(data.read(1)[0, 0, 0]) - 80) < 3
    with pytest.raises(ValueError, match=r"cars_train_annos\.mat is missing"):
        open_images("cars", tmp_path, split="train")


def test_imagenet_3dcc_is_laid_out_like_imagenet_c(tmp_path):
    for name in ("near_focus", "fog_3d", "xy_motion_blur"):
        for severity in (1, 5):
            draw(tmp_path / name / str(severity) / "n01440764" / "a.JPEG", 50)
    data = open_images("imagenet-c", tmp_path, severities=(5,))
    assert sorted(data.groups) == ["fog_3d5", "near_focus5", "xy_motion_blur5"]
    assert torch.equal(
        torch.tensor([data.outputs[int(label)] if data.outputs else int(label) for label in data.labels]), torch.zeros(3).long()
    )


@pytest.mark.parametrize("given", [(), ("tench", "goldfish")])
def test_a_part_of_imagenet_gives_a_text_to_image_model_every_name(tmp_path, monkeypatch, given):
    """ImageNet-A has 200 of the 1000 classes; a classifier of 1000 needs a denoiser of as many."""
    told = []
    monkeypatch.setattr(models, "_model", lambda run, names, outputs: (nn.Linear(1, 1), Classification(subset=outputs)))
    monkeypatch.setattr(models, "_denoiser", lambda run, names: told.extend(names) or nn.Linear(1, 1))
    run = RunConfig(data="imagenet-a", root=str(tmp_path), model="any", denoiser="any", classes=given, device="cpu")
    models.load_models(run, ("goldfish", "hen"), [1, 8])
    assert told == (list(given) or list(imagenet_classes()))
    assert len(set(told)) == (len(given) or 1000)


def test_wilds_by_its_own_package(tmp_path, monkeypatch):
    root = tmp_path / "waterbirds_v1.0"
    rows = ["img_id,img_filename,y,split,place,place_filename"]
    for i in range(6):
        draw(root / "001" / f"{i}.jpg", 40 * i)
        rows.append(f"{i},001/{i}.jpg,{i % 2},{i % 3},{i // 3},x")
    (root / "metadata.csv").write_text("\n".join(rows) + "\n")
    (root / "RELEASE_v1.0.txt").write_text("")
    for name in [name for name in sys.modules if name.partition(".")[0] in ("wilds", "outdated")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(socket, "create_connection", lambda *given, **keywords: pytest.fail("wilds asks the network"))
    data = open_images("wilds", root)
    assert "outdated" not in sys.modules
    assert (data.names, list(data.labels)) == (["test#2", "test#5"], [0, 1])
    assert data.classes == ("class 0", "class 1")
    assert abs(int(data.read(1)[0, 0, 0]) - 200) < 4
    assert list(open_images("wilds", root, split="train").labels) == [0, 1]
    (root / "001" / "5.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match="test#5 cannot be read"):
        data.read(1)
    with pytest.raises(ValueError, match="cannot be read by wilds"):
        open_images("wilds", root, split="id_test")
    (root / "metadata.csv").unlink()
    with pytest.raises(ValueError, match="cannot be read by wilds"):
        open_images("wilds", root)
    for place in (tmp_path, tmp_path / "camelyon17_v1.0"):
        with pytest.raises(ValueError, match="give the folder of a data set of WILDS"):
            open_images("wilds", place)
