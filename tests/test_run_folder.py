"""The folder of a run: nothing of others is removed or overwritten, and its records belong to the data that was read."""

from __future__ import annotations

import json
import os
import random
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dtta_fast.runs import content, state
from dtta_fast.runs.content import digest, read_again
from dtta_fast.runs.folder import RunFolder
from dtta_fast.runs.writing import check_name, write_whole

record_of = runpy.run_path(str(Path(__file__).with_name("report_runs.py")))["record_of"]
CONFIG = {"data": {"name": "digits-c"}, "task": "classification", "protocol": "online", "adapt": {"steps": 1}}
OTHER = {**CONFIG, "adapt": {"steps": 2}}
BATCHES = [[0, 1, 2], [3, 4], [5]]
SIX = [record_of(i, "classification", ("fog2",), random.Random(i)) for i in range(6)]
for number, ids in enumerate(BATCHES):
    for i in ids:
        SIX[i]["batch"] = number
DATA = SimpleNamespace(
    names=[record["path"] for record in SIX], groups=["fog2"] * 6, labels=[record["label"] for record in SIX], classes=("zero",)
)
STATE = {
    "step": torch.tensor(3),
    "theta": {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.zeros(())},
    "phi": {},
    "theta_slots": [[torch.ones(2, 3), torch.full((), 2.0)]],
    "phi_slots": [],
}
LAST_STATES = ("state-00000001.safetensors", "state-00000002.safetensors")  # of three batches, which a run that has ended keeps
FOREIGN = {
    "thesis.txt.new": b"three years",
    "state-of-the-art.safetensors": b"weights",
    "lock-me": b"",
    "records-old.jsonl": b"{}",
    "records.jsonl.bak": b"{}",
    "summary.json.new": b"{}",
    "config.json.7.new.gz": b"",
}


def open_folder(folder: Path, config=CONFIG, batches=BATCHES, data=DATA, part="", **options) -> RunFolder:
    return RunFolder(folder, config, batches, data, part, **options)


def batch(number: int) -> list[dict]:
    return [SIX[i] for i in BATCHES[number]]


def write(folder: Path, upto: int = 3, **options) -> None:
    with open_folder(folder, **options) as opened:
        for k in range(upto):
            opened.append(k, batch(k))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def put(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, held in files.items():
        (folder / name).write_bytes(held)
    return folder


class Killed(BaseException):
    pass


def kill_at(patch: pytest.MonkeyPatch, stop: int) -> list[str]:
    """From now on the call of this number, of those that change files, is the last one; the calls so far."""
    calls: list[str] = []
    for name, real in [(name, getattr(os, name)) for name in ("write", "fsync", "replace", "unlink", "rename")]:

        def call(*arguments, name=name, real=real, **keywords):
            calls.append(name)
            if len(calls) > stop:
                raise Killed
            return real(*arguments, **keywords)

        patch.setattr(os, name, call)
    return calls


def test_files_of_others_in_a_run_s_folder_stay(tmp_path):
    """Through every way to write: a batch, a state, the end, and beginning again."""
    folder = tmp_path / "run"
    write(folder, 1)
    put(folder, FOREIGN)
    (folder / "notes.new").mkdir()
    (folder / "records.jsonl.3.new").mkdir()
    for overwrite in (False, True):
        with open_folder(folder, overwrite=overwrite) as opened:
            for k in opened.remaining():
                opened.save_state(k, STATE)
                opened.append(k, batch(k))
            opened.finish()
        kept = contents(folder)
        assert {name: kept[name] for name in FOREIGN} == FOREIGN
        assert set(kept) == {*FOREIGN, "lock", "config.json", "records.jsonl", *LAST_STATES}
    assert (folder / "notes.new").is_dir()


def test_a_state_of_that_name_that_a_run_did_not_write_stays(tmp_path):
    from safetensors.torch import save

    folder, theirs = tmp_path / "run", save({"a": torch.ones(2)})
    write(folder, 1)
    put(folder, {"state-00000000.safetensors": theirs, "lock-1": b"mine"})
    with open_folder(folder) as opened:
        for k in (1, 2):
            opened.save_state(k, STATE)
            opened.append(k, batch(k))
        opened.finish()
    assert contents(folder)["state-00000000.safetensors"] == theirs
    assert contents(folder)["lock-1"] == b"mine"


def test_what_a_kill_left_is_cleared_after_the_config_was_checked(tmp_path):
    folder = tmp_path / "run"
    write(folder, 1)
    put(folder, {f"{name}.123.new": b"{" for name in ("config.json", "records.jsonl", "records-3.jsonl", "state-00000001.safetensors")})
    before = contents(folder)
    with pytest.raises(ValueError, match=r"another config: adapt.steps: 1 / 2 .*--overwrite"):
        open_folder(folder, OTHER)
    assert contents(folder) == before
    write(folder, 1)
    assert set(contents(folder)) == {"lock", "config.json", "records.jsonl"}


def test_a_kill_in_the_first_write_does_not_lock_a_run_out(tmp_path):
    put(tmp_path / "run", {"lock": b"", "config.json.7.new": b'{"da'})
    write(tmp_path / "run")
    assert set(contents(tmp_path / "run")) == {"lock", "config.json", "records.jsonl"}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": b'{"architectures": ["ResNet"]}', "model.safetensors": b"w"}, r"config.json is damaged, or not that of a run"),
        ({"config.json": b"{"}, r"config.json is damaged"),
        ({"config.json": b'{"data": "x", "task": 3, "adapt": []}'}, r"config.json is damaged"),
        ({"records.jsonl": b"my own records\n"}, r"holds records without a config.json"),
        ({"summary.json": b"{}"}, r"is not a run's folder, and holds 'summary.json'"),
        ({"lock": b"chain"}, r"is not a run's folder, and holds 'lock'"),
        ({"state-00000003.safetensors": b"x"}, r"holds 'state-00000003.safetensors'"),
        ({"config.json.9.new": b"{"}, r"holds 'config.json.9.new'"),
    ],
)
def test_folders_that_hold_such_names_of_others_are_refused(tmp_path, files, message, overwrite):
    folder = put(tmp_path / "theirs", files)
    with pytest.raises(ValueError, match=message) as raised:
        open_folder(folder, overwrite=overwrite)
    assert str(folder) in str(raised.value)
    assert contents(folder) == files


