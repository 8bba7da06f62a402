"""Demo on real images: handwritten digits, clean and corrupted, adapted with the digits models of the zoo."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dtta_fast import zoo
from dtta_fast.config import AdaptConfig
from dtta_fast.data.corruptions import DIGITS_C, corrupt
from dtta_fast.data.digits import DIGITS, Split, load_digits
from dtta_fast.denoisers.base import Denoiser
from dtta_fast.metrics import bootstrap_interval
from dtta_fast.report import Run
from dtta_fast.runs.records import Record, rounded
from dtta_fast.session.adapter import Adapter
from dtta_fast.session.result import AdaptResult
from dtta_fast.tasks.base import Task

CLEAN = "clean"
TOP = 5  # classes whose probabilities a report shows


def nothing(name: str, ids: Tensor, images: Tensor, labels: Tensor, result: AdaptResult) -> None:
    """Keeps nothing of a batch."""


def run(
    config: AdaptConfig,
    images: int,
    *,
    split: Split = "test",
    open_vocabulary: bool = False,
    advance: Callable[[str, int], None] = lambda name, done: None,
    keep: Callable[[str, Tensor, Tensor, Tensor, AdaptResult], None] = nothing,
) -> dict[str, Any]:
    """Adapts to the first `images` digits of a split, clean and under every corruption of digits-C.

    Args:
        open_vocabulary: use CLIP and Stable Diffusion with the names of the digits, instead of a classifier and a DiT.
        advance: called with the corruption's name and the number of images finished since the last call. keep: called with the
            corruption's name, and the numbers, images, labels and result of each batch.

    Returns:
        Accuracies in 0..1, evaluations and seconds per image: at the top, means over the corruptions, with the 95 % interval of the
        mean gain over images; then one entry per corruption and one for the clean images. If config.match is "both",
        matched_accuracy is the accuracy of the source model on matched images.

    Raises:
        ValueError: `images` is not between 1 and the size of the split.
    """
    clean, labels = load_digits(split)
    if not 1 <= images <= len(clean):
        raise ValueError(f"images is {images}; the {split} split has 1 .. {len(clean)}")
    clean, labels = clean[:images], labels[:images]
    name = "open_vocabulary" if open_vocabulary else "digits"
    (model, denoiser), task = zoo.load(name), zoo.task(name)
    adapter = Adapter(model, denoiser, config, task)
    source, _ = task.bind(model, denoiser)
    batch = 50 if config.denoiser_parameters == "frozen" else 4  # images per pass, each adapted separately
    rows: dict[str, dict[str, Any]] = {}
    gains: dict[str, Tensor] = {}
    for name in (CLEAN, *DIGITS_C):
        inputs = clean if name == CLEAN else corrupt(clean, name, DIGITS_C[name])
        adapter.reset()
        matched = _accuracy_on_matched(source, task, denoiser, inputs, labels) if config.match == "both" else {}
        start = time.perf_counter()
        results = []
        batches = torch.arange(images, dtype=torch.int64, device="cpu").split(batch)
        for ids in batches:
            results.append(adapter.adapt(inputs[ids], image_ids=ids))
            advance(name, len(ids))
        seconds = time.perf_counter() - start
        for ids, result in zip(batches, results, strict=True):
            keep(name, ids, inputs[ids], labels[ids], result)
        before, after = (
            torch.cat([getattr(result, which) for result in results]) == labels for which in ("predictions_before", "predictions")
        )
        rows[name] = {
            "severity": DIGITS_C.get(name),
            "source_accuracy": int(before.sum()) / images,
            **matched,
            "adapted_accuracy": int(after.sum()) / images,
            "negative_flips": int((before & ~after).sum()) / images,
            "evaluations_per_image": sum(int(result.evaluations.sum()) for result in results) / images,
            "seconds_per_image": seconds / images,
        }
        gains[name] = after.float() - before.float()
    corrupted = [rows[name] for name in DIGITS_C]
    means = {key: sum(row[key] for row in corrupted) / len(corrupted) for key in corrupted[0] if key != "severity"}
    interval = bootstrap_interval(torch.stack([gains[name] for name in DIGITS_C]).mean(0))
    return {"images": images, "batch": batch, **means, "gain_interval": interval, CLEAN: rows.pop(CLEAN), "corruptions": rows}


class Kept:
    """Keeps the images and records of a demo, for a report of it."""

    def __init__(self) -> None:
        self.images: list[Tensor] = []
        self._records: list[Record] = []
        self._seconds: dict[str, float] = {}

    def __call__(self, name: str, ids: Tensor, images: Tensor, labels: Tensor, result: AdaptResult) -> None:
        """Adds a batch; see run(). Clean images are left out, as they are of the table's mean."""
        if name == CLEAN:
            return
        group, place = f"{name}{DIGITS_C[name]}", f"{name}/{DIGITS_C[name]}"
        for phase, seconds in result.seconds.items():
            self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds
        shares = [outputs.float().softmax(1).sort(1, descending=True) for outputs in (result.outputs_before, result.outputs)]
        for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            number = len(self.images)
            record: Record = {"image_id": number, "batch": 0, "path": f"{place}#{int(ids[i])}", "group": group, "label": label}
            for suffix, (values, classes) in zip(("_before", ""), shares, strict=True):
                top = [[k, rounded(p)] for k, p in zip(classes[i, :TOP].tolist(), values[i, :TOP].tolist(), strict=True)]
                record |= {f"prediction{suffix}": top[0][0], f"confidence{suffix}": top[0][1], f"top{suffix}": top}
            record |= {
                "loss": [rounded(loss) for loss in result.loss[i].tolist()],
                "accepted": bool(result.accepted[i]),
                "evaluations": int(result.evaluations[i]),
                "seconds": sum(result.seconds.values()) / len(images),
            }
            self._records.append(record)
            self.images.append(image)

    def as_run(self, config: dict[str, Any], environment: dict[str, str]) -> Run:
        """Returns what was kept as a run, whose config and environment are shown as given."""
        return Run(
            name="demo",
            folder=Path("demo"),
            task="classification",
            records=self._records,
            failed=(),
            config=config,
            classes=DIGITS,
            environment=environment,
            seconds=self._seconds,
            wall_seconds=sum(self._seconds.values()),
            unfinished="",
        )


@torch.no_grad()
def _accuracy_on_matched(model: nn.Module, task: Task, denoiser: Denoiser, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy of the source model on matched images, which shows the effect of matching without adaptation."""
    if denoiser.calibration is None:
        return {}
    outputs = model(task.normalise(model, denoiser.calibration.match(task.crop(model, images))))
    return {"matched_accuracy": float((outputs.argmax(1) == labels).float().mean())}
