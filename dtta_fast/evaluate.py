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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dtta_fast import environment
from dtta_fast.adapter import Adapter
from dtta_fast.data.images import Images, holds_maps, open_images, subsample
from dtta_fast.data.maps import Maps
from dtta_fast.inputs import Checks
from dtta_fast.metrics import confusion, depth_errors, mean_class_accuracy, mean_iou
from dtta_fast.result import AdaptResult
from dtta_fast.runs.config import RunConfig
from dtta_fast.runs.content import digest, read_again, shortened
from dtta_fast.runs.folder import RunFolder
from dtta_fast.runs.models import image_size, load_models
from dtta_fast.runs.records import Record, rounded
from dtta_fast.runs.summary import summary
from dtta_fast.runtime.memory import out_of_memory

BEST = 5  # number of top classes whose probabilities a record holds
AHEAD = 2  # batches to read ahead per thread
MOST_AHEAD = 2**30  # bytes of batches waiting for adaptation; no more batches are read beyond this
MOST_BATCH = 2**31  # maximum bytes of the images in a batch
Advance = Callable[[list[Record]], None]
Finished = tuple[int, list[Record], dict[str, float]]  # batch number, its records, and seconds per phase


class Fetched(NamedTuple):
    """The images of a batch by image id, with the reason for each image that could not be read.

    images: as read, uint8 [3, H, W], or [3, size, size] in [0, 1] if they come with maps; or as cropped. digests: digests of the data that
    was read, as returned by runs.content.digest.
    """

    number: int
    images: dict[int, Tensor]
    truth: dict[int, Tensor]
    digests: dict[int, str]
    failed: dict[int, str]


def open_data(run: RunConfig) -> Images | Maps:
    """Opens the data set of a run.

    Raises:
        ValueError: the data set does not exist, or does not fit the task.
    """
    held, dense = "maps" if holds_maps(run.data) else "classes", run.task in ("segmentation", "depth")
    if (held == "maps") != dense:
        raise ValueError(f"data is {run.data!r}, which holds {held}, and task is {run.task!r}: they do not go together")
    return open_images(
        run.data,
        None if run.root is None else Path(run.root),
        corruptions=run.corruptions,
        severities=run.severities,
        split=run.split,
        size=image_size(run.task, run.model),
    )


def batches_of(run: RunConfig, data: Images | Maps) -> list[tuple[int, ...]]:
    """Image ids of each batch, in the order of the data set; all images of a batch belong to the same group."""
    ids = range(len(data)) if run.per_class is None else subsample(data, run.per_class, run.adapt.seed)
    by_group: dict[str, list[int]] = {}
    for i in ids:
        by_group.setdefault(data.groups[i], []).append(i)
    return [tuple(part[first : first + run.batch]) for part in by_group.values() for first in range(0, len(part), run.batch)]


def fetch(data: Images | Maps, number: int, image_ids: Sequence[int], crop: Callable[[Tensor], Tensor] | None = None) -> Fetched:
    """Reads a batch and crops each image before reading the next one; images that cannot be read are listed under `failed`."""
    found, held = Fetched(number, {}, {}, {}, {}), 0
    for i in image_ids:
        try:
            item = data[i]
            image, own = item[0] if isinstance(item, tuple) else item, digest(item)
            if crop is not None:
                image = crop(image)
            if held + image.nbytes > MOST_BATCH:
                raise ValueError(f"the images of its batch have more than {MOST_BATCH} bytes: use a smaller batch")
        except (ValueError, OSError, MemoryError) as error:
            found.failed[i] = str(error) or type(error).__name__
            continue
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            found.failed[i] = f"there was not enough memory for it: {str(error).splitlines()[0]}"
            continue
        held += image.nbytes
        found.images[i], found.digests[i] = image, own
        if isinstance(item, tuple):
            found.truth[i] = item[1]
    return found


