"""Tells, without labels, whether adaptation can help a model on given images, and what it costs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dtta_fast.config import AdaptConfig
from dtta_fast.denoisers.base import Denoiser
from dtta_fast.denoisers.calibration import Calibration
from dtta_fast.runtime.encoding import as_in_evaluation
from dtta_fast.session.adapter import Adapter
from dtta_fast.session.checks import fitted_to_denoiser
from dtta_fast.tasks.base import ClassTask
from dtta_fast.tasks.classification import Classification

PAIRS = 24  # of a comparison of two classes, as in the guard of FAST
LEAST_TRUST = 0.2  # below it, the guard hardly ever accepts an adapted answer
FEW_UNUSUAL = 0.10  # not many more than the 5 % of the denoiser's own images that are called unusual
NEARLY_ALL = 0.9
FEW = 20  # images whose shares are good to 22 points at best
PROBE = 32  # side of the blank images that show the normalisation


@dataclass(frozen=True)
class Suitability:
    """What examine() finds. Shares are of the images, from 0 to 1.

    Attributes:
        images: their number. sizes: their sizes, "640x480" for 640 columns, and how often each occurs.
        classes: of the model. parameters, denoiser_parameters: counts.
        crop: height and width that the model sees. mean, std: normalisation by channel, as found on blank images; empty if there is none
            to be found.
        calibrated: whether the denoiser has a calibration; trust is its trust, and 1 without one.
        unusual: share that lies outside the range of 95 % of the denoiser's own images; None without a calibration.
        selected: share that was adapted. by_matching: share whose answer changed to the one that matching alone gives. by_adaptation:
            share whose answer changed to another one.
        agreement: share in which the denoising loss prefers the classifier's answer to its second choice, and error its standard error.
            Near 0.5, the loss does not know these classes, or numbers them differently.
        evaluations, seconds: of an image, on average, under these settings and on this machine.
    """

    images: int
    sizes: dict[str, int]
    classes: int
    parameters: int
    denoiser_parameters: int
    crop: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    calibrated: bool
    trust: float
    unusual: float | None
    selected: float
    by_matching: float
    by_adaptation: float
    agreement: float
    error: float
    evaluations: float
    seconds: float

    def advice(self) -> list[str]:
        """Says what follows from the findings, the most important first."""
        found, tells = [], self.agreement - 2 * self.error >= 0.5
        if self.agreement + 2 * self.error < 0.5:
            found.append("the loss contradicts the classifier more often than not: is class k of the model class k of the denoiser?")
        elif not tells:
            found.append(
                "the loss does not clearly prefer the classifier's answers to its second choices: look at more images, check that class k "
                "of the model is class k of the denoiser, train the denoiser longer, or leave adaptation off"
            )
        if not self.calibrated:
            found.append("there is no calibration, so nothing is matched: run `dtta calibrate` on clean images, and this again")
        elif self.trust < LEAST_TRUST:
            found.append(
                f"trust is {self.trust:.2f}: the guard will hardly accept an adapted answer, and ONLINE and DUSA have no guard; "
                "use matching alone"
            )
        if self.unusual is not None and self.unusual <= FEW_UNUSUAL:
            found.append(f"{self.unusual:.0%} of the images are unusual, as 5 % of the denoiser's own are: there is little to gain")
        if self.unusual is not None and self.unusual >= NEARLY_ALL:
            found.append(
                f"{self.unusual:.0%} of the images are unusual: either all of them are corrupted, or they show other things than the "
                "denoiser's own images do, and then its losses mean nothing"
            )
        if self.images < FEW:
            found.append(f"{self.images} images say little: give {FEW} or more")
        changed = self.by_matching + self.by_adaptation
        if changed == 0:
            found.append("no answer changes: adaptation costs time and does nothing here")
        elif self.calibrated and self.by_adaptation < 0.1 * changed:
            found.append("nearly all changes come from matching: calibration.match() gives them without a step of adaptation")
        if changed and tells:
            found.append(f"{changed:.0%} of the answers change, so the accuracy can rise by at most that; check some of them with labels")
        return found


def examine(
    model: nn.Module, denoiser: Denoiser, images: Sequence[Tensor] | Tensor, config: AdaptConfig, task: ClassTask | None = None
) -> Suitability:
    """Examines a model and a denoiser on images [3, H, W], uint8 or in [0, 1], of any sizes.

    It runs the adaptation under `config`, and compares the losses under the classifier's two likeliest classes on 24 pairs per image.

    Raises:
        TypeError, ValueError: same as for Adapter; or there are no images.
    """
    if len(images) == 0:
        raise ValueError("images is empty; give one or more, 50 for shares that are good to about 7 points")
    task = task or Classification()
    config = fitted_to_denoiser(denoiser, config)
    adapter, device = Adapter(model, denoiser, config, task), next(denoiser.parameters()).device
    crops = [adapter.crop((image.float() / 255 if image.dtype == torch.uint8 else image.float())[None].to(device))[0] for image in images]
    batches = _alike(crops)
    start = time.perf_counter()
    results = [adapter.adapt(batch, image_ids=ids, cropped=True) for ids, batch in batches]
    after = torch.cat([result.predictions for result in results])  # waits for the device
    seconds = time.perf_counter() - start
    before = torch.cat([result.predictions_before for result in results])
    evaluations = torch.cat([result.evaluations for result in results])
    matched, preferred = _preferences(adapter, model, denoiser, task, batches)
    agreement = float((matched == preferred).float().mean())
    bound, _ = task.bind(model, denoiser)
    mean, std = _normalisation(bound, task, device)
    calibration, changed = denoiser.calibration, before != after
    return Suitability(
        images=len(crops),
        sizes=dict(Counter(f"{image.shape[-1]}x{image.shape[-2]}" for image in images).most_common()),
        classes=results[0].outputs.shape[1],
        parameters=sum(weight.numel() for weight in model.parameters()),
        denoiser_parameters=sum(weight.numel() for weight in denoiser.parameters()),
        crop=(crops[0].shape[-2], crops[0].shape[-1]),
        mean=mean,
        std=std,
        calibrated=calibration is not None,
        trust=1.0 if calibration is None else calibration.trust,
        unusual=None if calibration is None else _unusual(calibration, [batch for _, batch in batches]),
        selected=float((evaluations > 0).float().mean()),
        by_matching=float((changed & (after == matched)).float().mean()),
        by_adaptation=float((changed & (after != matched)).float().mean()),
        agreement=agreement,
        error=(max(agreement * (1 - agreement), 0.25 / len(crops)) / len(crops)) ** 0.5,
        evaluations=float(evaluations.float().mean()),
        seconds=seconds / len(crops),
    )


def _unusual(calibration: Calibration, batches: Sequence[Tensor]) -> float:
    distances = torch.cat([calibration.distance(batch) for batch in batches])
    return float((distances > calibration.limit).float().mean())


def _alike(crops: Sequence[Tensor], most: int = 16) -> list[tuple[Tensor, Tensor]]:
    """Returns ids and crops in batches of one size."""
    by_size: dict[tuple[int, ...], list[int]] = {}
    for i, crop in enumerate(crops):
        by_size.setdefault(tuple(crop.shape), []).append(i)
    found = []
    for members in by_size.values():
        for first in range(0, len(members), most):
            part = members[first : first + most]
            found.append((torch.tensor(part, dtype=torch.int64, device=crops[0].device), torch.stack([crops[i] for i in part])))
    return found


def _preferences(
    adapter: Adapter, model: nn.Module, denoiser: Denoiser, task: ClassTask, batches: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Returns the classifier's answers to the matched images, and which of its two likeliest classes the loss prefers, both [N]."""
    own = adapter.config
    config = AdaptConfig(
        method="diffusion_classifier",
        steps=1,
        pairs=PAIRS,
        top_k=2,
        timesteps=own.timesteps,
        timestep_range=own.timestep_range,
        match=own.match,
    )
    compare = Adapter(model, denoiser, config, task)
    answers, preferred = [], []
    bound, _ = task.bind(model, denoiser)
    with as_in_evaluation(bound):
        for ids, batch in batches:
            seen = batch if own.match != "both" or denoiser.calibration is None else denoiser.calibration.match(batch)
            answers.append(bound(task.normalise(bound, seen)).argmax(1))
            preferred.append(compare.adapt(batch, image_ids=ids, cropped=True).predictions)
    return torch.cat(answers), torch.cat(preferred)


def _normalisation(model: nn.Module, task: ClassTask, device: torch.device) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and deviation by channel that the task normalises crops with, as found on blank images."""
    blank = torch.zeros(1, 3, PROBE, PROBE, dtype=torch.float32, device=device)
    try:
        low, high = (task.normalise(model, blank + value)[0, :, PROBE // 2, PROBE // 2].double() for value in (0.0, 1.0))
    except (RuntimeError, ValueError, IndexError):
        return (), ()
    span = high - low
    if not bool((span.abs() > 1e-9).all()):
        return (), ()
    return tuple(round(float(value), 4) for value in -low / span), tuple(round(float(value), 4) for value in 1 / span)
