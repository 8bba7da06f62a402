"""Images made to end a run: what each would cost is known before memory is taken, and it becomes one image's error."""

from __future__ import annotations

import io
import json
import os
import socket
import struct
import tarfile
import threading
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from dtta_fast.data import arrays, folder, imagenet, maps, shards
from dtta_fast.data.images import open_images
from dtta_fast.runs import worker
from dtta_fast.runtime import pictures
from dtta_fast.runtime.files import MOST_TEXT, open_plain, read_text


def headed(width: int, height: int) -> bytes:
    """A PNG of that size that ends before its pixels: whoever decodes it finds it cut."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + struct.pack(">I", 9) + b"IDAT"


def picture(path: Path, width: int = 8, height: int = 6) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (9, 9, 9)).save(path)
    return path


def in_time(call):
    """What call() gives or raises, within five seconds: who waits for a pipe waits for ever."""
    found = []

    def run():
        try:
            found.append((call(), None))
        except BaseException as error:
            found.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(5)
    assert found, "it waits"
    value, error = found[0]
    if error is not None:
        raise error
    return value


LONG = [(80_000_000, 1), (1, 80_000_000), (6500, 100), (65, 1), (9_000, 139)]


@pytest.mark.parametrize("size", LONG)
def test_a_long_image_is_refused_before_it_is_decoded(tmp_path, size):
    path = tmp_path / "long.png"
    path.write_bytes(headed(*size))
    for read in (folder.read_image, lambda path: folder.read_pixels(path, str(path)), maps.read_map):
        with pytest.raises(ValueError, match=rf"long\.png .*it is {size[0]}x{size[1]} pixels; crop it"):
            read(path)
    with pytest.raises(ValueError, match=r"long\.png cannot be read as an image"):
        folder.read_images(tmp_path, 224, 1)
    with pytest.raises(ValueError, match="a row cannot be read as an image"):
        folder.read_pixels(io.BytesIO(headed(*size)), "a row")


def test_what_is_64_times_as_long_is_read(tmp_path):
    for width, height in ((640, 10), (10, 640), (64, 1), (1, 1)):
        assert folder.read_pixels(picture(tmp_path / "a.png", width, height), "a").shape == (3, height, width)


def test_a_run_records_it_and_goes_on(tmp_path):
    for name in ("a.png", "c.png"):
        picture(tmp_path / name)
    (tmp_path / "b.png").write_bytes(headed(80_000_000, 1))
    os.mkfifo(tmp_path / "d.png")
    (tmp_path / "e.png").symlink_to("/dev/zero")
    data = folder.ImageFiles(tmp_path, [f"{letter}.png" for letter in "abcde"], ["folder"] * 5)
    found = in_time(lambda: worker.fetch(data, 0, range(5)))
    assert sorted(found.images) == [0, 2]
    assert "80000000x1" in found.failed[1]
    assert "it is a pipe" in found.failed[3]
    assert "it is a device" in found.failed[4]


def test_a_border_may_not_leave_a_line(tmp_path):
    picture(tmp_path / "thin.png", 300, 5)
    data = folder.ImageFiles(tmp_path, ["thin.png"], ["objectnet"], border=2)
    with pytest.raises(ValueError, match=r"thin\.png without its border is 296x1 pixels"):
        data.read(0)


# --- what is not a plain file


@pytest.mark.parametrize("kind", ["pipe", "device", "socket", "folder"])
def test_only_plain_files_are_opened(tmp_path, kind):
    path, bound = tmp_path / "x.png", None
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        bound = socket.socket(socket.AF_UNIX)
        bound.bind(str(path))
    else:
        path.mkdir()
    for read, file in (
        (folder.read_image, "x.png"),
        (maps.read_map, "x.png"),
        (folder.read_lines, "x.png"),
        (imagenet._mapping, "x.png"),
        (arrays._load_array, "x.png"),
        (lambda path: shards.Shards([path]), "x.png"),
        (read_text, "it is"),
    ):
        with pytest.raises(ValueError, match=rf"{file}.*it is a {kind}" if file != "it is" else f"it is a {kind}"):
            in_time(lambda read=read: read(path))
    if bound:
        bound.close()


def test_links_to_plain_files_are_read(tmp_path):
    picture(tmp_path / "real.png")
    (tmp_path / "linked.png").symlink_to(tmp_path / "real.png")
    assert folder.read_image(tmp_path / "linked.png").shape == (3, 6, 8)


def test_files_of_any_size(tmp_path):
    """Sparse ones, which take no room on a disk; /proc's say that they are empty."""
    picture(tmp_path / "x.png")
    os.truncate(tmp_path / "x.png", pictures.MOST_BYTES + 1)
    with pytest.raises(ValueError, match=r"x\.png cannot be read as an image: it has 536870913 bytes, and 536870912 is the most"):
        folder.read_image(tmp_path / "x.png")
    (tmp_path / "classes.txt").touch()
    os.truncate(tmp_path / "classes.txt", MOST_TEXT + 1)
    with pytest.raises(ValueError, match=r"classes\.txt cannot be read as a list: it has 16777217 bytes"):
        folder.read_lines(tmp_path / "classes.txt")
    with pytest.raises(ValueError, match="it has more than 5 bytes"):
        read_text("/proc/self/status", 5)
    with open_plain(tmp_path / "x.png", 2**30) as file:
        assert file.read(4) == b"\x89PNG"