def test_a_folder_of_others_is_refused_until_it_is_asked_for(tmp_path):
    folder = put(tmp_path / "thesis", FOREIGN)
    with pytest.raises(ValueError, match=r"thesis is not a run's folder: it holds .* and others; name another folder, or give --overwrite"):
        open_folder(folder)
    assert contents(folder) == FOREIGN
    write(folder, overwrite=True)
    assert {name: contents(folder)[name] for name in FOREIGN} == FOREIGN
    with open_folder(folder) as opened:
        assert not opened.remaining()  # it is a run's now


def test_beginning_again_keeps_the_run_until_its_first_batch(tmp_path):
    folder = tmp_path / "run"
    write(folder)
    put(folder, {"summary.json": b'{"a": 1}'})
    before = contents(folder)
    with open_folder(folder, OTHER, overwrite=True) as opened:
        assert opened.remaining() == [0, 1, 2]
        assert contents(folder) == before  # a model that is not there loses nothing
        opened.append(0, batch(0))
    assert set(contents(folder)) == {"lock", "config.json", "records.jsonl"}
    assert json.loads(contents(folder)["config.json"]) == OTHER
    assert contents(folder)["records.jsonl"].count(b"\n") == 3


@pytest.mark.parametrize("config", [CONFIG, OTHER])
def test_killed_at_any_system_call_beginning_again_keeps_one_run(tmp_path, monkeypatch, config):
    """The run that was there stays until the first batch of the new one is on the disk; no record is ever beside another's config."""
    old, new = (json.dumps(record) + "\n" for record in (SIX[0], {**SIX[0], "seconds": 77.0}))
    again = [{**record, "seconds": 77.0} for record in batch(0)]
    for stop in range(100):
        folder = tmp_path / str(stop)
        with open_folder(folder) as opened:
            for k in range(3):
                opened.save_state(k, STATE)
                opened.append(k, batch(k))
            opened.finish()
        put(folder, {"summary.json": b'{"a": 1}'})
        before = contents(folder)
        with monkeypatch.context() as patch:
            calls = kill_at(patch, stop)
            try:
                with open_folder(folder, config, overwrite=True) as opened:
                    opened.save_state(0, STATE)
                    opened.append(0, again)
                killed = False
            except Killed:
                killed = True
        now = {name: held for name, held in contents(folder).items() if not name.endswith(".new")}
        wanted = {"lock", "config.json", "records.jsonl", "state-00000000.safetensors"}
        if "summary.json" in now:
            assert now == before
        elif "records.jsonl" in now:
            theirs = now["records.jsonl"].startswith(new.encode())
            assert theirs or now["records.jsonl"] == before["records.jsonl"]
            assert json.loads(now["config.json"]) == (config if theirs else CONFIG)
            assert not theirs or set(now) == wanted
        if not killed:
            assert now["records.jsonl"].startswith(new.encode()) and set(contents(folder)) == wanted  # noqa: PT018
            break
        if json.loads(now["config.json"]) == config and "records.jsonl" in now and now["records.jsonl"].startswith(old.encode()):
            continue
        (folder / "summary.json").unlink(missing_ok=True)
        open_folder(folder, json.loads(now["config.json"])).__exit__()
        assert not [name for name in contents(folder) if name.endswith(".new")]
    assert 8 < stop < 99
    assert calls


