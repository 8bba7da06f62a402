"""Reads the images of a run batch by batch, adapts to them, and makes their records."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from dtta_fast.data.base import Images, Maps
from dtta_fast.data.folder import natural_key
from dtta_fast.data.images import holds_maps, open_images
from dtta_fast.metrics import confusion, depth_errors, mean_class_accuracy, mean_iou
from dtta_fast.runs.config import RunConfig
from dtta_fast.runs.content import digest
from dtta_fast.runs.models import image_size, load_models
from dtta_fast.runs.records import Record, rounded
from dtta_fast.runtime.failures import out_of_memory
from dtta_fast.runtime.warn import warn
from dtta_fast.session.adapter import Adapter
from dtta_fast.session.checks import check_calibration
from dtta_fast.session.result import AdaptResult
from dtta_fast.tasks.base import ClassTask

BEST = 5  # number of top classes whose probabilities a record holds
MOST_BATCH = 2**31  # maximum bytes of the images in a batch
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


def warn_of_order(classes: Sequence[str]) -> None:
    """Warns if the string order of class folders, in which we number them, differs from their natural order, which timm uses."""
    natural = sorted(classes, key=natural_key)
    if list(classes) == sorted(classes) and natural != list(classes):
        first = next(k for k, (one, other) in enumerate(zip(classes, natural, strict=True)) if one != other)
        warn(
            f"class folders are numbered in string order, so class {first} is {classes[first]!r}; in natural order, which timm uses, it is "
            f"{natural[first]!r}. If the model was trained in another order, give all folder names as classes, in the model's order"
        )


class Worker:
    """Holds a data set, its models and an adapter; each process has one."""

    def __init__(self, run: RunConfig, data: Images | Maps) -> None:
        self.run, self.data = run, data
        # zero_shot uses the data set's own classes, whatever their indices in other models
        numbers = None if isinstance(data, Maps) or run.task == "zero_shot" or data.outputs is None else [*enumerate(data.outputs)]
        self._class_of = None if numbers is None else {output: k for k, output in numbers} | dict(data.further)  # type: ignore[union-attr]
        models = load_models(run, data.classes, None if self._class_of is None else sorted(self._class_of))
        if self._class_of is None and models.outputs is not None:
            self._class_of = {output: k for k, output in enumerate(models.outputs)}
        elif self._class_of is None and run.task == "classification" and isinstance(data, Images):
            warn_of_order(data.classes)
        self._task = models.task
        check_calibration(models.denoiser, run.adapt)
        self.adapter = Adapter(models.model, models.denoiser, run.adapt, models.task)
        self._last_group: str | None = None

    def crop(self, image: Tensor) -> Tensor:
        """Crops an image [3, H, W] to the model's view of it, in [0, 1], and returns a copy. An image with a map has this size already."""
        whole = image[None].float().div_(255) if image.dtype == torch.uint8 else image[None].float()
        return (whole if isinstance(self.data, Maps) else self.adapter.crop(whole))[0].clone()

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
        all_ids = sorted([*batch.images, *batch.failed])
        group = self.data.groups[all_ids[0]]
        if self.run.protocol == "online" and group != self._last_group:
            self.adapter.reset()
        self._last_group = group
        found: dict[int, Record] = {i: {"error": text} for i, text in batch.failed.items()}
        seconds: dict[str, float] = {}
        if crops is not None:
            device, start = self.run.device, time.perf_counter()
            try:
                image_ids = torch.tensor([*batch.images], dtype=torch.int64, device=device)
                result = self.adapter.adapt(crops.to(device), image_ids=image_ids, cropped=True)
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
        return [{**self._of_image(i, batch), **found[i]} for i in all_ids], seconds

    def go_on(self, state: dict[str, Any], group: str) -> None:
        """Resumes from a saved online state, as if the worker had adapted to all earlier batches; group is the group of that state."""
        self.adapter.load_state_dict(state)
        self._last_group = group

    def _answered(self, crops: Tensor) -> list[bool]:
        """Tells for each image whether the unadapted model's outputs hold no NaN and no +infinity, which adaptation cannot repair."""
        found = self.adapter.engine.program.has_outputs(crops)
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
            probabilities = outputs.float().masked_fill(~cast(ClassTask, self._task).possible(outputs), -torch.inf).softmax(1)
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


def _without(batch: Fetched, crops: Tensor, answered: Sequence[bool]) -> tuple[Fetched, Tensor | None]:
    """Removes the images whose model outputs are not finite from a batch and its crops, and adds them to the failed images."""
    kept = {i: fine for i, fine in zip(batch.images, answered, strict=True) if fine}
    images, truth = ({i: item for i, item in part.items() if i in kept} for part in (batch.images, batch.truth))
    failed = {i: "the model's outputs for it are not finite" for i in batch.images if i not in kept}
    part = crops[torch.tensor(answered, dtype=torch.bool, device=crops.device)]
    return batch._replace(images=images, truth=truth, failed={**batch.failed, **failed}), part if kept else None
