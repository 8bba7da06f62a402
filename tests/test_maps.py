"""Readers of maps on small trees of the real layouts, scenes, and what maps are judged by."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex
from torchmetrics.functional.image import structural_similarity_index_measure

from dtta_fast.data.maps import Ade20k, MapFolder, NyuV2
from dtta_fast.data.scenes import CLASSES, FARTHEST, NEAREST, scenes
from dtta_fast.metrics import confusion, depth_errors, mean_class_accuracy, mean_iou


def _ade(folder, labels=((0, 1), (150, 7)), size=(2, 2), name="ADE_val_00000001"):
    for kind in ("images", "annotations"):
        (folder / kind / "validation").mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), 200, np.uint8)).save(folder / "images" / "validation" / f"{name}.jpg")
    Image.fromarray(np.array(labels, np.uint8)).save(folder / "annotations" / "validation" / f"{name}.png")


def test_ade20k_counts_from_one_and_leaves_nought_out(tmp_path):
    _ade(tmp_path)
    data = Ade20k(tmp_path, "validation", 2)
    image, labels = data[0]
    assert len(data) == 1
    assert image.shape == (3, 2, 2)
    assert labels.tolist() == [[255, 0], [149, 6]]


def test_readers_refuse_what_does_not_fit(tmp_path):
    _ade(tmp_path / "a", labels=((0, 151), (1, 1)))
    with pytest.raises(ValueError, match=r"labels \[150\]; there are 0 .. 149"):
        Ade20k(tmp_path / "a", "validation", 2)[0]
    _ade(tmp_path / "b", size=(4, 2))
    with pytest.raises(ValueError, match="both have one size"):
        Ade20k(tmp_path / "b", "validation", 2)[0]
    (tmp_path / "b" / "annotations" / "validation" / "ADE_val_00000001.png").unlink()
    with pytest.raises(ValueError, match=r"no map for ADE_val_00000001.jpg"):
        Ade20k(tmp_path / "b", "validation", 2)
    with pytest.raises(ValueError, match="is missing"):
        Ade20k(tmp_path / "b", "training", 2)
    (tmp_path / "a" / "annotations" / "validation" / "ADE_val_00000001.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="cannot be read as a map"):
        Ade20k(tmp_path / "a", "validation", 2)[0]


def test_folder_of_pairs(tmp_path):
    for kind in ("images", "maps"):
        (tmp_path / kind).mkdir()
    Image.fromarray(np.zeros((6, 4, 3), np.uint8)).save(tmp_path / "images" / "one.jpg")
    millimetres = np.arange(24, dtype=np.uint16).reshape(6, 4) * 100
    Image.fromarray(millimetres).save(tmp_path / "maps" / "one.png")
    _, depth = MapFolder(tmp_path, 4)[0]
    torch.testing.assert_close(depth, torch.from_numpy(millimetres[1:5] / 1000).float())
    Image.fromarray(np.zeros((6, 4), np.uint16)).save(tmp_path / "maps" / "one.png")
    with pytest.raises(ValueError, match="no depth above 0"):
        MapFolder(tmp_path, 4)[0]
    Image.fromarray(np.full((6, 4), 9, np.uint8)).save(tmp_path / "maps" / "one.png")
    assert MapFolder(tmp_path, 4, classes=10)[0][1].unique().tolist() == [9]
    with pytest.raises(ValueError, match=r"labels \[9\]; there are 0 .. 4"):
        MapFolder(tmp_path, 4, classes=5)[0]


def test_nyu_turns_matlabs_columns(tmp_path):
    h5py, io = pytest.importorskip("h5py"), pytest.importorskip("scipy.io")
    depths = np.random.default_rng(0).uniform(1, 5, (3, 8, 6)).astype(np.float32)  # [N, W, H]
    images = np.random.default_rng(1).integers(0, 256, (3, 3, 8, 6), dtype=np.uint8)
    depths[2, 0, 0] = np.nan
    with h5py.File(tmp_path / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"], file["depths"] = images, depths
    io.savemat(tmp_path / "splits.mat", {"trainNdxs": np.array([[1]]), "testNdxs": np.array([[2], [3]])})
    data = NyuV2(tmp_path / "nyu_depth_v2_labeled.mat", "test", 6)
    image, depth = data[0]
    assert len(data) == 2
    torch.testing.assert_close(depth, torch.from_numpy(depths[1].T[:, 1:7].copy()))
    torch.testing.assert_close(image, torch.from_numpy(images[1].transpose(0, 2, 1)[:, :, 1:7] / 255).float())
    with pytest.raises(ValueError, match="image 3 has depth that is NaN"):
        data[1]
    io.savemat(tmp_path / "splits.mat", {"testNdxs": np.array([[4]])})
    with pytest.raises(ValueError, match="does not have"):
        NyuV2(tmp_path / "nyu_depth_v2_labeled.mat", "test", 6)
    with pytest.raises(ValueError, match="is not NYUv2"):
        NyuV2(tmp_path / "nyu_depth_v2_labeled.mat", "train", 6)


def test_scenes_are_drawn_from_their_number_alone():
    four, two = scenes("test", 4), scenes("test", 2, first_id=2)
    for whole, part in zip(four, two, strict=True):
        assert torch.equal(whole[2:], part)
    assert not torch.equal(four.images, scenes("validation", 4).images)
    assert four.images.shape == (4, 3, 64, 64)
    assert four.depth.min() >= NEAREST
    assert four.depth.max() <= FARTHEST
    assert set(four.labels.unique().tolist()) <= set(range(len(CLASSES)))
    with pytest.raises(ValueError, match="split is 'all'"):
        scenes("all", 1)


def test_floor_and_wall_lie_in_planes():
    """Depth is exact: the floor's inverse depth is linear over the picture, as any plane's is under perspective."""
    found, fitted = scenes("test", 6), 0
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    for labels, depth in zip(found.labels, found.depth, strict=True):
        for plane in (0, 1):
            here = (labels == plane) & (depth > NEAREST) & (depth < FARTHEST)
            if int(here.sum()) < 100:
                continue
            system = torch.stack([rows[here], columns[here], torch.ones(int(here.sum()))], dim=1).double()
            inverse = 1 / depth[here].double()
            solved = torch.linalg.lstsq(system, inverse[:, None]).solution
            assert float((system @ solved - inverse[:, None]).abs().max()) < 1e-3
            fitted += 1
    assert fitted >= 8


def test_segmentation_scores_are_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (4, 9, 7), generator=generator)
    predictions = torch.where(
        torch.rand(labels.shape, generator=generator) < 0.6, labels, torch.randint(0, 5, labels.shape, generator=generator)
    )
    labels[:, :2] = 255
    counts = confusion(predictions, labels, 5).sum(0)
    for ours, theirs in (
        (mean_iou, MulticlassJaccardIndex(5, ignore_index=255)),
        (mean_class_accuracy, MulticlassAccuracy(5, ignore_index=255)),
    ):
        torch.testing.assert_close(float(ours(counts)), float(theirs(predictions, labels)), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match=r"labels lie in 0 .. 4"):
        confusion(predictions, labels, 4)
    with pytest.raises(ValueError, match="give both as"):
        confusion(predictions[:, 1:], labels, 5)


def test_depth_errors_are_their_definitions():
    depth = torch.tensor([[[1.0, 2.0], [4.0, 0.0]]]).repeat_interleave(8, 1).repeat_interleave(8, 2)
    guess = torch.tensor([[[1.1, 1.0], [4.0, 9.0]]]).repeat_interleave(8, 1).repeat_interleave(8, 2)
    found = depth_errors(guess, depth)
    assert float(found["abs_rel"]) == pytest.approx((0.1 + 0.5 + 0) / 3)
    assert float(found["rmse"]) == pytest.approx(((0.01 + 1 + 0) / 3) ** 0.5, rel=1e-5)
    assert [float(found[f"delta{k}"]) for k in (1, 2, 3)] == pytest.approx([2 / 3, 2 / 3, 2 / 3])
    assert float(found["ssim"]) == pytest.approx(
        float(structural_similarity_index_measure(guess[:, None].double(), depth[:, None].double(), data_range=3.0))
    )
    with pytest.raises(ValueError, match="NaN"):
        depth_errors(guess * torch.nan, depth)
    with pytest.raises(ValueError, match="without a value above 0"):
        depth_errors(guess, depth * 0)
