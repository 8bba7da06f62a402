"""Runs over whole data sets: adapts to every image, records the result, and resumes where an earlier run stopped."""

from __future__ import annotations

import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtta_fast.data.base import Maps
from dtta_fast.data.images import Images
from dtta_fast.runs.config import RunConfig
from dtta_fast.runs.content import read_again, shortened, weights_of
from dtta_fast.runs.corruption_error import corruption_errors_of
from dtta_fast.runs.folder import RunFolder
from dtta_fast.runs.records import Record
from dtta_fast.runs.streams import batches_of
from dtta_fast.runs.summary import summary, warn_of_numbering
from dtta_fast.runs.worker import Fetched, Finished, Worker, fetch, open_data
from dtta_fast.runtime import environment

AHEAD = 2  # batches to read ahead per thread
MOST_AHEAD = 2**30  # bytes of batches waiting for adaptation; no more batches are read beyond this
Advance = Callable[[list[Record]], None]


def evaluate(
    run: RunConfig, out: str | Path, *, scale: str = "none", overwrite: bool = False, advance: Advance = lambda records: None
) -> dict[str, Any]:
    """Adapts to every image of a data set and records the results in a folder (see runs.folder.RunFolder); resumes a run found there.

    Args:
        out: the folder. scale: "none" runs in this process, or splits the batches among the processes if torchrun started several; "ray"
            uses Ray Data with one worker per GPU, or per CPU core without a GPU (extra `scale`). overwrite: start over and replace the run
            in the folder, which is kept until the first batch is done; also allows a folder that holds unrelated files. advance: called
            with each batch's records as they are written.

    Returns:
        The content of summary.json: runs.summary.summary() of all records, the config, versions and machine, seconds per phase.

    Raises:
        ValueError: bad input, or a folder that is in use or holds another run, unrelated files, or records of other images.
            OSError: the folder is not writable.
    """
    rank, world = _place()
    _check(run, scale, world, overwrite)
    begun = time.perf_counter()
    data = open_data(run)
    if run.classes and data.classes and len(run.classes) != len(data.classes):
        raise ValueError(f"classes names {len(run.classes)}, and the data set has {len(data.classes)}, whose order they have to be in")
    batches, config = batches_of(run, data), {**run.described(), "weights": weights_of(run)}
    part = str(rank) if world > 1 else ""
    with _together(world), RunFolder(Path(out), config, batches, data, part, overwrite=overwrite) as folder:
        read_again((record for number in sorted(folder.done) for record in folder.done[number]), data, run.workers)
        for number in sorted(folder.done):
            advance(folder.done[number])
        remaining = [number for number in folder.remaining() if number % world == rank]
        seconds = {"start": time.perf_counter() - begun}
        if remaining:
            for number, records, phases in _finished(run, data, remaining, folder, scale):
                written = time.perf_counter()
                folder.append(number, records)
                for name, took in {**phases, "write": time.perf_counter() - written}.items():
                    seconds[name] = seconds.get(name, 0.0) + took
                advance(records)
        if world > 1:
            torch.distributed.barrier()
            if rank:
                return {}
        everything, records_digest = folder.finish()
        warn_of_numbering(everything)
        told = None if remaining else folder.summary
        figures = summary(everything)
        if run.data == "imagenet-c":
            figures |= corruption_errors_of(figures["groups"])
        found = {
            **figures,
            "config": config,
            "classes": list(data.classes if sorted(run.classes) == sorted(data.classes) else run.classes or data.classes),
            "environment": told["environment"] if told else environment.describe(),
            "seconds": told["seconds"] if told else seconds,
            "wall_seconds": told["wall_seconds"] if told else time.perf_counter() - begun,
            "records": records_digest,
        }
        folder.write_summary(found)
        return found