class Worker:
    """Holds a data set, its models and an adapter; each process has one."""

    def __init__(self, run: RunConfig, data: Images | Maps) -> None:
        self.run, self.data = run, data
        # zero_shot uses the data set's own classes, whatever their indices in other models
        numbers = None if isinstance(data, Maps) or run.task == "zero_shot" or data.outputs is None else [*enumerate(data.outputs)]
        self._class_of = None if numbers is None else {output: k for k, output in numbers} | dict(data.further)  # type: ignore[union-attr]
        models = load_models(run, data.classes, None if self._class_of is None else sorted(self._class_of))
        self.task: Any = models.task
        self.adapter = Adapter(models.model, models.denoiser, run.adapt, models.task)
        self._last_group: str | None = None

    def crop(self, image: Tensor) -> Tensor:
        """Crops an image [3, H, W] to the model's view of it, in [0, 1], and returns a copy."""
        whole = image[None].float().div_(255) if image.dtype == torch.uint8 else image[None].float()
        return self.adapter.crop(whole)[0].clone()

    def stacked(self, batch: Fetched) -> Tensor | None:
        """Stacks the crops of the images that could be read into [B, 3, H, W]; None if there are none.

        Raises:
            ValueError: the crops differ in size, and the model has no config that defines a crop.
        """
        crops = [*batch.images.values()]
        sizes = {tuple(crop.shape[1:]) for crop in crops}
        if len(sizes) > 1:
            shown = ", ".join(f"{height}x{width}" for height, width in sorted(sizes)[:3])
            raise ValueError(f"images of a batch have sizes {shown}, and the model has no config to crop them by: use batch 1")
        return torch.stack(crops) if crops else None

    def adapt(self, batch: Fetched, crops: Tensor | None) -> tuple[list[Record], dict[str, float]]:
        """Adapts to a batch and returns its records and the seconds per phase."""
        image_ids = sorted([*batch.images, *batch.failed])
        group = self.data.groups[image_ids[0]]
        if self.run.protocol == "online" and group != self._last_group:
            self.adapter.reset()
        self._last_group = group
        found: dict[int, Record] = {i: {"error": text} for i, text in batch.failed.items()}
        seconds: dict[str, float] = {}
        if crops is not None:
            device, start = self.run.device, time.perf_counter()
            try:
                result = self.adapter.adapt(crops.to(device), image_ids=torch.tensor([*batch.images], dtype=torch.int64, device=device))
            except ValueError:
                answered = self._answered(crops.to(device))
                if all(answered):
                    raise
                return self.adapt(*_without(batch, crops, answered))
            seconds = result.seconds  # reading this waits for the device
            took = time.perf_counter() - start
            answers = self._scores(result, torch.stack([*batch.truth.values()])) if batch.truth else self._classes(result)
            losses, accepted, evaluations = result.loss.tolist(), result.accepted.tolist(), result.evaluations.tolist()
            for k, i in enumerate(batch.images):
                found[i] = {
                    **answers[k],
                    "loss": [rounded(loss) for loss in losses[k]],
                    "accepted": accepted[k],
                    "evaluations": evaluations[k],
                    "seconds": round(took / len(crops), 6),
                }
        return [{**self._of_image(i, batch), **found[i]} for i in image_ids], seconds

    def go_on(self, state: dict[str, Any], group: str) -> None:
        """Resumes from a saved online state, as if the worker had adapted to all earlier batches; group is the group of that state."""
        self.adapter.load_state_dict(state)
        self._last_group = group

    def _answered(self, crops: Tensor) -> list[bool]:
        """Tells for each image whether the unadapted model's outputs hold no NaN and no +infinity, which adaptation cannot repair."""
        engine, config = self.adapter.engine, self.run.adapt
        calibration, problem = engine.denoiser.calibration, engine.problem
        looks = [crops] if config.match == "off" or calibration is None else [crops, calibration.match(crops)]
        found = torch.ones(len(crops), dtype=torch.bool, device=crops.device)
        for look in looks:
            inputs = problem.task.normalise(problem.model, look).to(next(problem.model.parameters()).dtype)
            outputs = engine.source_outputs(inputs, _Unchecked()).flatten(1)
            found &= ~(outputs.isnan() | (outputs == torch.inf)).any(1)
        return list(found.tolist())

    def _of_image(self, i: int, batch: Fetched) -> Record:
        labels = None if isinstance(self.data, Maps) else self.data.labels
        label = None if labels is None else int(labels[i])
        known = {"digest": batch.digests[i]} if i in batch.digests else {}
        return {"image_id": i, "batch": batch.number, "path": self.data.names[i], "group": self.data.groups[i], "label": label, **known}

    def _classes(self, result: AdaptResult) -> list[Record]:
        """Predicted class and top classes with probabilities of each image, before and after, as class indices of the data set."""
        found: list[Record] = [{} for _ in range(len(result.outputs))]
        known, held = len(self.data.classes), result.outputs.shape[1]
        if self._class_of is None and known and known != held:
            raise ValueError(f"the data set has {known} classes and the model {held}: give a model of the same classes, in the same order")
        for suffix, outputs in (("_before", result.outputs_before), ("", result.outputs)):
            probabilities = outputs.float().masked_fill(~self.task.possible(outputs), -torch.inf).softmax(1)
            if self._class_of is not None:  # several outputs may belong to one class: sum their probabilities
                whole = probabilities.new_zeros(len(probabilities), known)
                outputs_of = torch.tensor(list(self._class_of), dtype=torch.int64, device=whole.device)
                classes_of = torch.tensor(list(self._class_of.values()), dtype=torch.int64, device=whole.device)
                probabilities = whole.index_add(1, classes_of, probabilities[:, outputs_of])
            best = probabilities.topk(min(BEST, probabilities.shape[1]), dim=1)
            for record, classes, shares in zip(found, best.indices.tolist(), best.values.tolist(), strict=True):
                top = [[k, rounded(p)] for k, p in zip(classes, shares, strict=True)]
                record |= {f"prediction{suffix}": classes[0], f"confidence{suffix}": rounded(shares[0]), f"top{suffix}": top}
        return found

    def _scores(self, result: AdaptResult, truth: Tensor) -> list[Record]:
        """Scores of each map, before and after adaptation."""
        found: list[Record] = [{} for _ in range(len(truth))]
        for suffix, predictions in (("_before", result.predictions_before.cpu()), ("", result.predictions.cpu())):
            if self.run.task == "depth":
                scores = depth_errors(predictions, truth)
            else:
                counts = confusion(predictions, truth, result.outputs.shape[1])
                scores = {"mean_iou": mean_iou(counts), "mean_class_accuracy": mean_class_accuracy(counts)}
            for k, record in enumerate(found):
                record[f"score{suffix}"] = {name: rounded(float(values[k])) for name, values in scores.items()}
        return found