def test_beginning_again_on_a_full_disk_keeps_the_run(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    write(folder)
    put(folder, {"summary.json": b'{"a": 1}'})
    before = contents(folder)
    real = os.fsync
    for room in range(3):
        left = [room]

        def full(descriptor, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(28, "No space left on device")
            real(descriptor)

        with monkeypatch.context() as patch, open_folder(folder, OTHER, overwrite=True) as opened:
            patch.setattr(os, "fsync", full)
            opened.save_state(0, STATE)
            with pytest.raises(OSError, match=r"records.jsonl cannot be written: No space left on device; the run that was there is kept"):
                opened.append(0, batch(0))
        assert contents(folder) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["records.jsonl", "records-5.jsonl", "summary.json", "config.json", "lock", "state-00000000.safetensors"])
def test_links_of_a_run_s_names_are_not_followed_when_they_are_removed(tmp_path, name, overwrite):
    """Nor when they are read or written; nor are pipes waited for."""
    folder, precious = tmp_path / "run", tmp_path / "precious"
    write(folder, 1)
    held = contents(folder).get(name, b"precious")
    (folder / name).unlink(missing_ok=True)
    for make, kind in (
        (lambda: (precious.write_bytes(held), (folder / name).symlink_to(precious)), "a link"),
        (lambda: (folder / name).symlink_to(tmp_path / "nowhere"), "a link"),
        (lambda: os.mkfifo(folder / name), "a pipe"),
    ):
        make()
        with pytest.raises(ValueError, match=rf"{name} is {kind}, and a run's own files are plain ones"):
            write(folder, overwrite=overwrite)
        (folder / name).unlink()
    assert precious.read_bytes() == held
    assert not (tmp_path / "nowhere").exists()


def test_a_link_that_comes_while_a_run_goes_is_not_written_through(tmp_path):
    folder, precious = tmp_path / "run", tmp_path / "precious"
    precious.write_bytes(b"precious")
    with open_folder(folder) as opened:
        (folder / "records.jsonl").symlink_to(precious)
        with pytest.raises(ValueError, match=r"records.jsonl is a link"):
            opened.append(0, batch(0))
        (folder / "records.jsonl").unlink()
        for k in range(3):
            opened.append(k, batch(k))
        opened.finish()
        (folder / "summary.json").symlink_to(precious)
        with pytest.raises(ValueError, match=r"summary.json is a link"):
            opened.write_summary({})
    assert precious.read_bytes() == b"precious"


def test_files_of_others_that_have_a_run_s_names_stay(tmp_path):
    from safetensors.torch import save

    folder, theirs = tmp_path / "run", save({"a": torch.ones(2)})
    write(folder, 1)
    put(folder, {"state-00000001.safetensors": theirs, "records-\u0661.jsonl": b"h", "config.json.\u0661.new": b"g"})
    before = contents(folder)
    for overwrite in (False, True):
        with (
            open_folder(folder, overwrite=overwrite) as opened,
            pytest.raises(ValueError, match=r"state-00000001.* is not a state of a run"),
        ):
            opened.save_state(1, STATE)
    for name in ("records-7.jsonl", "records.jsonl"):
        put(folder, {name: b"my notes of the experiment"})
        with pytest.raises(ValueError, match=rf"{name} holds no record, and would be overwritten"):
            open_folder(folder)
        put(folder, {name: before.get(name, b"\0\0")})  # zeros are what a machine leaves that lost its power
        open_folder(folder).__exit__()
    assert {name: contents(folder)[name] for name in before} == before


# --- records and data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 7}, r"line 4: label is 7 for image 3, and \d in the data set"),
        ({"group": "fog3"}, r"line 4: group is 'fog3' for image 3, and 'fog2'"),
        ({"path": "x.png"}, r"line 4: path is 'x.png' for image 3"),
        ({"image_id": 4}, r"line 4, holds image 4 in batch 1, where the data set has \[3, 4\]"),
        ({"image_id": 10**6}, r"line 4, holds image 1000000"),
        ({"batch": 10**9}, r"line 4, holds image 3 in batch 1000000000, where the data set has \[\]"),
    ],
)
def test_a_line_that_is_not_of_the_data_is_named(tmp_path, change, message):
    folder = tmp_path / "run"
    write(folder)
    lines = [json.dumps({**record, **(change if record["image_id"] == 3 else {})}) + "\n" for record in SIX]
    (folder / "records.jsonl").write_text("".join(lines))
    before = contents(folder)
    with pytest.raises(ValueError, match=rf"records.jsonl, {message}"):
        open_folder(folder)
    assert contents(folder) == before


