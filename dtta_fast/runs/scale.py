"""Runs on Ray Data: tasks read the images and stream them to workers, one per GPU, or one per CPU core without a GPU."""

from __future__ import annotations

import json
import os
import pickle
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from dtta_fast.data.base import Maps
from dtta_fast.data.images import Images
from dtta_fast.runs.config import RunConfig
from dtta_fast.runs.worker import Finished, Worker, fetch

RETRIES = 3  # retries of a batch whose worker died


class Attempts:
    """Counts how often each batch was read and adapted to, in a process that outlives the readers and the workers."""

    def __init__(self) -> None:
        self._begun: Counter[tuple[str, int]] = Counter()

    def begin(self, what: str, number: int) -> int:
        """Counts one more attempt at the batch, and returns the number of attempts."""
        self._begun[what, number] += 1
        return self._begun[what, number]


def _begin(attempts: Any, what: str, number: int) -> None:
    """Counts an attempt, and gives up after too many, since Ray would retry dead processes forever.

    Raises:
        RuntimeError: the batch has exceeded its number of attempts.
    """
    import ray

    if ray.get(attempts.begin.remote(what, number)) > 1 + RETRIES:
        times = f"{1 + RETRIES} times"
        raise RuntimeError(f"batch {number} ended the process that {what} it {times}; look at its images, or at the memory")


class RayWorker:
    """Adapts to the batches it receives. Reports the time between batches as `load`, and its own time outside the phases as `own`.

    Ray restarts a worker that died and gives it the same batch again.

    Args:
        kept: references to the data and to the Attempts. A list keeps them as references, so a restarted worker can still fetch them.

    Raises:
        RuntimeError: the batch has ended the process of a worker more than RETRIES times.
    """

    def __init__(self, run: RunConfig, kept: list[Any]) -> None:
        import ray

        self._attempts = kept[1]
        if run.device == "cpu":
            torch.set_num_threads(1)  # one worker per core
        self._worker = Worker(run, ray.get(kept[0]))
        self._ended: float | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        _begin(self._attempts, "adapted to", int(row["item"]))
        batch = pickle.loads(row["batch"])
        batch = batch._replace(images={i: self._worker.crop(image) for i, image in batch.images.items()})
        records, seconds = self._worker.adapt(batch, self._worker.stacked(batch))
        end = time.perf_counter()
        seconds = {**seconds, "own": end - start - sum(seconds.values()), "load": 0.0 if self._ended is None else start - self._ended}
        self._ended = end
        return {"number": batch.number, "records": json.dumps(records), "seconds": json.dumps(seconds)}


def ray_records(run: RunConfig, data: Images | Maps, batches: Sequence[Sequence[int]], remaining: Sequence[int]) -> Iterator[Finished]:
    """Yields batches as they finish, in any order.

    The draws of an image depend only on (seed, image_id), so it does not matter which worker adapts to it.

    Raises:
        ImportError: Ray is missing (extra `scale`).
    """
    if run.device not in ("cpu", "cuda"):
        raise ValueError(f"device is {run.device!r} with scale 'ray', which gives each worker a GPU of its own: use cuda, or cpu")
    try:
        import ray
    except ImportError as error:
        raise ImportError("scale 'ray' needs Ray: pip install 'dtta-fast[scale]'") from error
    ours = not ray.is_initialized()
    if ours:
        os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's default of 15 starves the workers if anything else runs
        ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.issue_detectors_config.detectors = []
        context.actor_task_retry_on_errors = False  # we report errors ourselves; only a dead worker is retried
        context.max_errored_blocks = 0
        kind = "GPU" if run.device.startswith("cuda") else "CPU"
        workers = min(len(remaining), max(1, int(ray.cluster_resources().get(kind, 1))))
        kept, attempts = ray.put(data), ray.remote(num_cpus=0)(Attempts).remote()

        def read(row: dict[str, Any]) -> dict[str, Any]:
            number = int(row["item"])
            _begin(attempts, "read", number)
            return {"item": number, "batch": pickle.dumps(fetch(ray.get(kept), number, batches[number]))}

        rows = ray.data.from_items(list(remaining), override_num_blocks=len(remaining))
        # with GPUs, the CPU cores read; if the cores adapt, one reader is enough for all, since each reader is a process that imports torch
        rows = rows.map(read, concurrency=2 * workers) if kind == "GPU" else rows.map(read, num_cpus=0.01, concurrency=1)
        placed = {"num_gpus": 1} if kind == "GPU" else {"num_cpus": 0.9}
        done = rows.map(
            RayWorker,
            fn_constructor_args=(run, [kept, attempts]),
            concurrency=workers,
            **placed,
        )
        for row in done.iter_rows():
            yield int(row["number"]), json.loads(row["records"]), json.loads(row["seconds"])
    finally:
        if ours:
            ray.shutdown()