class _Unchecked(Checks):
    """Checks that accept every value."""

    def require(self, fine: Tensor, error: Callable[[], str]) -> None:
        """Does nothing."""


def _without(batch: Fetched, crops: Tensor, answered: Sequence[bool]) -> tuple[Fetched, Tensor | None]:
    """Removes the images whose model outputs are not finite from a batch and its crops, and adds them to the failed images."""
    kept = {i: fine for i, fine in zip(batch.images, answered, strict=True) if fine}
    images, truth = ({i: item for i, item in part.items() if i in kept} for part in (batch.images, batch.truth))
    failed = {i: "the model's outputs for it are not finite" for i in batch.images if i not in kept}
    part = crops[torch.tensor(answered, dtype=torch.bool, device=crops.device)]
    return batch._replace(images=images, truth=truth, failed={**batch.failed, **failed}), part if kept else None


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
    if scale not in ("none", "ray"):
        raise ValueError(f"scale is {scale!r}; allowed: none, ray")
    rank, world = _place()
    if run.protocol != "episodic" and (scale != "none" or world > 1):
        raise ValueError(
            f"protocol is {run.protocol!r} with several workers, and its state goes from each image to the next: run it in one process"
        )
    if overwrite and world > 1:
        raise ValueError(f"overwrite is True with {world} processes, which would remove what the others write: name another folder")
    begun = time.perf_counter()
    data = open_data(run)
    if run.classes and data.classes and len(run.classes) != len(data.classes):
        raise ValueError(f"classes names {len(run.classes)}, and the data set has {len(data.classes)}, whose order they have to be in")
    batches, config = batches_of(run, data), run.described()
    part = str(rank) if world > 1 else ""
    with _together(world), RunFolder(Path(out), config, batches, data, part, overwrite=overwrite) as folder:
        read_again((record for number in sorted(folder.done) for record in folder.done[number]), data, run.workers)
        for number in sorted(folder.done):
            advance(folder.done[number])
        remaining = [number for number in folder.remaining() if number % world == rank]
        seconds = {"start": time.perf_counter() - begun}
        if remaining:
            if scale == "ray":
                from dtta_fast.scale import ray_records

                finished: Iterator[Finished] = ray_records(run, data, batches, remaining)
            else:
                finished = _records(run, data, remaining, folder)
            for number, records, phases in finished:
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
        told = None if remaining else folder.summary
        found = {
            **summary(everything),
            "config": config,
            "classes": list(run.classes or data.classes),
            "environment": told["environment"] if told else environment.describe(),
            "seconds": told["seconds"] if told else seconds,
            "wall_seconds": told["wall_seconds"] if told else time.perf_counter() - begun,
            "records": records_digest,
        }
        folder.write_summary(found)
        return found


def _place() -> tuple[int, int]:
    """Reads the rank of this process and the world size from torchrun's environment variables.

    Raises:
        ValueError: the variables are invalid.
    """
    found = {name: os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))}
    for name, text in found.items():
        if not re.fullmatch("[0-9]{1,9}", text):
            raise ValueError(f"{name} of the environment is {shortened(text)}, which is no number: start by torchrun, or unset it")
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