def test_a_long_path_is_shortened_and_a_key_that_stands_twice_refused(tmp_path):
    folder = tmp_path / "run"
    write(folder)
    whole = (folder / "records.jsonl").read_text()
    (folder / "records.jsonl").write_text(whole.replace(json.dumps(SIX[3]["path"]), json.dumps("x" * 10**6)))
    with pytest.raises(ValueError, match=r"line 4: path is 'x{199}\.\.\. for image 3, and 'fog2") as raised:
        open_folder(folder)
    assert len(str(raised.value)) < 700
    (folder / "records.jsonl").write_text(whole.replace('{"image_id": 0, ', '{"image_id": 5, "image_id": 0, ', 1))
    with pytest.raises(ValueError, match=r"line 1, is not a record: it has 'image_id' twice"):
        open_folder(folder)


def test_other_labels_in_the_data_set_are_told(tmp_path):
    write(tmp_path / "run", 2)
    data = SimpleNamespace(**{**vars(DATA), "labels": [*DATA.labels[:4], 5 - DATA.labels[4], DATA.labels[5]]})
    with pytest.raises(ValueError, match=r"line 5: label is \d for image 4, and \d in the data set"):
        open_folder(tmp_path / "run", data=data)
    with pytest.raises(ValueError, match=r"line 1: label is \d for image 0, and None in the data set"):
        open_folder(tmp_path / "run", data=SimpleNamespace(**{**vars(DATA), "labels": None}))


class Pixels(list):
    """A data set that is a list of items."""

    names = property(lambda self: [f"{i}.png" for i in range(len(self))])


def records_of(data: Pixels) -> list[dict]:
    return [{"image_id": i, "path": f"{i}.png", "digest": digest(item)} for i, item in enumerate(data)]


@pytest.mark.parametrize("maps", [False, True])
def test_an_image_of_other_pixels_is_named(maps):
    images = [torch.full((3, 4, 4), i, dtype=torch.uint8) for i in range(5)]
    items = [(image / 255, torch.full((4, 4), i)) for i, image in enumerate(images)] if maps else images
    data = Pixels(items)
    kept = records_of(data)
    read_again(kept, data, 2)
    if maps:
        data[3][1][2, 2] = 255
    else:
        data[3][0, 2, 2] += 1
    with pytest.raises(ValueError, match=r"image 3, '3.png', has other pixels now"):
        read_again(kept, data, 2)
    read_again([{**record, "digest": None} for record in kept], data, 2)  # runs of older versions have none
    read_again([{name: value for name, value in record.items() if name != "digest"} for record in kept], data, 2)


def test_an_image_that_is_gone_is_named():
    class Gone(Pixels):
        def __getitem__(self, i):
            raise ValueError("it is gone")

    data = Gone([torch.zeros(3, 2, 2, dtype=torch.uint8)])
    with pytest.raises(ValueError, match=r"image 0, '0.png', cannot be read: it is gone now"):
        read_again(records_of(data), data, 1)


