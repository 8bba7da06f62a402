"""The folder of a run: its lock, its config, a JSON line an image, the state of an online run. Any of its writes may be the last one."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtta_fast.runs.config import differences

Record = dict[str, Any]
RECORDS, CONFIG, SUMMARY = "records.jsonl", "config.json", "summary.json"
STATE = "state-{:08d}.safetensors"


class RunFolder:
    """A run's folder, locked; a context manager.

    Work is in batches, numbered from 0; a batch's lines are written at once, after its work is done. A batch of which only some lines
    arrived is not there, and is done again: so the records of a run that was killed and goes on are those of one that was not.

    Args:
        folder: made where it is missing. config: of the run, as RunConfig.described() gives it. batches: the image ids
            of each. names: of the data set's images, by id. part: "" for a run of one process; the records and the lock of one of
            several bear its name.

    Raises:
        ValueError: another run writes to it, it holds the records of another config, or a file in it is damaged. OSError: it cannot be
        written to.
    """

    def __init__(
        self, folder: Path, config: Mapping[str, Any], batches: Sequence[Sequence[int]], names: Sequence[str], part: str = ""
    ) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ValueError(f"out is {str(folder)!r}, where a file is in the way: name another folder") from error
        self.folder, self.batches, self._names = folder, batches, names
        self._records = folder / (f"records-{part}.jsonl" if part else RECORDS)
        self._open: list[int] = []
        try:
            self._lock("lock", fcntl.LOCK_SH if part else fcntl.LOCK_EX)
            if part:
                self._lock(f"lock-{part}", fcntl.LOCK_EX)
            else:
                for path in folder.glob("*.new"):  # of a write that a kill cut short
                    path.unlink()
            self._check_config(config)
            self.done = self._read_all()
            self._file = os.open(self._records, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            self._open.append(self._file)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *error: object) -> None:
        for descriptor in self._open:
            os.close(descriptor)

    def _lock(self, name: str, kind: int) -> None:
        """Held until this process ends, however it ends."""
        self._open.append(os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o644))
        try:
            fcntl.flock(self._open[-1], kind | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"{self.folder} is being written to by another run: wait for it, or name another folder") from error

    def _check_config(self, config: Mapping[str, Any]) -> None:
        path = self.folder / CONFIG
        if path.is_file():
            try:
                kept = json.loads(path.read_text())
                if not isinstance(kept, dict):
                    raise ValueError("it holds no object")
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path} is damaged: {error}; the records beside it belong to an unknown config") from error
            changed = list(differences(kept, config))
            if changed and not any(found.stat().st_size for found in self.folder.glob("records*.jsonl")):
                write_whole(path, json.dumps(config, indent=2) + "\n")  # nothing belongs to it yet
            elif changed:
                shown = "; ".join(changed)
                raise ValueError(f"{self.folder} holds the records of another config: {shown} (there / here); name another folder")
            return
        if any(found.stat().st_size for found in self.folder.glob("records*.jsonl")) and not path.is_file():
            raise ValueError(f"{self.folder} holds records without a {CONFIG}: name another folder")
        write_whole(path, json.dumps(config, indent=2) + "\n")

    def _read_all(self) -> dict[int, list[Record]]:
        """The whole batches that this process and others have written."""
        return {number: records for path in sorted(self.folder.glob("records*.jsonl")) for number, records in self._read(path).items()}

    def _read(self, path: Path) -> dict[int, list[Record]]:
        """The whole batches of a file; what is left of others is cut off a file of our own."""
        by_batch: dict[int, list[Record]] = {}
        lines = list(read_records(path))
        for record in lines:
            by_batch.setdefault(record["batch"], []).append(record)
        whole = {}
        for number, records in by_batch.items():
            wanted = list(self.batches[number]) if 0 <= number < len(self.batches) else []
            ids = [record["image_id"] for record in records]
            if ids == wanted:
                whole[number] = records
            elif ids != wanted[: len(ids)]:  # not the beginning of it, as a killed run leaves it
                raise ValueError(f"{path} holds image {ids[-1]} in batch {number}, where the data set has {wanted}: has it changed?")
            for record in records:
                if record.get("path") != self._names[record["image_id"]]:
                    now = self._names[record["image_id"]]
                    raise ValueError(
                        f"{path} holds {record.get('path')!r} as image {record['image_id']}, which is {now} now: has the data set changed?"
                    )
        kept = [record for records in whole.values() for record in records]
        text = "".join(map(line_of, kept))
        if path == self._records and text.encode() != path.read_bytes():
            write_whole(path, text)
        return whole

    def remaining(self) -> list[int]:
        """Numbers of the batches that are to do."""
        return [number for number in range(len(self.batches)) if number not in self.done]

    def append(self, number: int, records: list[Record]) -> None:
        """Writes a batch's lines, and waits until the disk has them.

        Raises:
            OSError: they cannot be written, for want of room; the file is what it was.
        """
        text = "".join(map(line_of, records)).encode()
        size = os.fstat(self._file).st_size
        try:
            written = 0
            while written < len(text):
                written += os.write(self._file, text[written:])
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, size)
            raise OSError(
                f"{self._records} cannot be written: {error.strerror}; its {sum(map(len, self.done.values()))} records are kept, "
                "and the same command goes on from them"
            ) from error
        self.done[number] = records

    def finish(self) -> list[Record]:
        """All records, other processes' too, in the order of the data set, as one file."""
        self.done = self._read_all()
        if self.remaining():
            raise ValueError(f"{self.folder} lacks {len(self.remaining())} batches: do all processes write to this folder, on one disk?")
        records = [record for number in sorted(self.done) for record in self.done[number]]
        write_whole(self.folder / RECORDS, "".join(map(line_of, records)))
        for path in (path for kind in ("records-*.jsonl", "lock-*", "state-*.safetensors") for path in self.folder.glob(kind)):
            path.unlink()
        return records

    def save_state(self, number: int, state: dict[str, Any]) -> None:
        """Of an online run after a batch; to be called before the batch's records are appended.

        The one before is kept, which counts where the records do not arrive.
        """
        from safetensors.torch import save

        write_whole(self.folder / STATE.format(number), save(_flat(state)))
        for path in self.folder.glob("state-*.safetensors"):
            if path.name < STATE.format(number - 1):
                path.unlink()

    def load_state(self, number: int, device: str) -> dict[str, Any]:
        """Of an online run after a batch, on a device.

        Raises:
            ValueError: it is missing or damaged.
        """
        from safetensors.torch import load_file

        path = self.folder / STATE.format(number)
        try:
            return _nested(load_file(path, device))
        except Exception as error:  # safetensors raises its own
            raise ValueError(f"{path}, the state after batch {number}, cannot be read: {error}; begin again in another folder") from error


