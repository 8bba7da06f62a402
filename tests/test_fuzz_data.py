"""Readers of data on damaged and hostile files: a valid value, or ValueError, which names the file; nothing is read or written outside."""

from __future__ import annotations

import io
import json
import os
import random
import runpy
import struct
import tarfile
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

from dtta_fast.data import arrays, folder, imagenet, maps, shards

HELPERS = runpy.run_path(str(Path(__file__).with_name("damage.py")))
DEEP, fuzz, few, values, seeds, damaged, changed, held, sub = (
    HELPERS[name] for name in ("DEEP", "fuzz", "few", "values", "seeds", "damaged", "changed", "held", "sub")
)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


# --- images


def _bytes_of(kind: str, size=(16, 12)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


IMAGES = {"png": "PNG", "jpg": "JPEG", "bmp": "BMP", "tif": "TIFF", "webp": "WEBP"}


@fuzz
@given(seed=seeds, suffix=st.sampled_from(sorted(IMAGES)))
def test_images(place, seed, suffix):
    here = sub(place, "images")
    path = here / f"a.{suffix}"
    path.write_bytes(_bytes_of(IMAGES[suffix]))
    assert folder.read_pixels(path, str(path)).shape == maps.read_image(path).shape == (3, 12, 16)
    path.write_bytes(damaged(_bytes_of(IMAGES[suffix]), seed))
    for read in (lambda: folder.read_pixels(path, str(path)), lambda: folder.read_image(path), lambda: maps.read_map(path)):
        found = held(read, str(path), root=here)
        assert found is None or found.numel() <= 3 * Image.MAX_IMAGE_PIXELS
    held(lambda: folder.open_folder(here), str(here))


def _png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")


def test_bombs_and_interpreters(tmp_path):
    for name, content in {
        "huge.png": _png(10_000, 10_000),  # between PIL's limit and its double
        "larger.png": _png(2**31 - 1, 2**31 - 1),
        "program.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
    }.items():
        (tmp_path / name).write_bytes(content)
        for read in (folder.read_image, maps.read_map):
            with pytest.raises(ValueError, match=f"{name} (cannot be read as an image|cannot be read as a map)") as raised:
                read(tmp_path / name)
            assert name != "program.png" or "cannot identify" in str(raised.value)


def test_links_without_end(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(_bytes_of("PNG"))
    for name in "bcde":
        os.symlink(tmp_path, tmp_path / "a" / name)
    os.symlink(tmp_path / "a", tmp_path / "linked")  # a link to elsewhere is followed
    assert folder.image_files(tmp_path) == ["a/x.png", "linked/x.png"]


@fuzz
@given(seed=seeds, value=values, lines=st.binary(max_size=30))
def test_lists_of_classes(place, seed, value, lines):
    here = sub(place, "lists")
    for inner in ("images", "maps"):
        (sub(here, inner) / "a.png").write_bytes(_bytes_of("PNG"))
    (here / "classes.txt").write_bytes(lines)
    held(lambda: maps.open_map_folder(here, 8), "classes.txt")
    (here / "objectInfo150.txt").write_bytes(lines)
    held(lambda: maps._ade20k_names(here), "objectInfo150.txt")
    mappings = sub(here, "mappings")
    contents = [{"images": "Image"}, {"Image": "tench; goldfish"}, {"0": 0, "1": 1}]
    names = ("folder_to_objectnet_label.json", "objectnet_to_imagenet_1k.json", "pytorch_to_imagenet_2012_id.json")
    for i, (name, content) in enumerate(zip(names, contents, strict=True)):
        text = json.dumps(changed(content, value, seed) if seed % 3 == i else content)
        (mappings / name).write_text(DEEP if seed % 11 == i else text)
    (mappings / "imagenet_to_label_2012_v2").write_bytes(lines if seed % 5 == 0 else b"tench\ngoldfish\n")
    held(lambda: imagenet.open_objectnet(here), str(here))


# --- archives and arrays


def _tar(cls: bytes = b"1", name: str = "a") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for member, content in ((f"{name}.png", _bytes_of("PNG")), (f"{name}.cls", cls)):
            about = tarfile.TarInfo(member)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    return buffer.getvalue()


def _signed(head: bytes) -> bytes:
    """With the checksum that its bytes have."""
    head = head[:148] + b" " * 8 + head[156:]
    return head[:148] + b"%06o\0 " % sum(head) + head[156:]


@fuzz
@given(seed=seeds)
def test_shards(place, seed):
    here, whole, draw = sub(place, "shards"), _tar(), random.Random(seed)
    (here / "a.tar").write_bytes(whole)
    assert shards.open_webdataset(here)[0].shape == (3, 12, 16)
    head = bytearray(whole[:512])
    at = draw.choice((100, 124, 124, 136, 156, 157, 257, 345))
    head[at : at + 12] = draw.choice((b"\xff" * 12, b"\x80" + b"\0" * 3 + b"\x7f" * 8, draw.randbytes(12), b"77777777777\0"))
    for content in (damaged(whole, seed), _signed(bytes(head)[:512]) + whole[512:]):
        (here / "a.tar").write_bytes(content)
        data = held(lambda: shards.open_webdataset(here), "a.tar", root=here)
        for i in range(len(data) if data else 0):
            held(lambda i=i, data=data: data[i], "a.tar", root=here)


def test_hostile_tars(tmp_path):
    def negative(kind: bytes) -> bytes:
        return _signed(_tar()[:124] + b"\xff" * 10 + b"\xfe\x00" + _tar()[136:156] + kind + _tar()[157:512]) + _tar()[512:]

    head = tarfile.TarInfo("././@LongLink")
    head.type, head.size = tarfile.GNUTYPE_LONGNAME, 512
    for content in (
        negative(b"0"),
        negative(b"5"),
        negative(b"Z"),
        (head.tobuf(tarfile.GNU_FORMAT) + bytes(512)) * 3000,
        _tar(b"1" * 5000),
    ):
        (tmp_path / "a.tar").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.tar"):
            shards.open_webdataset(tmp_path)
    for name in ("../../escaped", "/tmp/escaped", "C:\\escaped"):
        (tmp_path / "a.tar").write_bytes(_tar(name=name))
        assert held(lambda: shards.open_webdataset(tmp_path)[0].shape, root=tmp_path) == (3, 12, 16)
    for pattern in ("{0..999999999}.tar", "{a,b}" * 40, "{" * 3000, "{3..1}.tar", "{²..³}.tar"):
        with pytest.raises(ValueError, match=r"root is|is missing"):
            shards.open_webdataset(Path(pattern))


@fuzz
@given(seed=seeds)
def test_arrays(place, seed):
    here, buffer = sub(place, "arrays"), io.BytesIO()
    np.save(buffer, np.zeros((10, 4, 4, 3), np.uint8))
    archive, labels, pickled = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.savez(archive, np.zeros(3))
    np.save(labels, np.arange(10))
    np.save(pickled, np.array([{}], object), allow_pickle=True)
    kinds = (damaged(buffer.getvalue(), seed), archive.getvalue(), damaged(archive.getvalue(), seed), pickled.getvalue())
    (here / "labels.npy").write_bytes(labels.getvalue())
    (here / "fog.npy").write_bytes(buffer.getvalue())
    assert len(arrays.CifarC("cifar10-c", here)) == 10
    for name, content in ((name, content) for name in ("fog", "labels") for content in kinds):
        (here / "labels.npy").write_bytes(labels.getvalue())
        (here / f"{name}.npy").write_bytes(content)
        data = held(lambda: arrays.CifarC("cifar10-c", here), ".npy", root=here)
        assert data is None or data[0].shape[0] == 3


@few
@given(seed=seeds)
def test_nyu(place, seed):
    here = sub(place, "nyu")
    if not (here / "kept").is_file():
        with h5py.File(here / "kept", "w") as file:
            file["images"], file["depths"] = np.zeros((3, 3, 8, 6), np.uint8), np.ones((3, 8, 6), np.float32)
        savemat(here / "numbers", {"testNdxs": np.array([[1.0], [3.0]])}, appendmat=False)
    names = {"kept": "nyu_depth_v2_labeled.mat", "numbers": "splits.mat"}
    for source, name in names.items():
        (here / name).write_bytes((here / source).read_bytes())
    assert [depth.shape for _, depth, _ in map(maps.NyuV2(here, "test", 6).pair, range(2))] == [(6, 8)] * 2
    for one in names:
        for source, name in names.items():
            content = (here / source).read_bytes()
            (here / name).write_bytes(damaged(content, seed) if source == one else content)
        data = held(lambda: maps.NyuV2(here, "test", 6), str(here), root=here)
        for i in range(len(data) if data else 0):
            held(lambda i=i, data=data: data[i], str(here), root=here)


def test_arrays_in_other_files(tmp_path):
    (tmp_path / "secret").write_bytes(bytes(3 * 3 * 8 * 6))
    savemat(tmp_path / "splits.mat", {"testNdxs": np.array([[1.0]])})
    for kind in ("external", "link", "soft", "virtual"):
        with h5py.File(tmp_path / "nyu_depth_v2_labeled.mat", "w") as file:
            file["depths"], shape = np.ones((3, 8, 6), np.float32), (3, 3, 8, 6)
            if kind == "external":
                file.create_dataset("images", shape, np.uint8, external=[(str(tmp_path / "secret"), 0, 432)])
            elif kind == "virtual":
                layout = h5py.VirtualLayout(shape, np.uint8)
                layout[:] = h5py.VirtualSource(tmp_path / "secret", "x", shape)
                file.create_virtual_dataset("images", layout)
            else:
                file["images"] = h5py.ExternalLink("secret", "/x") if kind == "link" else h5py.SoftLink("/depths")
        with pytest.raises(ValueError, match=r"is not NYUv2: images (is missing, or a link|lies in another file)"):
            maps.NyuV2(tmp_path, "test", 6)


def test_names_that_lead_out_of_a_set(tmp_path):
    for inner in ("annotations", "images"):
        (tmp_path / "oxford-iiit-pet" / inner).mkdir(parents=True)
    for name in ("../../../escaped", "/etc/escaped"):
        (tmp_path / "oxford-iiit-pet/annotations/test.txt").write_text(f"{name} 1 1 1\n")
        with pytest.raises(ValueError, match=r"lies outside of|leads out|is outside"):
            arrays.open_torchvision("pets", tmp_path, "test")


def test_rows_that_lead_out_of_a_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    for name in ("in/x.png", "out/x.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(_bytes_of("PNG"))
    for where, names in (("in", None), ("out", "lies outside of")):
        data = datasets.Dataset.from_dict({"image": [str(tmp_path / where / "x.png")]}).cast_column("image", datasets.Image())
        read = arrays.HuggingFace(data, "test", "image", None, str(tmp_path / "in"))
        assert (held(lambda read=read: read[0].shape, names or "x.png") is None) == (where == "out")


def test_a_linked_root_holds_what_its_folder_holds(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "real" / "test" / "cat").mkdir(parents=True)
    (tmp_path / "real" / "test" / "cat" / "0.png").write_bytes(_bytes_of("PNG"))
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    assert arrays.open_hugging_face(str(tmp_path / "linked"), "test").read(0).shape[0] == 3