def test_many_images_are_read_again_in_part(monkeypatch):
    monkeypatch.setattr(content, "MOST_READ", 4)
    seen = []

    class Counted(Pixels):
        def __getitem__(self, i):
            seen.append(i)
            return super().__getitem__(i)

    data = Counted([torch.zeros(3, 2, 2, dtype=torch.uint8)] * 15)
    kept = records_of(data)
    read_again(kept, data, 1)
    assert sorted(seen) == [0, 4, 8, 12]


def test_a_digest_tells_shapes_and_types_apart():
    zeros = torch.zeros(3, 4, 2, dtype=torch.uint8)
    some = [
        digest(zeros),
        digest(zeros.view(3, 2, 4)),
        digest((zeros / 255, torch.zeros(4, 2))),
        digest((zeros / 255, torch.zeros(4, 2).long())),
    ]
    assert len(set(some)) == 4
    assert digest(zeros.float() / 255 + 1e-4) == digest(zeros.float() / 255)  # a processor's last digits


# --- summary


def test_records_that_changed_after_the_summary_are_refused(tmp_path):
    folder = tmp_path / "run"
    write(folder)
    with open_folder(folder) as opened:
        _, told = opened.finish()
        summary = {"images": 6, "errors": 0, "groups": {}, "config": CONFIG, "classes": [], "environment": {}, "seconds": {}}
        opened.write_summary({**summary, "wall_seconds": 1.0, "records": told})
    with open_folder(folder) as opened:
        assert opened.finish()[1] == told
    text = (folder / "records.jsonl").read_text()
    (folder / "records.jsonl").write_text(text.replace('"accepted": true', '"accepted": false', 1))
    lines = (folder / "records.jsonl").read_bytes().splitlines(keepends=True)
    for changed in (lines, lines[:-1], [*lines[:-1], lines[-1][:-5]]):  # also where the edit makes a run that seems to go on
        (folder / "records.jsonl").write_bytes(b"".join(changed))
        before = contents(folder)
        with pytest.raises(ValueError, match=r"records.jsonl is not what summary.json was made of"):
            open_folder(folder)
        assert contents(folder) == before
    (folder / "records.jsonl").write_text(text)
    with open_folder(folder) as opened:
        (folder / "records.jsonl").write_bytes(b"".join(lines))
        with pytest.raises(ValueError, match=r"records.jsonl is not what summary.json was made of"):
            opened.finish()


@pytest.mark.parametrize("text", ['{"a": 1}', "[]", "{", "\0", '{"images": -1}', "[" * 100_000])
def test_a_summary_that_is_none_is_named(tmp_path, text):
    folder = tmp_path / "run"
    write(folder)
    (folder / "summary.json").write_text(text)
    before = contents(folder)
    with pytest.raises(ValueError, match=r"summary.json is damaged: .*; restore it, or begin again in another folder"):
        open_folder(folder)
    assert contents(folder) == before


def test_a_grown_data_set_s_summary_goes_before_its_records_come(tmp_path):
    folder = tmp_path / "run"
    write(folder, 2, batches=BATCHES[:2])
    with open_folder(folder, batches=BATCHES[:2]) as opened:
        told = opened.finish()[1]
        summary = {"images": 5, "errors": 0, "groups": {}, "config": CONFIG, "classes": [], "environment": {}, "seconds": {}}
        opened.write_summary({**summary, "wall_seconds": 1.0, "records": told})
    with open_folder(folder) as opened:
        assert opened.remaining() == [2]
        assert (folder / "summary.json").is_file()
        opened.append(2, batch(2))
        assert not (folder / "summary.json").is_file()


def test_opening_a_folder_changes_nothing(tmp_path):
    """Records of a batch that is to be done again are cut off by the first write, not before."""
    folder = tmp_path / "run"
    with open_folder(folder) as opened:
        for k in range(3):
            opened.save_state(k, {**STATE, "step": torch.tensor(k)})
            opened.append(k, batch(k))
        opened.finish()
    grown = SimpleNamespace(names=[*DATA.names, "more"], groups=["fog2"] * 7, labels=[*DATA.labels, 1], classes=("zero",))
    before = contents(folder)
    for batches in ([*BATCHES[:2], [5, 6]], [*BATCHES, [6]]):
        with open_folder(folder, batches=batches, data=grown) as opened:
            assert opened.remaining() == [len(batches) - 1]
            last = opened.last_in_order()
            assert int(opened.load_state(last, "cpu")["step"]) == last == len(batches) - 2
        assert contents(folder) == before
    with open_folder(folder, batches=[*BATCHES[:2], [5, 6]], data=grown) as opened:
        opened.save_state(2, STATE)
        assert contents(folder)["records.jsonl"].count(b"\n") == 5


