"""Runs over data sets: every image adapted and recorded, goes on where it was stopped."""

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

BEST = 5  # classes of an image that a record tells the probabilities of
AHEAD = 2  # batches that are read ahead, for each thread
MOST_AHEAD = 2**30  # bytes of what waits to be adapted to: beyond that no further batch is read
MOST_BATCH = 2**31  # bytes of a batch's images
Advance = Callable[[list[Record]], None]
Finished = tuple[int, list[Record], dict[str, float]]  # a batch's number, its records, and seconds by phase


class Fetched(NamedTuple):
    """A batch's images, by id, or why one could not be read.

    images: as they were read, uint8 [3, H, W], or [3, size, size] in [0, 1] with their maps; or as they were cropped. digests: of what was
    read, as runs.content.digest gives them.
    """

    number: int
    images: dict[int, Tensor]
    truth: dict[int, Tensor]
    digests: dict[int, str]
    failed: dict[int, str]


def open_data(run: RunConfig) -> Images | Maps:
    """The run's data set.

    Raises:
        ValueError: there is no such one, or it does not go with the task.
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
    """Image ids, batch by batch: in the data set's order, a batch of one group."""
    ids = range(len(data)) if run.per_class is None else subsample(data, run.per_class, run.adapt.seed)
    by_group: dict[str, list[int]] = {}
    for i in ids:
        by_group.setdefault(data.groups[i], []).append(i)
    return [tuple(part[first : first + run.batch]) for part in by_group.values() for first in range(0, len(part), run.batch)]


def fetch(data: Images | Maps, number: int, image_ids: Sequence[int], crop: Callable[[Tensor], Tensor] | None = None) -> Fetched:
    """Reads a batch, and crops each image before the next one is read; an image that cannot be read is told of in it."""
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
    """A data set, its models and an adapter; one for each process."""

    def __init__(self, run: RunConfig, data: Images | Maps) -> None:
        self.run, self.data = run, data
        # the classes of zero_shot are the data set's own, whatever their numbers elsewhere
        numbers = None if isinstance(data, Maps) or run.task == "zero_shot" or data.outputs is None else [*enumerate(data.outputs)]
        self._class_of = None if numbers is None else {output: k for k, output in numbers} | dict(data.further)  # type: ignore[union-attr]
        models = load_models(run, data.classes, None if self._class_of is None else sorted(self._class_of))
        self.task: Any = models.task
        self.adapter = Adapter(models.model, models.denoiser, run.adapt, models.task)
        self._last_group: str | None = None

    def crop(self, image: Tensor) -> Tensor:
        """An image [3, H, W] as the model looks at it, in [0, 1] and in memory of its own."""
        whole = image[None].float().div_(255) if image.dtype == torch.uint8 else image[None].float()
        return self.adapter.crop(whole)[0].clone()

    def stacked(self, batch: Fetched) -> Tensor | None:
        """The crops of the images that could be read, [B, 3, H, W].

        Raises:
            ValueError: they have several sizes, and the model has no config to crop them by.
        """
        crops = [*batch.images.values()]
        sizes = {tuple(crop.shape[1:]) for crop in crops}
        if len(sizes) > 1:
            shown = ", ".join(f"{height}x{width}" for height, width in sorted(sizes)[:3])
            raise ValueError(f"images of a batch have sizes {shown}, and the model has no config to crop them by: use batch 1")
        return torch.stack(crops) if crops else None

    def adapt(self, batch: Fetched, crops: Tensor | None) -> tuple[list[Record], dict[str, float]]:
        """The records of a batch, and seconds by phase."""
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
            seconds = result.seconds  # reading them waits for the device
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
        """As if it had adapted to what came before: an online state, and the group that it is of."""
        self.adapter.load_state_dict(state)
        self._last_group = group

    def _answered(self, crops: Tensor) -> list[bool]:
        """Of each image, whether the model gives an answer to it: one without NaN and without infinity, which no adaptation mends."""
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
        """Of each image the class and the likeliest ones with their probabilities, before and after, in the data set's numbers."""
        found: list[Record] = [{} for _ in range(len(result.outputs))]
        known, held = len(self.data.classes), result.outputs.shape[1]
        if self._class_of is None and known and known != held:
            raise ValueError(f"the data set has {known} classes and the model {held}: give a model of the same classes, in the same order")
        for suffix, outputs in (("_before", result.outputs_before), ("", result.outputs)):
            probabilities = outputs.float().masked_fill(~self.task.possible(outputs), -torch.inf).softmax(1)
            if self._class_of is not None:  # several outputs may mean one class: their probabilities add up
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
        """Of each map its scores, before and after."""
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
    """Lets every value through."""

    def require(self, fine: Tensor, error: Callable[[], str]) -> None:
        """Asks nothing."""


def _without(batch: Fetched, crops: Tensor, answered: Sequence[bool]) -> tuple[Fetched, Tensor | None]:
    """A batch and its crops without the images that the model has no answer to, which count as failed."""
    kept = {i: fine for i, fine in zip(batch.images, answered, strict=True) if fine}
    images, truth = ({i: item for i, item in part.items() if i in kept} for part in (batch.images, batch.truth))
    failed = {i: "the model's outputs for it are not finite" for i in batch.images if i not in kept}
    part = crops[torch.tensor(answered, dtype=torch.bool, device=crops.device)]
    return batch._replace(images=images, truth=truth, failed={**batch.failed, **failed}), part if kept else None


def evaluate(
    run: RunConfig, out: str | Path, *, scale: str = "none", overwrite: bool = False, advance: Advance = lambda records: None
) -> dict[str, Any]:
    """Adapts to every image of a data set, recorded in a folder as runs.folder.RunFolder says; goes on where the folder ends.

    Args:
        out: the folder. scale: none, this process, or, where torchrun started several, a share for each; ray, Ray Data with a worker for
            each GPU, or CPU core where there is none (extra `scale`). overwrite: begin again, in place of the run that is in the folder,
            which stays until the first batch is done; and beside files of others. advance: called with each batch's records as they are
            written.

    Returns:
        What summary.json holds: runs.summary.summary() of all records, the config, versions and machine, seconds by phase.

    Raises:
        ValueError: bad input, or a folder that is in use, holds another run, files of others, or records of other images.
            OSError: the folder cannot be written to.
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
    """This process's number, and how many torchrun started, by its variables.

    Raises:
        ValueError: they make no sense.
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
    """The processes that torchrun started know of one another."""
    if world == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))  # "cuda" is then this process's own
    torch.distributed.init_process_group("gloo", timeout=timedelta(days=365))  # shares may end hours apart
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def _records(run: RunConfig, data: Images | Maps, remaining: Sequence[int], folder: RunFolder) -> Iterator[Finished]:
    """In this process, batch by batch; the next ones are read meanwhile."""
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
        ahead, largest = iter(remaining), 0  # the largest batch so far, in bytes
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
    """The memory that a batch takes while it waits to be adapted to."""
    return (0 if crops is None else crops.nbytes) + sum(truth.nbytes for truth in batch.truth.values())
