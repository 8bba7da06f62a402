"""Archives made by hand to show Python one list of members and torch another: refused before torch reads them."""

from __future__ import annotations

import io
import os
import runpy
import struct
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given

from dtta_fast import embed
from dtta_fast.denoisers.dit import DiT
from dtta_fast.embed.exporting import check_target
from dtta_fast.runtime.archives import END, END64, check_archive

HELPERS = runpy.run_path(str(Path(__file__).with_name("damage.py")))
fuzz, seeds, damaged, listing = (HELPERS[name] for name in ("fuzz", "seeds", "damaged", "listing"))


@dataclass(frozen=True)
class Member:
    """What a member's two headers say; own_name is the one where it lies."""

    name: bytes
    data: bytes = b"content"
    own_name: bytes | None = None
    own_size: int | None = None
    flags: int = 0
    method: int = 0
    attributes: int = 0
    extra: bytes = b""
    comment: bytes = b""
    at: int | None = None

    def lies(self) -> bytes:
        size = len(self.data) if self.own_size is None else self.own_size
        name = self.name if self.own_name is None else self.own_name
        numbers = (zlib.crc32(self.data), len(self.data), size)
        return b"PK\3\4" + struct.pack("<5H3I2H", 20, self.flags, self.method, 0, 0, *numbers, len(name), 0) + name + self.data

    def listed(self, offset: int) -> bytes:
        numbers = (zlib.crc32(self.data), len(self.data), len(self.data), len(self.name), len(self.extra), len(self.comment), 0, 0)
        head = struct.pack("<6H3I5H2I", 0x314, 20, self.flags, self.method, 0, 0, *numbers, self.attributes, offset)
        return b"PK\1\2" + head + self.name + self.extra + self.comment


def end(count: int, length: int, begin: int, comment: bytes = b"") -> bytes:
    return END + struct.pack("<4H2IH", 0, 0, count, count, length, begin, len(comment)) + comment


def end64(count: int, length: int, begin: int, place: int, rest: int = 44) -> bytes:
    found = END64 + struct.pack("<Q2H2I4Q", rest, 45, 45, 0, 0, count, count, length, begin)
    return found + b"PK\6\7" + struct.pack("<IQI", 0, place, 1)


def parts(*members: Member) -> tuple[bytes, bytes]:
    """The members in a row, and their directory."""
    row, directory = b"", b""
    for member in members:
        directory += member.listed(len(row) if member.at is None else member.at)
        row += member.lies()
    return row, directory


def archive(*members: Member) -> bytes:
    row, directory = parts(*members)
    return row + directory + end(len(members), len(directory), len(row))


GOOD = (Member(b"a/version", b"3"), Member(b"a/data.pkl"), Member(b"a/data/0", b"x" * 100))
ROW, DIRECTORY = parts(*GOOD)


