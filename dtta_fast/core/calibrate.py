"""Calibrates a denoiser on clean images without labels: their statistics, which timesteps separate classes, and how surely."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dtta_fast.core.differences import GUARD_PAIRS, Differences
from dtta_fast.core.draws import Draws, cumulative_density
from dtta_fast.denoisers.base import Denoiser
from dtta_fast.denoisers.calibration import MOST_TRUST, Calibration
from dtta_fast.runtime.private import PrivateCopy
from dtta_fast.runtime.progress import progress_bar

IMAGES = 32  # that measure the timesteps: two classes on 2 pairs in each of 20 bins, 2,560 evaluations
TRUST_IMAGES = 20  # of these, that measure the trust: five classes on 24 pairs, 2,400 evaluations
SPREAD_PAIRS = 16  # the spread of a signal is that of a mean of so many pairs: noise averages out, and other errors remain
MOST_ERRORS = 100.0  # bound of a difference in standard errors, which is infinite where a denoiser ignores the condition
LEAST_SPREAD = 1e-30  # what a file of a calibration may hold at least
SMOOTHING = (0.25, 0.5, 0.25)  # of the ratio of signal to spread over neighbouring bins


def calibrate(
    denoiser: Denoiser,
    images: Tensor,
    answers: Tensor | None = None,
    *,
    progress: bool = False,
    partial: str | Path | None = None,
) -> Calibration:
    """Calibrates a denoiser on at least 8 clean images [N, 3, H, W] in [0, 1], similar to its training images and cropped to what it sees.

    32 of the images take part, evenly spaced, because a folder may be sorted by class. Along the whole noise process, an image's own class
    is compared with its nearest rival. With a classifier's outputs as `answers`, this takes 4,960 evaluations of the denoiser at most,
    however many classes there are. Otherwise the classes have to be searched: 20 more evaluations for each image and class. A denoiser of
    maps has no rival classes, so it gets only the statistics, for matching.

    Args:
        answers: a classifier's outputs for the images, [N, K] logits or probabilities; or class indices [N], its answers or the labels,
            whose rivals are then searched by the loss. Answers show how far the loss can be trusted to tell classes apart, and the guard
            then believes it that far. Without them it takes the loss at its word, which lets a poorly trained denoiser do harm.
        progress: whether to show a progress bar, on a terminal or in a notebook.
        partial: file that keeps what has been measured, so that an interrupted call goes on when it is repeated. Remove it afterwards.

    Raises:
        ValueError: Calibration.measure rejects the images, answers do not fit them, a text-conditioned denoiser has no classes (give
            denoiser.with_classes([...])), or partial is not such a file.
    """
    kinds = {images.device.type, next(denoiser.parameters()).device.type}
    with torch.no_grad(), ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        return _calibrated(denoiser, images, answers, progress, partial)


def _calibrated(denoiser: Denoiser, images: Tensor, answers: Tensor | None, progress: bool, partial: str | Path | None) -> Calibration:
    found = Calibration.measure(denoiser, images)
    if denoiser.takes_maps:
        if answers is not None:
            raise ValueError("outputs is given, and a denoiser of maps has no classes to compare them with; leave it out")
        return found
    classes = len(denoiser.class_embeddings({}))
    if classes < 2:
        raise ValueError(f"denoiser has {classes} class; its timesteps are measured by telling classes apart: give 2 or more")
    if answers is not None:
        _check_answers(answers, len(images), classes)
    own: Any = PrivateCopy(denoiser).module  # in eval mode, whatever mode the caller's denoiser is in
    count, device = min(IMAGES, len(images)), next(denoiser.parameters()).device
    rows = _evenly(count, len(images))
    images = images[rows.to(images.device)].to(device)
    answers = None if answers is None else answers[rows.to(answers.device)].to(device)
    trusted = 0 if answers is None else min(TRUST_IMAGES, count)
    place = None if partial is None else Path(partial)
    measured = Differences(own, found.fingerprint, images, answers, place)
    with progress_bar(progress, measured.evaluations(trusted), "calibrating") as measured.advance:
        near = measured.classes()
        signal, spread = class_signal(measured.along_the_process(near))
        found = dataclasses.replace(found, signal=tuple(signal.tolist()), spread=tuple(spread.tolist()))
        if answers is None:
            return found
        density, part = found.density(len(own.process)), _evenly(trusted, count).to(device)
        if not bool(density.any()):
            return dataclasses.replace(found, trust=0.0)
        cumulative = cumulative_density(density, 0, len(density)).to(device)
        draws = Draws(0, GUARD_PAIRS, "calibrated", 0, len(density), cumulative)
        return dataclasses.replace(found, trust=loss_trust(measured.as_the_guard(near, part, draws)))


def _evenly(count: int, total: int) -> Tensor:
    return torch.arange(count, dtype=torch.int64, device="cpu") * total // count


def _check_answers(answers: Tensor, count: int, classes: int) -> None:
    """Raises ValueError if answers are neither outputs [N, K] nor class indices [N] of these images."""
    if answers.is_floating_point():
        fits = answers.shape == (count, classes) and bool(answers.isfinite().all())
    else:
        whole = answers.dtype != torch.bool and answers.shape == (count,)
        fits = whole and bool(((answers >= 0) & (answers < classes)).all())
    if not fits:
        raise ValueError(
            f"outputs is {answers.dtype} with shape {tuple(answers.shape)}; give the classifier's outputs for the {count} images, finite "
            f"and [{count}, {classes}], or one class index for each of the {count} images, from 0 to {classes - 1}"
        )


def class_signal(margins: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and standard deviation [BINS] of how much higher the loss is under a rival class, from margins [N, BINS, PAIRS].

    The deviation is over images, for a mean of SPREAD_PAIRS pairs: the variance between images plus the variance within an image over that
    number. A single pair would hide what many pairs reveal: noise averages out, but the highest timesteps act as a template classifier,
    whose errors do not come from noise and remain. The mean is such that its ratio to the deviation is smoothed over neighbouring bins.
    """
    means, within = margins.mean(2), margins.var(2).mean(0)
    between = (means.var(0) - within / margins.shape[2]).clamp(min=0)
    spread = (between + within / SPREAD_PAIRS).sqrt().clamp(min=LEAST_SPREAD)  # 0 where a denoiser ignores its condition
    ratio = F.pad((means.mean(0) / spread)[None], (1, 1), mode="replicate")[0]
    kernel = torch.tensor(SMOOTHING, dtype=ratio.dtype, device=ratio.device)
    return ratio.unfold(0, len(SMOOTHING), 1) @ kernel * spread, spread


def loss_trust(margins: Tensor) -> float:
    """Returns how far a lower loss can be trusted to mean the right class: the slope of a logistic regression, from 0 to MOST_TRUST.

    z is how much lower the loss is under an image's answer than under a rival, in standard errors, as the guard measures it. The odds that
    the answer is right are exp(slope · z).

    Args:
        margins: [N, rivals, GUARD_PAIRS], the loss under a rival minus that under the answer.
    """
    z = margins.mean(2) / (margins.std(2) / margins.shape[2] ** 0.5).clamp(min=1e-30)
    return _logistic_slope(z.flatten().clamp(-MOST_ERRORS, MOST_ERRORS))


def _logistic_slope(z: Tensor) -> float:
    """Returns the slope under which the products of the odds exp(slope · z) are likeliest, by bisection of the derivative."""
    low, high = 0.0, MOST_TRUST
    for _ in range(30):
        middle = (low + high) / 2
        if float((z * torch.sigmoid(-middle * z)).sum()) > 0:  # the likelihood still rises
            low = middle
        else:
            high = middle
    return high if high == MOST_TRUST else low
