"""The result of an adaptation, assembled from the groups of images that ran at once and the images that were not adapted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dtta_fast.runtime.clock import Clock
from dtta_fast.session.loop import Outcome


@dataclass(frozen=True)
class AdaptResult:
    """The per-image results of an adaptation.

    Attributes:
        outputs, outputs_before: the model's outputs [B, ...] after adaptation, and the unadapted model's for the original image (logits,
            for a classifier). Where the guard rejects the change or the pre-check excludes the image, the outputs are the unadapted
            model's: for the matched image with match "both", and for the original image otherwise.
        predictions, predictions_before: the task's answers: [B] class indices, or labels or depth [B, H, W] at the task's crop.
        loss: [B, steps_run], the denoising loss before each update; NaN for an image that the pre-check excluded.
        accepted: [B] bool, whether the outputs come from the adapted weights or, for a method that trains nothing, from the losses.
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


def indices(mask: list[bool], device: torch.device) -> Tensor:
    """Returns the positions of the true values as an int64 tensor; the host does not wait for the device."""
    positions = [i for i, wanted in enumerate(mask) if wanted]
    return torch.tensor(positions, dtype=torch.int64, device="cpu").to(device, non_blocking=True)


def assembled(
    rows: Tensor | None, outcomes: list[Outcome], unadapted: tuple[tuple[Tensor, Tensor], ...] | None, forwards: int
) -> dict[str, Any]:
    """Assembles AdaptResult's fields for all images: those in `rows` from the outcomes, the others unadapted.

    rows: [A], the images selected for adaptation; None is all. The outcomes hold either these or all images.
    unadapted: the source model's outputs and predictions [B, ...], those that stand and those for the original images, needed if some
        images were not adapted.
    forwards: denoiser forward passes per image and step.
    """
    names = Outcome._fields[1:]
    found = {name: torch.cat([getattr(outcome, name) for outcome in outcomes]) for name in names} if outcomes else {}
    steps = found["loss"].shape[1] if found else 0
    if rows is not None and found and len(found["loss"]) > len(rows):  # the outcomes hold other images too
        found = {name: values[rows] for name, values in found.items()}
    if found:
        found["evaluations"] = found["evaluations"] + steps * forwards
    if rows is not None and unadapted is not None:
        (outputs, predictions), (before, predictions_before) = unadapted
        images = len(outputs)
        whole = {
            "before": before,
            "outputs": outputs.clone(),
            "predictions": predictions.clone(),
            "predictions_before": predictions_before,
            "loss": outputs.new_full((images, steps), torch.nan, dtype=torch.promote_types(outputs.dtype, torch.float32)),
            "accepted": torch.zeros(images, dtype=torch.bool, device=outputs.device),
            "evaluations": torch.zeros(images, dtype=torch.int64, device=outputs.device),
        }
        for name, values in found.items():
            if name not in ("before", "predictions_before"):
                whole[name][rows] = values.to(whole[name].dtype)
        found = whole
    found["outputs_before"] = found.pop("before")
    return {**found, "steps_run": steps}