def test_archives_that_can_be_read_in_one_way(tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "torch.pt")
    with zipfile.ZipFile(tmp_path / "python.zip", "w") as written:
        written.writestr("a/b", b"x")
        with written.open("a/c", "w", force_zip64=True) as file:
            file.write(b"y" * 1000)
    whole = io.BytesIO()

    class Stream(io.RawIOBase):  # cannot go back, so sizes follow the members
        def write(self, data):
            return whole.write(data)

    with zipfile.ZipFile(Stream(), "w") as written:
        written.writestr("a/b", b"x")
    (tmp_path / "stream.zip").write_bytes(whole.getvalue())
    (tmp_path / "own.zip").write_bytes(archive(*GOOD))
    (tmp_path / "own64.zip").write_bytes(
        ROW + DIRECTORY + end64(3, len(DIRECTORY), len(ROW), len(ROW + DIRECTORY)) + end(0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
    )
    for name in ("torch.pt", "python.zip", "stream.zip", "own.zip", "own64.zip"):
        check_archive(tmp_path / name)
        assert zipfile.ZipFile(tmp_path / name).testzip() is None


def two_directories(hidden: bytes) -> bytes:
    """The end names the first one's place and the second one's length: zipfile takes what is before the end, torch what is at the place."""
    _, directory = parts(*GOOD[:-1], replace(GOOD[-1], name=hidden, own_name=GOOD[-1].name))
    return ROW + directory + DIRECTORY + end(3, len(DIRECTORY), len(ROW))


def test_python_and_torch_see_other_members(tmp_path):
    """What the check is for."""
    path = tmp_path / "a.pt2"
    path.write_bytes(two_directories(b"a/secret"))
    assert zipfile.ZipFile(path).namelist() == [member.name.decode() for member in GOOD]
    assert "secret" in torch._C.PyTorchFileReader(str(path)).get_all_records()
    with pytest.raises(ValueError, match="its directory is not where its end says"):
        check_archive(path)


GAP = b"between"
LONG = b"a/" + b"n" * 510
ROW64 = end64(3, len(DIRECTORY), len(ROW), len(ROW + DIRECTORY))
HOSTILE = {
    "two directories": (two_directories(b"../../xx"), "its directory is not where its end says"),
    "bytes in front": (b"#!" + archive(*GOOD), "its directory is not where its end says"),
    "bytes in front, counted": (
        b"#!" + GOOD[0].lies() + GOOD[0].listed(2) + end(1, len(GOOD[0].listed(2)), 2 + len(GOOD[0].lies())),
        "bytes before its member 'a/version'",
    ),
    "bytes before the directory": (ROW + GAP + DIRECTORY + end(3, len(DIRECTORY), len(ROW + GAP)), "belong to no member"),
    "bytes before the end": (ROW + DIRECTORY + GAP + end(3, len(DIRECTORY), len(ROW)), "its directory is not where"),
    "bytes between members": (archive(GOOD[0], replace(GOOD[1], at=len(GOOD[0].lies()) + 1)), "bytes before its member 'a/data.pkl'"),
    "a comment": (ROW + DIRECTORY + end(3, len(DIRECTORY), len(ROW), b"comment"), "is cut, or has a comment"),
    "a second end in the comment": (
        ROW + DIRECTORY + end(3, len(DIRECTORY), len(ROW), end(1, 60, 0)),
        "its directory is not where its end says",
    ),
    "bytes at the end": (archive(*GOOD) + GAP, "is cut, or has a comment"),
    "a second archive": (archive(*GOOD) + archive(*GOOD), "its directory is not where its end says"),
    "another count": (ROW + DIRECTORY + end(2, len(DIRECTORY), len(ROW)), "has 3 members, and its end says 2"),
    "no member": (end(0, 0, 0), "with 1 to 65536 members"),
    "too many members": (
        ROW + DIRECTORY + end64(2**40, len(DIRECTORY), len(ROW), len(ROW + DIRECTORY)) + end(0xFFFF, len(DIRECTORY), len(ROW)),
        "with 1 to 65536 members",
    ),
    "ends that differ": (ROW + DIRECTORY + ROW64 + end(2, len(DIRECTORY), len(ROW)), "do not say the same"),
    "ends of other places": (ROW + DIRECTORY + ROW64 + end(3, len(DIRECTORY), 0), "do not say the same"),
    "an end elsewhere": (ROW + DIRECTORY + end64(3, len(DIRECTORY), len(ROW), 5) + end(3, len(DIRECTORY), len(ROW)), "do not fit together"),
    "a longer end": (
        ROW + DIRECTORY + end64(3, len(DIRECTORY), len(ROW), len(ROW + DIRECTORY), 52) + end(3, len(DIRECTORY), len(ROW)),
        "do not fit together",
    ),
    "another name where it lies": (archive(replace(GOOD[0], own_name=b"a/../../xx"[:9])), "where it lies"),
    "another size where it lies": (archive(replace(GOOD[0], own_size=9)), "has other sizes where it lies"),
    "sizes that do not follow": (archive(replace(GOOD[0], flags=8), GOOD[1]), "has other sizes after it"),
    "twice": (archive(GOOD[0], GOOD[0]), "is there twice"),
    "twice but for the case": (archive(GOOD[0], replace(GOOD[0], name=b"A/VERSION")), "is there twice"),
    "two in one place": (archive(GOOD[0], Member(b"a/x", b"3", at=0)), "that belong to none, or to two"),
    "compressed": (archive(replace(GOOD[0], method=8)), "is compressed"),
    "encrypted": (archive(replace(GOOD[0], flags=1)), "is encrypted"),
    "commented": (archive(replace(GOOD[0], comment=b"c")), "is damaged, or has comments"),
    "a size twice": (archive(replace(GOOD[0], extra=struct.pack("<2H3Q", 1, 24, 1, 1, 0))), "gives the size of a member twice"),
    "a cut extra field": (archive(replace(GOOD[0], extra=struct.pack("<2H", 7, 90))), "damaged extra field"),
    "a link": (archive(replace(GOOD[0], attributes=0o120777 << 16)), "is a link"),
    **{
        f"the name {name[:20]!r}": (archive(Member(name)), "leads out of its folder, or is none|is not named in UTF-8")
        for name in (
            b"../x", b"a/../../x", b"a/..", b"..", b".", b"a/./x", b"/etc/x", b"a//x", b"a/", b"", b"a\\x", b"..\\x", b"C:x", b"C:/x",
            b"a/.. /x", b"a/.../x", b"a\0", b"a\nb", b"\xff", "a/\u202ex".encode(), LONG,
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_archives(tmp_path, kind):
    content, message = HOSTILE[kind]
    path = tmp_path / "a.pt2"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.pt2 is not a package of an adaptation: .*({message}).*; export it again"):
        embed.load(path)
    path.write_bytes(content)
    if content[:4] == b"PK\3\4":
        with pytest.raises(ValueError, match=rf"a\.pt2 cannot be read as a checkpoint of tensors: .*({message})"):
            DiT.from_original(path, num_heads=2)
    assert listing(tmp_path) == ["a.pt2"]


def test_every_cut_is_refused(tmp_path):
    path, whole = tmp_path / "a.pt2", archive(*GOOD)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"^its? "):
            check_archive(path)


class Stored:
    """A package's function that gives what it was made with."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self.tensors = tensors

    def run(self, given: list[torch.Tensor]) -> list[torch.Tensor]:
        return [tensor.clone() for tensor in self.tensors]


def test_a_state_that_is_none_changes_nothing():
    values = {"format": 1, "batch": 1, "height": 8, "width": 8, "steps": 1, "guard": 0, "evaluations": 1, "online": True}
    words = dict.fromkeys(("torch", "device", "capability", "instructions", "weights", "config", "task", "outputs", "state"), "")
    package = embed.Package(embed.Manifest(**values, **words), {"state": Stored(torch.ones(2, 3), torch.tensor(4))})
    state = package.state_dict()
    one, step = state["state"]
    for tensors in (
        None,
        (one, step),
        [one],
        [one, 5],
        [one, None],
        [one.double(), step],
        [one.T, step],
        [one.to("meta"), step],
        [one, step.to("meta")],
        [one.to_sparse(), step],
        [one * float("nan"), step],
        [one / 0, step],
    ):
        with pytest.raises(ValueError, match=r"^state holds .*; give what state_dict\(\) gave"):
            package.load_state_dict({**state, "state": tensors})
    for other in (None, [], {}, {**state, "weights": "other"}, {**state, "more": 1}, {"state": state["state"]}):
        with pytest.raises(ValueError, match=r"^state is not of a package with weights"):
            package.load_state_dict(other)
    for found, expected in zip(package.state_dict()["state"], (torch.ones(2, 3), torch.tensor(4)), strict=True):
        assert torch.equal(found, expected)
    package.load_state_dict({**state, "state": [one + 1, step + 1]})
    assert float(package.state_dict()["state"][0].sum()) == 12


@pytest.mark.parametrize("name", ["x" * 300 + ".pt2", "x" * 250 + ".pt2", "é" * 124 + ".pt2", "x" * 300 + "/a.pt2", "x\0y/a.pt2"])
def test_a_target_that_no_file_can_be_named(tmp_path, name):
    """Said before anything is compiled."""
    with pytest.raises(ValueError, match=r"path is .*(whose name is too long|give a file ending in)"):
        check_target(tmp_path / name, 1)
    check_target(tmp_path / ("x" * 200 + ".pt2"), 1)


def test_what_is_no_plain_file(tmp_path):
    os.mkfifo(tmp_path / "a.pt2")
    with pytest.raises(FileNotFoundError, match="no such file"):
        embed.load(tmp_path / "a.pt2")
    with pytest.raises(FileNotFoundError, match="x" * 300):
        embed.load("x" * 300)


@fuzz
@given(seed=seeds)
def test_what_is_taken_is_one_list_to_both(tmp_path_factory, seed):
    path = tmp_path_factory.getbasetemp() / "both.pt"
    torch.save({"a": torch.zeros(3), "b": torch.ones(2)}, path)
    path.write_bytes(damaged(path.read_bytes(), seed))
    try:
        check_archive(path)
    except ValueError:
        return
    names = zipfile.ZipFile(path).namelist()
    try:
        read = torch._C.PyTorchFileReader(str(path)).get_all_records()
    except RuntimeError:
        return
    assert sorted(name.partition("/")[2] for name in names) == sorted(read)