# --- what readers of archives and arrays make of them


def test_long_images_in_a_shard(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("a.png", "b.png"):
            content = headed(80_000_000, 1) if name[0] == "a" else picture(tmp_path / "b.png").read_bytes()
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    data = shards.open_webdataset(tmp_path / "a.tar")
    with pytest.raises(ValueError, match=r"sample a\.tar/a cannot be read as an image: it is 80000000x1"):
        data.read(0)
    assert data.read(1).shape == (3, 6, 8)
    data._spans[1] = (tmp_path / "a.tar", 0, pictures.MOST_BYTES + 1)
    with pytest.raises(ValueError, match=r"sample a\.tar/b cannot be read as an image: it has 536870913 bytes"):
        data.read(1)


@pytest.mark.parametrize("shape", [(5, 1, 20_000_000, 3), (5, 20_000, 20_000, 3), (5, 0, 4, 3)])
def test_arrays_of_long_images(tmp_path, shape):
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": shape})
    (tmp_path / "fog.npy").write_bytes(head.getvalue())
    os.truncate(tmp_path / "fog.npy", len(head.getvalue()) + int(np.prod(shape)))
    np.save(tmp_path / "labels.npy", np.zeros(1, np.int64))
    with pytest.raises(ValueError, match=r"image of .*fog\.npy (is \d+x\d+ pixels|has 400000000 pixels)|cannot be read as an array"):
        arrays.CifarC("cifar10-c", tmp_path)


@pytest.mark.parametrize(
    ("shape", "chunks", "message"),
    [
        ((1, 3, 80_000_000, 1), (1, 1, 1024, 1), "images is 80000000x1 pixels"),
        ((9, 3, 6000, 6000), (9, 3, 6000, 6000), "images has chunks of"),
        ((2, 3, 5000, 5000), (2, 3, 5000, 5000), None),
    ],
)
def test_long_images_and_chunks_of_nyu(tmp_path, shape, chunks, message):
    with h5py.File(tmp_path / "nyu_depth_v2_labeled.mat", "w") as file:
        file.create_dataset("images", shape, np.uint8, chunks=chunks)  # never written, so of no size on a disk
        file.create_dataset("depths", (shape[0], 8, 6), np.float32)
    savemat(tmp_path / "splits.mat", {"testNdxs": np.array([[1.0]])})
    if message is None:
        assert len(maps.NyuV2(tmp_path, "test", 6)) == 1
        return
    with pytest.raises(ValueError, match=rf"is not NYUv2: {message}"):
        maps.NyuV2(tmp_path, "test", 6)


def test_rows_of_a_table(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"bytes": headed(80_000_000, 1), "path": None}, {"bytes": picture(tmp_path / "a.png").read_bytes(), "path": None}]
    data = datasets.Dataset.from_dict({"image": rows}, datasets.Features({"image": datasets.Image()}))
    found = worker.fetch(arrays.HuggingFace(data, "test", "image", None, str(tmp_path)), 0, range(2))
    assert (list(found.images), list(found.failed)) == ([1], [0])