def _check(run: RunConfig, scale: str, world: int, overwrite: bool) -> None:
    """Raises ValueError if a run cannot be split among several processes."""
    if scale not in ("none", "ray"):
        raise ValueError(f"scale is {scale!r}; allowed: none, ray")
    if run.protocol != "episodic" and (scale != "none" or world > 1):
        raise ValueError(
            f"protocol is {run.protocol!r} with several workers, and its state goes from each image to the next: run it in one process"
        )
    if overwrite and world > 1:
        raise ValueError(f"overwrite is True with {world} processes, which would remove what the others write: name another folder")


def _place() -> tuple[int, int]:
    """Reads the rank of this process and the world size from torchrun's environment variables.

    Raises:
        ValueError: the variables are invalid.
    """
    found = {name: os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))}
    for name, text in found.items():
        if not re.fullmatch("[0-9]{1,9}", text):
            raise ValueError(f"{name} of the environment is {shortened(text)}, which is not a number: start by torchrun, or unset it")
    rank, world = (int(text) for text in found.values())
    if rank >= world:
        raise ValueError(f"RANK of the environment is {rank}, and WORLD_SIZE {world}, which is not more: start by torchrun, or unset both")
    return rank, world


@contextmanager
def _together(world: int) -> Iterator[None]:
    """Sets up the process group of the processes that torchrun started, and destroys it at the end."""
    if world == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))  # "cuda" then means this process's GPU
    torch.distributed.init_process_group("gloo", timeout=timedelta(days=365))  # processes may finish hours apart
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def _finished(run: RunConfig, data: Images | Maps, remaining: Sequence[int], folder: RunFolder, scale: str) -> Iterator[Finished]:
    """Yields the batches as they finish, here or under Ray."""
    if scale == "ray":
        from dtta_fast.runs.scale import ray_records

        return ray_records(run, data, folder.batches, remaining)
    return _records(run, data, remaining, folder)


def _records(run: RunConfig, data: Images | Maps, remaining: Sequence[int], folder: RunFolder) -> Iterator[Finished]:
    """Adapts batch by batch in this process, and reads the next batches in the background."""
    begun = time.perf_counter()
    worker, online = Worker(run, data), run.protocol != "episodic"
    last = folder.last_in_order() if online else -1
    if last >= 0:
        state = folder.load_state(last, run.device)
        try:
            worker.go_on(state, data.groups[folder.batches[last][0]])
        except ValueError as error:
            raise ValueError(f"{folder.state_path(last)} is of another model: {error}; begin again in another folder") from error
    started = {"start": time.perf_counter() - begun}

    def read(number: int) -> tuple[Fetched, Tensor | None]:
        batch = fetch(data, number, folder.batches[number], worker.crop)
        crops = worker.stacked(batch)
        return batch._replace(images=dict.fromkeys(batch.images, torch.empty(0, dtype=torch.float32, device="cpu"))), crops

    with ThreadPoolExecutor(run.workers) as pool:
        coming: deque[Future[tuple[Fetched, Tensor | None]]] = deque()
        ahead, largest = iter(remaining), 0  # size of the largest batch so far, in bytes
        try:
            while True:
                while not coming or (len(coming) < AHEAD * run.workers and len(coming) * largest < MOST_AHEAD):
                    if (number := next(ahead, None)) is None:
                        break
                    coming.append(pool.submit(read, number))
                if not coming:
                    return
                waited = time.perf_counter()
                batch, crops = coming.popleft().result()
                largest = max(largest, _bytes(batch, crops))
                waited = time.perf_counter() - waited
                records, phases = worker.adapt(batch, crops)
                saved = time.perf_counter()
                if online:
                    folder.save_state(batch.number, worker.adapter.state_dict())
                yield batch.number, records, {**phases, "load": waited, "state": time.perf_counter() - saved, **started}
                started = {}
        finally:
            for future in coming:
                future.cancel()


def _bytes(batch: Fetched, crops: Tensor | None) -> int:
    """Bytes of memory that a batch occupies while it waits for adaptation."""
    return (0 if crops is None else crops.nbytes) + sum(truth.nbytes for truth in batch.truth.values())
