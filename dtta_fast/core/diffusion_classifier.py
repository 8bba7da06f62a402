"""The diffusion classifier: predicts the class with the lowest denoising loss (Li et al., ICCV 2023, arXiv 2303.16203)."""

from __future__ import annotations

import torch
from torch import Tensor

from dtta_fast.core.guard import held_out_losses
from dtta_fast.core.problem import Problem, Schedule

OUT = -1e4  # logit of a class that was not evaluated, relative to the lowest logit of the evaluated classes


@torch.no_grad()
def classify(problem: Problem, schedule: Schedule, outputs: Tensor, x0: Tensor, image_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Computes logits [B, K] and evaluations [B] for latents [B, C, h, w].

    All classes of an image are evaluated on the same pairs, in config.steps stages of config.pairs each. If config.guard_threshold is
    above 0, each stage ends by dropping the classes whose loss exceeds the lowest by more than that many standard errors of the
    per-pair differences. With config.top_k, only the classes with the highest model `outputs` [B, K] are evaluated.

    A logit is the negative squared error summed over the latent's elements, as in the paper's posterior; a dropped class keeps its last
    distance to the lowest loss.
    """
    config, table = problem.config, problem.denoiser.class_embeddings({})
    images, classes = outputs.shape
    alive = problem.class_task.possible(outputs)
    if config.top_k is not None:
        best = outputs.masked_fill(~alive, -torch.inf).topk(config.top_k, dim=1).indices
        alive = torch.zeros_like(alive).scatter(1, best, True)
    looked_at, evaluations = alive.clone(), torch.zeros_like(image_ids)
    losses = torch.empty(images, classes, 0, dtype=torch.float64, device=x0.device)
    excess = torch.zeros(images, classes, dtype=torch.float64, device=x0.device)  # mean loss above the lowest class, on shared pairs
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
        if config.guard_threshold:
            error = differences.std(2) / losses.shape[2] ** 0.5
            alive = alive & ~(going[:, None] & (excess > config.guard_threshold * error) & (means > means.amin(1, keepdim=True)))
    logits = -(excess - excess.masked_fill(~looked_at, torch.inf).amin(1, keepdim=True)) * x0[0].numel()
    lowest = logits.masked_fill(~looked_at, torch.inf).amin(1, keepdim=True)
    return torch.where(looked_at, logits, lowest + OUT).to(torch.promote_types(outputs.dtype, torch.float32)), evaluations


def mean_probability(first: Tensor, second: Tensor) -> Tensor:
    """Logits [B, K] of the averaged probabilities of two classifiers."""
    return torch.logaddexp(first.log_softmax(1), second.log_softmax(1))