# --- the state of an online run


def test_a_state_comes_back(tmp_path):
    with open_folder(tmp_path / "run") as opened:
        opened.save_state(0, STATE)
        found = opened.load_state(0, "cpu")
        assert torch.equal(found["theta"]["a.weight"], STATE["theta"]["a.weight"])
        assert torch.equal(found["theta_slots"][0][1], torch.full((), 2.0))
        opened.save_state(1, {})
        assert opened.load_state(1, "cpu") == {}


@pytest.mark.parametrize("place", [0.2, 0.5, 0.8, 0.999])
def test_an_overwritten_state_is_refused(tmp_path, place):
    """One bit anywhere: in its header, its weights, or the optimizer's memory."""
    folder = tmp_path / "run"
    with open_folder(folder) as opened:
        opened.save_state(0, STATE)
        path = folder / "state-00000000.safetensors"
        held = bytearray(path.read_bytes())
        held[int(place * len(held))] ^= 1
        path.write_bytes(held)
        with pytest.raises(ValueError, match=r"state-00000000.safetensors, the state after batch 0, cannot be read: .*begin again"):
            opened.load_state(0, "cpu")


def test_the_state_of_another_batch_or_run_is_refused(tmp_path):
    folder = tmp_path / "run"
    with open_folder(folder) as opened:
        opened.save_state(0, STATE)
        os.replace(folder / "state-00000000.safetensors", folder / "state-00000001.safetensors")
        with pytest.raises(ValueError, match=r"state after batch 1, cannot be read: its checksum"):
            opened.load_state(1, "cpu")
        with pytest.raises(ValueError, match=r"state after batch 0, cannot be read"):
            opened.load_state(0, "cpu")
    with open_folder(tmp_path / "other", OTHER) as opened:
        opened.save_state(1, STATE)
        os.replace(tmp_path / "other" / "state-00000001.safetensors", folder / "state-00000001.safetensors")
    with open_folder(folder) as opened, pytest.raises(ValueError, match=r"its checksum is not that of"):
        opened.load_state(1, "cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": None}, r"no whole number 'step'"),
        ({"theta_slots": None}, r"no whole number 'theta_slots'"),
        ({"theta_slots": torch.tensor(2**50)}, r"theta_slots is 1125899906842624"),
        ({"theta_slots": torch.tensor(-5)}, r"theta_slots is -5"),
        ({"theta_slots": torch.tensor(3)}, r"theta_slots are of \[1, 0, 0\] tensors, and theta has 1"),
        ({"theta_slots": torch.zeros(2)}, r"no whole number 'theta_slots'"),
        ({"theta_slots": torch.tensor(float("nan"))}, r"no whole number 'theta_slots'"),
        ({"theta/0": torch.ones(1)}, r"'theta/0' names no weight"),
    ],
)
def test_a_forged_state_is_refused(tmp_path, changes, message):
    """Its checksum is right, which anybody can work out."""
    from safetensors.torch import save

    sound = {"step": torch.tensor(1), "theta_slots": torch.tensor(1), "phi_slots": torch.tensor(2)}
    sound |= {"theta/000000/a": torch.ones(1), "theta_slots/0/000000": torch.ones(1)}
    path, tensors = tmp_path / "s.safetensors", {name: held for name, held in {**sound, **changes}.items() if held is not None}
    for some in (sound, tensors):
        path.write_bytes(save(some, {"format": state.FORMAT, "checksum": state._checksum(some, 0, CONFIG)}))
        if some is sound:
            assert state.read_state(path, 0, CONFIG, "cpu")["phi_slots"] == [[], []]
    with pytest.raises(ValueError, match=rf"s.safetensors, the state after batch 0, cannot be read: .*{message}"):
        state.read_state(path, 0, CONFIG, "cpu")


