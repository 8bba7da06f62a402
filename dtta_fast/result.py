"""What an adaptation gives, put together from the images that ran at once and those that were left alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dtta_fast.runtime.clock import Clock
from dtta_fast.step import State


@dataclass(frozen=True)
class AdaptResult:
    """What an adaptation gave, image by image.

    Attributes:
        outputs, outputs_before: the model's outputs [B, ...] after and before (logits, for a classifier); where the guard refused the
            change, after is before; with match "both" it may also be the source's outputs for the matched image.
        predictions, predictions_before: the task's answers: [B] class indices, or labels or depth [B, H, W] at the task's crop.
        loss: [B, steps_run], the denoising loss before each update; NaN for an image that the pre-check left alone.
        accepted: [B] bool, False where the answer before stands.
        steps_run: updates made.
        evaluations: [B], an image's forwards of the denoiser for one (timestep, noise, condition), the guard's included.
        clock: what `seconds` is read from.
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
        """Seconds of the batch by phase: encode, adapt, guard. On a GPU, reading them waits until it has finished."""
        return self.clock.seconds


class Group(NamedTuple):
    """What the images that ran at once gave."""

    state: State | None
    before: Tensor
    outputs: Tensor
    loss: Tensor
    accepted: Tensor
    evaluations: Tensor


def assembled(rows: Tensor | None, groups: list[Group], outputs: Tensor | None, forwards: int) -> dict[str, Any]:
    """AdaptResult's fields of all images: those of `rows` by the groups, the others as they were.

    rows: [A], the images that were to be adapted; None is all. The groups hold them, or all images.
    outputs [B, ...]: of the source, where some images were left alone.
    forwards: of the denoiser, an image and step.
    """
    names = ("before", "outputs", "loss", "accepted", "evaluations")
    found = {name: torch.cat([getattr(group, name) for group in groups]) for name in names} if groups else {}
    steps = found["loss"].shape[1] if found else 0
    if rows is not None and found and len(found["loss"]) > len(rows):  # others ran beside them
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
