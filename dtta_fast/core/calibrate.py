"""Calibrates a denoiser on clean images without labels: their statistics, and which timesteps separate classes."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from dtta_fast.core.loss import pair_losses
from dtta_fast.denoisers.base import Denoiser
from dtta_fast.denoisers.calibration import Calibration
from dtta_fast.kernels import Pairs
from dtta_fast.runtime.private import PrivateCopy

BINS = 20  # equal parts of the noise process
PAIRS = 16  # pairs per bin and image
RIVALS = 4  # number of nearest classes that an image's own class is compared with
IMAGES = 64  # using more changes the density less than a different seed does
ROWS = 64  # rows that the denoiser processes at once


@torch.no_grad()
def calibrate(denoiser: Denoiser, images: Tensor) -> Calibration:
    """Calibrates a denoiser on at least 8 clean images [N, 3, H, W] in [0, 1], similar to its training images and cropped to what it sees.

    The timesteps are measured on the first 64 images: an image's own class is the one with the lowest loss over all timesteps (the
    diffusion classifier's answer), and each timestep is rated by how far, and how reliably, a set of pairs separates that class from its
    nearest rivals. A denoiser of maps has no rival classes, so it gets only the statistics, for matching.

    Raises:
        ValueError: Calibration.measure rejects the images, or a text-conditioned denoiser has no classes: give
            denoiser.with_classes([...]).
    """
    found = Calibration.measure(denoiser, images)
    if denoiser.takes_maps:
        return found
    own: Any = PrivateCopy(denoiser).module  # in eval mode, whatever mode the caller's denoiser is in
    signal, spread = class_signal(own, own.encode(images[:IMAGES].to(next(denoiser.parameters()).device)))
    return dataclasses.replace(found, signal=tuple(signal.tolist()), spread=tuple(spread.tolist()))


@torch.no_grad()
def class_signal(denoiser: Denoiser, x0: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and standard deviation [BINS] of the loss under a rival class minus the loss under the image's own class.

    The latents x0 are [N, C, h, w]. Both statistics are taken over images and rivals; each difference is the mean of PAIRS pairs. A
    single pair would hide what many pairs reveal: noise averages out, but the highest timesteps act as a template classifier, whose
    errors do not come from noise and remain.
    """
    table, width = denoiser.class_embeddings({}), len(denoiser.process) / BINS
    if len(table) < 2:
        raise ValueError(f"denoiser has {len(table)} class; its timesteps are measured by telling classes apart: give 2 and more")
    ids = torch.arange(len(x0), dtype=torch.int64, device=x0.device)
    starts = torch.arange(BINS, dtype=torch.float32, device=x0.device) * width
    first = _losses(denoiser, x0, ids, (starts + width / 2).long().expand(len(x0), BINS), table.expand(len(x0), *table.shape), 0)
    # the bins' losses differ by orders of magnitude, so each is scaled by how much the classes differ in it
    scores = (first / first.std(1, keepdim=True).mean(0).clamp(min=1e-30)).mean(2)
    nearest = scores.topk(min(1 + RIVALS, scores.shape[1]), dim=1, largest=False).indices  # [N, M], the image's own class first
    part = (torch.arange(PAIRS, dtype=torch.float32, device=x0.device) + 0.5) / PAIRS * width
    timesteps = (starts[:, None] + part).long().flatten().clamp(max=len(denoiser.process) - 1)
    losses = _losses(denoiser, x0, ids, timesteps.expand(len(x0), -1), table[nearest], 1)
    margins = (losses[:, 1:] - losses[:, :1]).unflatten(2, (BINS, PAIRS)).mean(3).flatten(0, 1)
    return margins.mean(0), margins.std(0)


def _losses(denoiser: Denoiser, x0: Tensor, ids: Tensor, timesteps: Tensor, conditions: Tensor, step: int) -> Tensor:
    """Returns losses [N, M, P] under conditions [N, M, ...] as float64; all classes share the same pairs."""
    drawn = Pairs(x0, denoiser.process.table, timesteps, ids, 0, torch.tensor(step, dtype=torch.int64, device=x0.device))
    rows = max(1, ROWS // len(x0))
    of_class = [
        torch.cat([pair_losses(denoiser, conditions[:, k], part, l1=False) for part in drawn.chunks(rows)], dim=1)
        for k in range(conditions.shape[1])
    ]
    return torch.stack(of_class, dim=1).double()