# --- tables that name files outside of their folder


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """A set saved in good/, another in secret/, of which nothing may be read."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    content = picture(tmp_path / "a.png").read_bytes()
    data = datasets.Dataset.from_dict({"image": [{"bytes": content, "path": None}]}, datasets.Features({"image": datasets.Image()}))
    data.save_to_disk(tmp_path / "good")
    data.save_to_disk(tmp_path / "secret")
    datasets.DatasetDict({"test": data}).save_to_disk(tmp_path / "splits")
    (tmp_path / "files").mkdir()
    data.to_parquet(tmp_path / "secret.parquet")
    data.to_parquet(tmp_path / "files" / "own.parquet")
    return tmp_path


ARROW = "data-00000-of-00001.arrow"


@pytest.mark.parametrize("name", [f"../secret/{ARROW}", "/secret", "..", "", "a\\b", "C:a", "a\0", 5, None])
def test_a_saved_table_names_files_of_its_own_folder(tables, name):
    assert len(open_images("hf", tables / "good")) == 1
    state = json.loads((tables / "good" / "state.json").read_text())
    state["_data_files"] = [{"filename": str(tables / "secret" / ARROW) if name == "/secret" else name}]
    for place in ("good", "splits/test"):
        (tables / place / "state.json").write_text(json.dumps(state))
        with pytest.raises(ValueError, match=r"state\.json names .*, which is not a name in its folder"):
            open_images("hf", tables / place.split("/", maxsplit=1)[0])


@pytest.mark.parametrize("split", ["../secret", "..", "", "/"])
def test_a_saved_table_names_splits_of_its_own_folder(tables, split):
    assert open_images("hf", tables / "splits").names == ["test#0"]
    (tables / "splits" / "dataset_dict.json").write_text(json.dumps({"splits": [split]}))
    with pytest.raises(ValueError, match=r"dataset_dict\.json names .*, which is not a name in its folder"):
        open_images("hf", tables / "splits")


def test_a_saved_table_of_a_pipe(tables):
    (tables / "good" / ARROW).unlink()
    os.mkfifo(tables / "good" / ARROW)
    with pytest.raises(ValueError, match="it is a pipe"):
        in_time(lambda: open_images("hf", tables / "good"))


@pytest.mark.parametrize("name", ["../secret.parquet", "{tables}/secret.parquet", "../*.parquet"])
def test_a_readme_names_files_of_its_own_folder(tables, name):
    readme = tables / "files" / "README.md"
    text = "---\nconfigs:\n- config_name: default\n  data_files: {}\n---\n"
    readme.write_text(text.format("own.parquet"))
    assert len(open_images("hf", tables / "files")) == 1
    readme.write_text(text.format(json.dumps(name.format(tables=tables))))
    with pytest.raises(ValueError, match=r"its data_files name .*secret\.parquet, which lies outside of it"):
        open_images("hf", tables / "files")


# --- names that no file can have


@pytest.mark.parametrize("name", ["x" * 300, "a" * 250 + "/" + "b" * 300, "x\0y", "x" * 5000])
@pytest.mark.parametrize(
    "data",
    ["folder", "imagenet", "imagenet-a", "imagenet-c", "imagenet-v2", "objectnet", "cifar10-c", "cifar10", "food101", "hf", "webdataset"],
)
def test_a_root_that_no_file_can_be_named(data, name):
    with pytest.raises(ValueError, match=name[:9].replace("\0", ".*")):
        open_images(data, Path(name))


@pytest.mark.parametrize("data", ["ade20k", "ade20k-c", "nyuv2", "map-folder"])
def test_a_root_of_maps_that_no_file_can_be_named(data):
    with pytest.raises(ValueError, match="x" * 20):
        open_images(data, Path("x" * 300), size=8)
    for read in (folder.read_image, lambda path: folder.read_images(path, 8, 1)):
        with pytest.raises(ValueError, match="x" * 20):
            read("x" * 300)
