"""The folder of a run: its lock, config, records (one JSON line per image) and online state. The process may be killed after any write."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import portalocker
from portalocker import LockFlags

from dtta_fast.runs.config import differences
from dtta_fast.runs.content import Listing, mismatch, shortened
from dtta_fast.runs.records import MOST_BYTES, REMEDY, Config, Record, Summary, check, line_of, read_object, read_records
from dtta_fast.runs.state import is_state, read_state, state_bytes
from dtta_fast.runs.writing import check_name, check_plain, draft, open_plain_own, put, write_all, write_whole
from dtta_fast.runtime.files import open_plain, read_text

RECORDS, CONFIG, SUMMARY = "records.jsonl", "config.json", "summary.json"
STATE = "state-{:08d}.safetensors"
FIRST = b'{"image_id": '  # start of every line of records
OF_RECORDS, OF_STATE, OF_LOCK = r"records(-[0-9]+)?\.jsonl", r"state-[0-9]{8}\.safetensors", r"lock(-[0-9]+)?"
OF_LEFTOVER = rf"({OF_RECORDS}|{OF_STATE}|config\.json|summary\.json)\.[0-9]+\.new"  # left over from a write that was killed
OF_RUN = rf"{OF_RECORDS}|{OF_STATE}|config\.json|summary\.json|{OF_LOCK}"


class RunFolder:
    """Locks and manages a run's folder; a context manager.

    Work is split into batches, numbered from 0. The lines of a batch are written together after the batch is done. A batch with only some
    of its lines on disk counts as missing and is run again, so a run that was killed and resumed has the same records as an uninterrupted
    one.

    Only files with the names above are ever removed or overwritten, and only in a folder whose config.json belongs to a run. A link or a
    pipe with such a name is refused. Opening a folder changes no file of the run. With overwrite, the existing run stays until the first
    new batch is on disk.

    Args:
        folder: created if missing. config: config of the run, as returned by RunConfig.described(). batches: image ids of each batch.
            data: the data set. part: "" for a run with one process; with several processes, the part name that goes into the file
            names of this process's records and lock. overwrite: start over in place of an existing run, and allow unrelated files.

    Raises:
        ValueError: another run is writing to the folder; the folder holds records of another config or data set, or unrelated files; a
        file in it is damaged; or its records do not match its summary. OSError: the folder cannot be written to.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        batches: Sequence[Sequence[int]],
        data: Listing,
        part: str = "",
        *,
        overwrite: bool = False,
    ) -> None:
        check_name("out", folder)
        self.folder, self.batches, self._data, self._config, self._overwrite = folder, batches, data, config, overwrite
        self._records = folder / (f"records-{part}.jsonl" if part else RECORDS)
        self._part, self._open, self._file = part, list[int](), -1
        self._cut: str | None = None  # the part of our own records to keep
        self._state: tuple[Path, bytes] | None = None  # held back until the first batch of a run that replaces another
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ValueError(f"out is {str(folder)!r}, where a file is in the way: name another folder") from error
        for name in sorted(os.listdir(folder)):
            if re.fullmatch(OF_RUN, name):
                check_plain(folder / name)
        self._refuse_files_of_others()
        try:
            self._lock("lock", LockFlags.SHARED if part else LockFlags.EXCLUSIVE)
            if part:
                self._lock(f"lock-{part}", LockFlags.EXCLUSIVE)
            self._check_config()
            if not part:
                for path in self._named(OF_LEFTOVER):
                    path.unlink()
            self.summary = None if overwrite else self._read_summary()
            self.done: dict[int, list[Record]] = {} if overwrite else self._read_all()
            self._check_summary()
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *error: object) -> None:
        for descriptor in self._open:
            os.close(descriptor)
        self._open = []

    def _named(self, pattern: str) -> list[Path]:
        """Returns the folder's plain files whose names match the pattern, sorted by name."""
        return named(self.folder, pattern)

    def _refuse_files_of_others(self) -> None:
        """Raises ValueError if the folder is neither empty nor a run's folder. Called before anything is written to it."""
        names = sorted(os.listdir(self.folder))
        if CONFIG in names and self._is_a_run_s():
            return
        ours = rf"{OF_LOCK}|{OF_LEFTOVER}" if "lock" in names else OF_LOCK  # the process may have been killed while writing the config
        of_others = [name for name in names if not re.fullmatch(ours, name) or not (".new" in name or _is_empty(self.folder / name))]
        taken = [name for name in of_others if re.fullmatch(f"{OF_RUN}|{OF_LEFTOVER}", name)]
        if CONFIG in taken:
            raise ValueError(f"{self.folder / CONFIG} is damaged, or not that of a run, and would be overwritten: name another folder")
        if RECORDS in taken:
            raise ValueError(f"{self.folder} holds records without a {CONFIG}: name another folder")
        if taken:
            raise ValueError(f"{self.folder} is not a run's folder, and holds {taken[0]!r}, a name of a run's files: name another folder")
        if not of_others:
            return
        if not self._overwrite:
            some = ", ".join(map(repr, of_others[:3])) + (" and others" if len(of_others) > 3 else "")
            raise ValueError(
                f"{self.folder} is not a run's folder: it holds {some}; name another folder, or give --overwrite to write beside"
            )

    def _is_a_run_s(self) -> bool:
        try:
            found = json.loads(read_text(self.folder / CONFIG))
            if found != self._config:
                check(found, Config)
        except (OSError, ValueError, RecursionError):
            return False
        return True

    def _lock(self, name: str, kind: LockFlags) -> None:
        """Takes a lock. The system releases it when the process ends, even if it crashes."""
        self._open.append(open_plain_own(self.folder / name, os.O_RDWR))
        try:
            portalocker.lock(self._open[-1], kind | LockFlags.NON_BLOCKING)
        except (portalocker.LockException, OSError) as error:
            raise ValueError(f"{self.folder} is being written to by another run: wait for it, or name another folder") from error

    def _check_config(self) -> None:
        """Raises ValueError if the folder holds records of another config and overwrite is off."""
        path = self.folder / CONFIG
        if self._overwrite or not path.is_file():
            return
        there = json.loads(path.read_text(encoding="utf-8"))
        both = "weights" in there and "weights" in self._config  # older versions did not note them
        stored, own = ({name: value for name, value in found.items() if both or name != "weights"} for found in (there, self._config))
        changed = list(differences(stored, own))
        if changed and any(found.stat().st_size for found in self._named(OF_RECORDS)):
            shown = "; ".join(changed)
            raise ValueError(
                f"{self.folder} holds the records of another config: {shown} (there / here); name another folder, "
                "or give --overwrite to replace them"
            )

    def _read_summary(self) -> dict[str, Any] | None:
        path = self.folder / SUMMARY
        return read_object(path, Summary) if path.exists() else None

    def _check_summary(self) -> None:
        """Raises ValueError if the summary was made from other records: edited records are neither summarised again nor resumed from."""
        told = None if self.summary is None else self.summary.get("records")
        if told not in (None, digest_of(self.folder / RECORDS)):
            raise ValueError(
                f"{self.folder / RECORDS} is not what {SUMMARY} was made of: restore the two, or remove {SUMMARY} to sum up what is there"
            )

    def _read_all(self) -> dict[int, list[Record]]:
        """Reads the complete batches that this and other processes have written."""
        return {number: records for path in self._named(OF_RECORDS) for number, records in self._read(path).items()}

    def _read(self, path: Path) -> dict[int, list[Record]]:
        """Reads the complete batches of a file. If the file is our own, incomplete batches are cut off before the first write."""
        with open_plain(path, MOST_BYTES) as file:
            head = file.read(len(FIRST)).rstrip(b"\0")  # zeros: left by a power failure
        if not FIRST.startswith(head) and next(read_records(path), None) is None:
            raise ValueError(f"{path} holds no record, and would be overwritten: move it elsewhere, or name another folder")
        by_batch: dict[int, list[Record]] = {}
        for line, record in enumerate(read_records(path, self._config.get("task")), 1):
            ids = [*(other["image_id"] for other in by_batch.setdefault(record["batch"], [])), record["image_id"]]
            wanted = list(self.batches[record["batch"]]) if record["batch"] < len(self.batches) else []
            if ids != wanted[: len(ids)]:  # not a prefix of the batch, which is what a killed run leaves
                why = f"holds image {ids[-1]} in batch {record['batch']}, where the data set has {shortened(wanted)}"
                raise ValueError(f"{path}, line {line}, {why}: has it changed? Restore it, or name another folder")
            why = mismatch(record, self._data) or ""
            if why:
                raise ValueError(f"{path}, line {line}: {why}: which of the two has changed? Restore it, or name another folder")
            by_batch[record["batch"]].append(record)
        whole = {number: records for number, records in by_batch.items() if len(records) == len(self.batches[number])}
        text = "".join(line_of(record) for records in whole.values() for record in records)
        if path == self._records and self._file < 0:
            self._cut = text if text.encode() != path.read_bytes() else None
        return whole

    def remaining(self) -> list[int]:
        """Returns the numbers of the batches that still have to be run."""
        return [number for number in range(len(self.batches)) if number not in self.done]

    def _begin(self) -> None:
        """Prepares a resumed run before its first write: writes the config if needed and cuts off incomplete batches of a killed run."""
        if self._file >= 0:
            return
        self._check_config()  # again: another process may have written it meanwhile
        if self.summary is not None:  # it covers fewer images than there are now
            (self.folder / SUMMARY).unlink(missing_ok=True)
        path = self.folder / CONFIG
        if not self._holds_config():
            write_whole(path, self._config_text(), follow=False)
        if self._cut is not None:
            write_whole(self._records, self._cut, follow=False)
        self._open_records()

    def _begin_again(self, text: bytes) -> None:
        """Replaces the existing run with the first batch of a new one. The old run stays until everything the new one needs is on disk."""
        try:
            drafts = {self._records: draft(self._records, text)}
            try:
                if self._state is not None:
                    drafts[self._state[0]] = draft(*self._state)
                if not self._holds_config():
                    drafts[self.folder / CONFIG] = draft(self.folder / CONFIG, self._config_text())
            except OSError:
                for new in drafts.values():
                    new.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise OSError(f"{self._records} cannot be written: {error.strerror}; the run that was there is kept") from error
        records, states = self._named(OF_RECORDS), [*filter(is_state, self._named(OF_STATE))]
        (self.folder / SUMMARY).unlink(missing_ok=True)
        if self.folder / CONFIG in drafts:  # records must never lie beside another run's config
            for path in records:
                path.unlink()
            put(drafts.pop(self.folder / CONFIG), self.folder / CONFIG)
        for path in [path for path in states if path not in drafts]:
            path.unlink()
        for path in sorted(drafts, key=lambda path: path == self._records):  # the state before its records
            put(drafts[path], path)
        for path in records:
            if path != self._records:
                path.unlink(missing_ok=True)
        self._state = None
        self._open_records()

    def _holds_config(self) -> bool:
        path = self.folder / CONFIG
        return path.is_file() and bool(json.loads(path.read_text(encoding="utf-8")) == self._config)

    def _config_text(self) -> str:
        return json.dumps(self._config, indent=2) + "\n"

    def _open_records(self) -> None:
        self._file = open_plain_own(self._records, os.O_WRONLY | os.O_APPEND)
        self._open.append(self._file)

    def append(self, number: int, records: list[Record]) -> None:
        """Writes the lines of a batch and waits until they are on disk.

        Raises:
            OSError: they cannot be written, for example because the disk is full; the file is left unchanged.
        """
        text = "".join(map(line_of, records)).encode()
        if self._overwrite and self._file < 0:
            self._begin_again(text)
            self.done[number] = records
            return
        self._begin()
        size = os.fstat(self._file).st_size
        try:
            write_all(self._file, text)
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, size)
            raise OSError(
                f"{self._records} cannot be written: {error.strerror}; its {sum(map(len, self.done.values()))} records are kept, "
                "and the same command goes on from them"
            ) from error
        self.done[number] = records

    def finish(self) -> tuple[list[Record], str]:
        """Merges the records of all processes into one file, in data set order; returns the records and the file's digest.

        The last two states of an online run are kept, so that images added later can continue from them.

        Raises:
            ValueError: records are missing, or are not the ones that the summary was made from.
        """
        if self._file < 0:
            self._check_summary()  # again: they may have changed since the folder was opened
        self.done = self._read_all()
        if self.remaining():
            raise ValueError(f"{self.folder} lacks {len(self.remaining())} batches: do all processes write to this folder, on one disk?")
        if self._file in self._open:  # Windows cannot replace an open file
            self._open.remove(self._file)
            os.close(self._file)
        records = [record for number in sorted(self.done) for record in self.done[number]]
        data, path = "".join(map(line_of, records)).encode(), self.folder / RECORDS
        if not path.is_file() or path.read_bytes() != data:
            write_whole(path, data, follow=False)
        parts = [found for found in self._named(OF_RECORDS) if found.name != RECORDS]
        locks = [found for found in self._named(r"lock-[0-9]+") if _is_empty(found)]
        for found in [*parts, *locks]:
            found.unlink()
        self._drop_states(len(self.batches) - 1)
        return records, digest_of(path)

    def write_summary(self, found: Mapping[str, Any]) -> None:
        """Writes summary.json."""
        write_whole(self.folder / SUMMARY, json.dumps(found, indent=2) + "\n", follow=False)

    def save_state(self, number: int, state: dict[str, Any]) -> None:
        """Saves the state of an online run after a batch. Call it before appending the batch's records.

        The previous state is kept as well: it is the valid one if the batch's records are never written.

        Raises:
            ValueError: an unrelated file has the same name. OSError: the state cannot be written.
        """
        path = self.state_path(number)
        if path.exists() and not is_state(path):
            raise ValueError(f"{path} is not a state of a run, and would be overwritten: move it elsewhere, or name another folder")
        held = state_bytes(state, number, self._config)
        if self._overwrite and self._file < 0:
            self._state = path, held  # the existing run stays until the first batch is done
            return
        self._begin()
        write_whole(path, held, follow=False)
        self._drop_states(number)

    def _drop_states(self, last: int) -> None:
        """Removes all states except those of batch `last` and of the batch before it."""
        kept = STATE.format(last), STATE.format(last - 1)
        for path in self._named(OF_STATE):
            if path.name not in kept and is_state(path):
                path.unlink()

    def load_state(self, number: int, device: str) -> dict[str, Any]:
        """Loads the state of an online run after a batch onto a device.

        Raises:
            ValueError: the state is missing or damaged.
        """
        return read_state(self.state_path(number), number, self._config, device)

    def state_path(self, number: int) -> Path:
        return self.folder / STATE.format(number)

    def last_in_order(self) -> int:
        """Returns the number of the last finished batch of an online run, whose batches depend on each other; -1 if none is finished.

        Raises:
            ValueError: an earlier batch is missing.
        """
        if sorted(self.done) != list(range(len(self.done))):
            raise ValueError(f"{self._records} lacks batch {self.remaining()[0]} and holds later ones of an online run; {REMEDY}")
        return len(self.done) - 1


def named(folder: Path, pattern: str) -> list[Path]:
    """Returns a folder's plain files whose full names match a pattern, sorted by name."""
    found = [folder / name for name in sorted(os.listdir(folder)) if re.fullmatch(pattern, name)]
    return [path for path in found if path.is_file() and not path.is_symlink()]


def digest_of(records: Path) -> str:
    """Hashes a records file for its summary; a missing file is hashed as an empty one."""
    return hashlib.blake2b(records.read_bytes() if records.is_file() else b"", digest_size=16).hexdigest()


def _is_empty(path: Path) -> bool:
    return path.is_file() and not path.is_symlink() and path.stat().st_size == 0