def line_of(record: Record) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def read_records(path: Path) -> Iterator[Record]:
    """The lines of a records file; a last one without its end, of a run that was killed, is left out.

    Raises:
        ValueError: a whole line is no record; the message names it.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line, parse_constant=_refuse)
                if not isinstance(record, dict) or not {"image_id", "batch"} <= set(record):
                    raise ValueError("it has no image_id or no batch")
                if not all(type(record[name]) is int and record[name] >= 0 for name in ("image_id", "batch")):
                    raise ValueError("image_id and batch are whole numbers of 0 and more")
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}, is no record: {error}") from error
            yield record


def _refuse(constant: str) -> None:
    raise ValueError(f"it has {constant}, which is no JSON")


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file so that it is the old one or the new one, whatever happens in between."""
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        with new.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {error.strerror}; what was there is kept") from error


def _flat(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """An adapter's state as tensors by name: weights in their order, the optimizer's memory by slot and number, the step."""
    if not state:  # nothing was adapted yet
        return {"empty": torch.zeros(0)}
    found: dict[str, Tensor] = {"step": state["step"]}
    for kind in ("theta", "phi"):
        slots = state[f"{kind}_slots"]
        found[f"{kind}_slots"] = torch.tensor(len(slots))
        found |= {f"{kind}/{i:06d}/{name}": value.contiguous() for i, (name, value) in enumerate(state[kind].items())}
        found |= {f"{kind}_slots/{i}/{j:06d}": value.contiguous() for i, slot in enumerate(slots) for j, value in enumerate(slot)}
    return found


def _nested(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    if "empty" in tensors:
        return {}
    found: dict[str, Any] = {"step": tensors["step"]}
    for kind in ("theta", "phi"):
        names = sorted(name for name in tensors if name.startswith(f"{kind}/"))
        found[kind] = {name.split("/", 2)[2]: tensors[name] for name in names}
        numbers = range(int(tensors[f"{kind}_slots"]))
        found[f"{kind}_slots"] = [[tensors[name] for name in sorted(tensors) if name.startswith(f"{kind}_slots/{i}/")] for i in numbers]
    return found
