"""The result of an adaptation, assembled from the groups of images that ran at once and the images that were not adapted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dtta_fast.runtime.clock import Clock
from dtta_fast.step import State


@dataclass(frozen=True)
class AdaptResult:
    """The per-image results of an adaptation.

    Attributes:
        outputs, outputs_before: the model's outputs [B, ...] after and before adaptation (logits, for a classifier). If the guard
            rejected the change, the outputs after equal those before; with match "both" they may also be the source model's outputs
            for the matched image.
        predictions, predictions_before: the task's answers: [B] class indices, or labels or depth [B, H, W] at the task's crop.
        loss: [B, steps_run], the denoising loss before each update; NaN for an image that the pre-check excluded.
        accepted: [B] bool, False where the original answer was kept.
        steps_run: number of updates made.
        evaluations: [B], the image's denoiser evaluations, each for one (timestep, noise, condition), including the guard's.
        clock: the source of `seconds`.
    """

    outputs: Tensor
    outputs_before: Tensor
    predictions: Tensor
    predictions_before: Tensor
    loss: Tensor
    accepted: Tensor
    steps_run: int
    evaluations: Tensor
    clock: Clock = field(repr=False, compare=False)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds spent on the batch by phase: encode, adapt, guard. On a GPU, reading this waits until the GPU has finished."""
        return self.clock.seconds


class Group(NamedTuple):
    """The results of a group of images that ran at once."""

    state: State | None
    before: Tensor
    outputs: Tensor
    loss: Tensor
    accepted: Tensor
    evaluations: Tensor


def assembled(rows: Tensor | None, groups: list[Group], outputs: Tensor | None, forwards: int) -> dict[str, Any]:
    """Assembles AdaptResult's fields for all images: those in `rows` from the groups, the others unchanged.

    rows: [A], the images selected for adaptation; None is all. The groups hold either these or all images.
    outputs: [B, ...], the source model's outputs, needed if some images were not adapted.
    forwards: denoiser forward passes per image and step.
    """
    names = ("before", "outputs", "loss", "accepted", "evaluations")
    found = {name: torch.cat([getattr(group, name) for group in groups]) for name in names} if groups else {}
    steps = found["loss"].shape[1] if found else 0
    if rows is not None and found and len(found["loss"]) > len(rows):  # the groups hold other images too
        found = {name: values[rows] for name, values in found.items()}
    if found:
        found["evaluations"] = found["evaluations"] + steps * forwards
    if rows is not None and outputs is not None:
        images = len(outputs)
        whole = {
            "before": outputs,
            "outputs": outputs.clone(),
            "loss": outputs.new_full((images, steps), torch.nan, dtype=torch.promote_types(outputs.dtype, torch.float32)),
            "accepted": torch.zeros(images, dtype=torch.bool, device=outputs.device),
            "evaluations": torch.zeros(images, dtype=torch.int64, device=outputs.device),
        }
        for name, values in found.items():
            if name != "before":
                whole[name][rows] = values.to(whole[name].dtype)
        found = whole
    found["outputs_before"] = found.pop("before")
    return {**found, "steps_run": steps}
