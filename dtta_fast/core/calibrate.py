"""Calibrates a denoiser on clean images without labels: their statistics, which timesteps separate classes, and how surely."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from dtta_fast.core.draws import Draws, cumulative_density
from dtta_fast.core.loss import pair_losses
from dtta_fast.denoisers.base import Denoiser
from dtta_fast.denoisers.calibration import MOST_TRUST, Calibration
from dtta_fast.kernels import Pairs
from dtta_fast.runtime.private import PrivateCopy

GUARD_PAIRS = 24  # pairs of a comparison, as in the preset FAST
BINS = 20  # equal parts of the noise process
PAIRS = 16  # pairs per bin and image
RIVALS = 4  # number of nearest classes that an image's own class is compared with
IMAGES = 64  # using more changes the density less than a different seed does
MOST_ERRORS = 100.0  # bound of a difference in standard errors, which is infinite where a denoiser ignores the condition
LEAST_SPREAD = 1e-30  # what a file of a calibration may hold at least
ROWS = 64  # rows that the denoiser processes at once


def calibrate(denoiser: Denoiser, images: Tensor, answers: Tensor | None = None) -> Calibration:
    """Calibrates a denoiser on at least 8 clean images [N, 3, H, W] in [0, 1], similar to its training images and cropped to what it sees.

    The timesteps are measured on 64 of the images, evenly spaced, because a folder may be sorted by class: an image's own class is the one
    with the lowest loss over all timesteps (the diffusion classifier's answer), and each timestep is rated by how far, and how reliably, a
    set of pairs separates that class from its nearest rivals. A denoiser of maps has no rival classes, so it gets only the statistics, for
    matching.

    Args:
        answers: a classifier's answers to the images, [N] class indices, or their labels. They show how far the loss can be trusted to
            tell classes apart, and the guard then believes it that far (see loss_trust()). Without them it takes the loss at its word,
            which lets a poorly trained denoiser do harm.

    Raises:
        ValueError: Calibration.measure rejects the images, answers are not their class indices, or a text-conditioned denoiser has no
            classes: give denoiser.with_classes([...]).
    """
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        return _calibrated(denoiser, images, answers)


def _calibrated(denoiser: Denoiser, images: Tensor, answers: Tensor | None) -> Calibration:
    found = Calibration.measure(denoiser, images)
    if denoiser.takes_maps:
        if answers is not None:
            raise ValueError("answers is given, and a denoiser of maps has no classes to compare them with; leave it out")
        return found
    classes = len(denoiser.class_embeddings({}))
    if answers is not None and (
        answers.shape != (len(images),)
        or answers.is_floating_point()
        or answers.dtype == torch.bool
        or not bool(((answers >= 0) & (answers < classes)).all())
    ):
        raise ValueError(
            f"answers is {answers.dtype} with shape {tuple(answers.shape)}; give one class index for each of the {len(images)} images, "
            f"from 0 to {classes - 1}: model(inputs).argmax(1)"
        )
    own: Any = PrivateCopy(denoiser).module  # in eval mode, whatever mode the caller's denoiser is in
    count, device = min(IMAGES, len(images)), next(denoiser.parameters()).device
    rows = torch.arange(count, dtype=torch.int64, device="cpu") * len(images) // count
    x0 = own.encode(images[rows.to(images.device)].to(device))
    scores = class_scores(own, x0)
    signal, spread = class_signal(own, x0, scores)
    found = dataclasses.replace(found, signal=tuple(signal.tolist()), spread=tuple(spread.tolist()))
    if answers is None:
        return found
    density = found.density(len(own.process))
    answers = answers[rows.to(answers.device)].to(device, torch.int64)
    trust = loss_trust(own, x0, scores, answers, density) if bool(density.any()) else 0.0
    return dataclasses.replace(found, trust=trust)


@torch.no_grad()
def class_scores(denoiser: Denoiser, x0: Tensor) -> Tensor:
    """Returns the loss [N, K] of latents [N, C, h, w] under each class: one pair per bin, scaled by how much the classes differ there."""
    table, width = denoiser.class_embeddings({}), len(denoiser.process) / BINS
    if len(table) < 2:
        raise ValueError(f"denoiser has {len(table)} class; its timesteps are measured by telling classes apart: give 2 and more")
    middles = ((torch.arange(BINS, dtype=torch.float32, device=x0.device) + 0.5) * width).long().expand(len(x0), BINS)
    found = _losses(denoiser, x0, _ids(x0), middles, table.expand(len(x0), *table.shape), 0)
    # the bins' losses differ by orders of magnitude
    return (found / found.std(1, keepdim=True).mean(0).clamp(min=1e-30)).mean(2)


@torch.no_grad()
def class_signal(denoiser: Denoiser, x0: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and standard deviation [BINS] of the loss under a rival class minus the loss under the image's own class.

    The latents x0 are [N, C, h, w] and the class_scores() [N, K]. Both statistics are taken over images and rivals; each difference is the
    mean of PAIRS pairs. A single pair would hide what many pairs reveal: noise averages out, but the highest timesteps act as a template
    classifier, whose errors do not come from noise and remain.
    """
    table, width = denoiser.class_embeddings({}), len(denoiser.process) / BINS
    starts = torch.arange(BINS, dtype=torch.float32, device=x0.device) * width
    nearest = scores.topk(min(1 + RIVALS, scores.shape[1]), dim=1, largest=False).indices  # [N, M], the image's own class first
    part = (torch.arange(PAIRS, dtype=torch.float32, device=x0.device) + 0.5) / PAIRS * width
    timesteps = (starts[:, None] + part).long().flatten().clamp(max=len(denoiser.process) - 1)
    losses = _losses(denoiser, x0, _ids(x0), timesteps.expand(len(x0), -1), table[nearest], 1)
    margins = (losses[:, 1:] - losses[:, :1]).unflatten(2, (BINS, PAIRS)).mean(3).flatten(0, 1)
    return margins.mean(0), margins.std(0).clamp(min=LEAST_SPREAD)  # 0 where a denoiser ignores its condition


@torch.no_grad()
def loss_trust(denoiser: Denoiser, x0: Tensor, scores: Tensor, answers: Tensor, density: Tensor) -> float:
    """Returns how far a lower loss can be trusted to mean the right class: the slope of a logistic regression, from 0 to MOST_TRUST.

    Each image's answer [N] is compared with its 4 nearest rivals on shared pairs, as the guard compares two answers. z is how much lower
    the answer's loss is, in standard errors, and the odds that the answer is right are exp(slope · z). The rivals are those that the loss
    itself favours, as an adapted answer is.
    """
    table = denoiser.class_embeddings({})
    own = answers[:, None]
    rivals = scores.scatter(1, own, torch.inf).topk(min(RIVALS, scores.shape[1] - 1), dim=1, largest=False).indices
    draws = Draws(0, GUARD_PAIRS, "calibrated", 0, len(density), cumulative_density(density, 0, len(density)).to(x0.device))
    timesteps = draws.timesteps(_ids(x0), torch.tensor(2, dtype=torch.int64, device=x0.device))
    losses = _losses(denoiser, x0, _ids(x0), timesteps, table[torch.cat([own, rivals], dim=1)], 2)
    lower = (losses[:, 1:] - losses[:, :1]).flatten(0, 1)
    z = lower.mean(1) / (lower.std(1) / GUARD_PAIRS**0.5).clamp(min=1e-30)
    return _logistic_slope(z.clamp(-MOST_ERRORS, MOST_ERRORS))


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


def _ids(x0: Tensor) -> Tensor:
    return torch.arange(len(x0), dtype=torch.int64, device=x0.device)


def _losses(denoiser: Denoiser, x0: Tensor, ids: Tensor, timesteps: Tensor, conditions: Tensor, step: int) -> Tensor:
    """Returns losses [N, M, P] under conditions [N, M, ...] as float64; all classes share the same pairs."""
    drawn = Pairs(x0, denoiser.process.table, timesteps, ids, 0, torch.tensor(step, dtype=torch.int64, device=x0.device))
    rows = max(1, ROWS // len(x0))
    of_class = [
        torch.cat([pair_losses(denoiser, conditions[:, k], part, l1=False) for part in drawn.chunks(rows)], dim=1)
        for k in range(conditions.shape[1])
    ]
    return torch.stack(of_class, dim=1).double()
