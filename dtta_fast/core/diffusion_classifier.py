"""Answers without training: the diffusion classifier (Li et al., ICCV 2023, arXiv 2303.16203), alone or with the model as prior."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dtta_fast.core.guard import held_out_losses
from dtta_fast.core.problem import Problem, Schedule

OUT = -1e4  # logit of a class that was not evaluated, relative to the lowest logit of the evaluated classes
CORRUPTED = 0.5  # weight of the evidence on corrupted images, relative to the clean ones of the calibration; chosen on validation images
LEAST_ERROR = 1e-30  # lower bound of a standard error: losses are equal under all classes if a denoiser ignores its condition


class Scores(NamedTuple):
    """What the losses say about each class of each image.

    excess, errors: [B, K] float64, how much higher the mean loss is than that of the class with the lowest, and the standard error of this
    difference over pairs; for a class that was dropped, as of its last stage. evaluated: [B, K] bool, whether a class was evaluated at
    all. evaluations: [B], pairs times classes.
    """

    excess: Tensor
    errors: Tensor
    evaluated: Tensor
    evaluations: Tensor


@torch.no_grad()
def class_scores(problem: Problem, schedule: Schedule, outputs: Tensor, x0: Tensor, image_ids: Tensor) -> Scores:
    """Compares the losses of latents [B, C, h, w] under the classes.

    All classes of an image are evaluated on the same pairs, in config.steps stages of config.pairs each. If config.guard_threshold is
    above 0, each stage ends by dropping the classes whose loss exceeds the lowest by more than that many standard errors of the
    per-pair differences. With config.top_k, only the classes with the highest model `outputs` [B, K] are evaluated.
    """
    config, table = problem.config, problem.denoiser.class_embeddings({})
    images, classes = outputs.shape
    alive = problem.class_task.possible(outputs) & ~outputs.isneginf()  # a model masks a class by -inf
    if config.top_k is not None:
        best = outputs.masked_fill(~alive, -torch.inf).topk(config.top_k, dim=1).indices
        alive = alive & torch.zeros_like(alive).scatter(1, best, True)
    looked_at, evaluations = alive.clone(), torch.zeros_like(image_ids)
    losses = torch.empty(images, classes, 0, dtype=torch.float64, device=x0.device)
    excess = torch.zeros(images, classes, dtype=torch.float64, device=x0.device)
    errors = torch.zeros_like(excess)
    for stage in range(config.steps):
        wanted = alive & (alive.sum(1, keepdim=True) > 1) if stage else alive
        if not wanted.any():
            break
        rows, columns = wanted.nonzero(as_tuple=True)
        at = torch.full((), stage, dtype=torch.int64, device=x0.device)
        found = losses.new_zeros(images, classes, config.pairs)
        for part in torch.arange(len(rows), dtype=torch.int64, device=x0.device).split(max(1, schedule.guard_rows // config.pairs)):
            here = table[columns[part]], x0[rows[part]], image_ids[rows[part]]
            found[rows[part], columns[part]] = held_out_losses(problem, schedule, *here, at, config.pairs).double()
        evaluations += config.pairs * wanted.sum(1)
        going = wanted.any(1)
        losses = torch.cat([losses, found], dim=2)
        means = losses.mean(2).masked_fill(~alive, torch.inf)
        leader = means.argmin(1)
        differences = losses - losses[torch.arange(images, dtype=torch.int64, device=x0.device), leader][:, None]
        excess = torch.where(alive & going[:, None], differences.mean(2), excess)
        if losses.shape[2] > 1:
            errors = torch.where(alive & going[:, None], differences.std(2) / losses.shape[2] ** 0.5, errors)
        if config.guard_threshold and losses.shape[2] > 1:
            alive = alive & ~(going[:, None] & (excess > config.guard_threshold * errors) & (means > means.amin(1, keepdim=True)))
    return Scores(excess, errors, looked_at, evaluations)


def class_logits(scores: Scores, x0: Tensor) -> Tensor:
    """Returns the diffusion classifier's logits [B, K] for latents [B, C, h, w].

    A logit is the negative squared error summed over the latent's elements, as in the paper's posterior; a dropped class keeps its last
    distance to the lowest loss.
    """
    excess, evaluated = scores.excess, scores.evaluated
    logits = -(excess - excess.masked_fill(~evaluated, torch.inf).amin(1, keepdim=True)) * x0[0].numel()
    lowest = logits.masked_fill(~evaluated, torch.inf).amin(1, keepdim=True)
    return torch.where(evaluated, logits, lowest + OUT)


def posterior_logits(scores: Scores, outputs: Tensor, trust: float) -> Tensor:
    """Returns logits [B, K] that combine the model's `outputs` [B, K], as prior, with the evidence of the losses.

    A class's log probability is lowered by half of trust times the standard errors by which its loss exceeds the lowest one. Trust is the
    slope of the log odds on clean images (see Calibration.trust), and corrupted ones tell less (docs/log.md). A class that was not
    evaluated is lowered as much as the worst one that was.
    """
    z = scores.excess / scores.errors.clamp(min=LEAST_ERROR)
    z = torch.where(scores.evaluated, z, z.masked_fill(~scores.evaluated, 0.0).amax(1, keepdim=True))
    return (outputs.double().log_softmax(1) - CORRUPTED * trust * z).to(torch.promote_types(outputs.dtype, torch.float32))