def test_a_pipe_is_no_state(tmp_path):
    os.mkfifo(tmp_path / "s.safetensors")
    with pytest.raises(ValueError, match=r"s.safetensors, the state after batch 0, cannot be read: it is a pipe"):
        state.read_state(tmp_path / "s.safetensors", 0, CONFIG, "cpu")
    assert not state.is_state(tmp_path / "s.safetensors")


def test_an_online_run_with_a_gap_is_refused(tmp_path):
    folder = tmp_path / "run"
    write(folder)
    lines = (folder / "records.jsonl").read_bytes().splitlines(keepends=True)
    for kept in (lines[3:], [*lines[:3], *lines[5:]]):
        (folder / "records.jsonl").write_bytes(b"".join(kept))
        with open_folder(folder) as opened, pytest.raises(ValueError, match=r"lacks batch [01] and holds later ones of an online run"):
            opened.last_in_order()
    (folder / "records.jsonl").write_bytes(b"".join(lines[:5]))
    with open_folder(folder) as opened:
        assert opened.last_in_order() == 1


def test_killed_at_any_system_call_an_online_run_goes_on(tmp_path, monkeypatch):
    """Every write, rename, sync and removal of two batches is the last one in turn: the state that comes next is always there."""

    def work(folder: Path) -> None:
        with open_folder(folder) as opened:
            seen = opened.last_in_order() + 1
            if seen and opened.remaining():
                assert int(opened.load_state(seen - 1, "cpu")["step"]) == seen
            for k in opened.remaining():
                seen += 1
                opened.save_state(k, {**STATE, "step": torch.tensor(seen)})
                opened.append(k, batch(k))
            opened.finish()

    for stop in range(200):
        folder = tmp_path / str(stop)
        with monkeypatch.context() as patch:
            kill_at(patch, stop)
            try:
                work(folder)
                killed = False
            except Killed:
                killed = True
        work(folder)
        assert contents(folder)["records.jsonl"] == "".join(json.dumps(record) + "\n" for record in SIX).encode()
        assert set(contents(folder)) == {"lock", "config.json", "records.jsonl", *LAST_STATES}
        if not killed:
            break
    assert 20 < stop < 199


# --- names and writing


@pytest.mark.parametrize("name", ["x" * 300, "a/" + "ü" * 200, "/".join(["y" * 200] * 30), "a\0b"])
def test_names_that_no_file_has_are_told_with_their_argument(tmp_path, name):
    with pytest.raises(ValueError, match=r"^out is '"):
        open_folder(tmp_path / name)
    with pytest.raises(ValueError, match=r"^model is '"):
        check_name("model", name)
    check_name("model", "x" * 255)


def test_a_result_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / ("r" * 250)
    write_whole(path, "old")
    link = tmp_path / "link"
    link.symlink_to(path)
    write_whole(link, "new \udcff")
    assert link.is_symlink()
    assert path.read_text() == "new \\udcff"
    write_whole(Path("/dev/null"), "gone")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="cannot be written: No space left on device; what was there is kept"):
        write_whole(path, "newer")
    assert path.read_text() == "new \\udcff"
    assert sorted(found.name for found in tmp_path.iterdir()) == ["link", "r" * 250]


def test_a_draft_is_nobody_s_file(tmp_path, monkeypatch):
    """Its name cannot be foreseen, and where a file of others has it all the same, or a link, that is left alone."""
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / f"found.json.{os.getpid()}.new").symlink_to(tmp_path / "precious")
    write_whole(tmp_path / "found.json", "new")
    monkeypatch.setattr("dtta_fast.runs.writing.secrets.randbelow", lambda most: 7)
    (tmp_path / "found.json.7.new").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match=r"found.json cannot be written: File exists; what was there is kept"):
        write_whole(tmp_path / "found.json", "newer")
    assert (tmp_path / "found.json").read_text() == "new"
    assert (tmp_path / "precious").read_bytes() == b"precious"
    assert (tmp_path / "found.json.7.new").is_symlink()


def test_a_result_goes_into_a_pipe_and_not_into_a_link_to_itself(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OSError, match=r"loop cannot be written: Too many levels of symbolic links"):
        write_whole(tmp_path / "loop", "new")
    read, end = os.pipe()
    write_whole(Path(f"/proc/self/fd/{end}"), "through")
    assert os.read(read, 100) == b"through"
    os.close(read)
    os.close(end)
