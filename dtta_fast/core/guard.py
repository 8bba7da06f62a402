"""The guard: keeps an adapted answer only if held-out pairs give it a lower denoising loss than the answer that stands."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dtta_fast.config import AdaptConfig
from dtta_fast.core.loss import pair_losses
from dtta_fast.core.problem import Problem, RowCounts, Schedule
from dtta_fast.kernels import Pairs

GUARD_STEP = 2**31  # offset that keeps the guard's draws apart from those of any step


class Answers(NamedTuple):
    """The answers to B images, before any two of them are compared.

    after: outputs [B, ...] under the adapted weights. standing: the outputs that are accepted if nothing is compared. accepted: [B] bool,
    whether these come from the adapted weights. fresh: [2, B] bool, whether `after` and the original image's answer must be compared with
    the standing one. conditions: [3, B, ...], the conditions of the standing answer, of `after` and of the original image's answer; None if
    they are not known here.
    """

    after: Tensor
    standing: Tensor
    accepted: Tensor
    fresh: Tensor
    conditions: Tensor | None = None


def unchanged(before: Tensor, matched: Tensor) -> Answers:
    """Returns the answers when no step was made: the one to the matched image stands, which is `before` itself without matching."""
    accepted = torch.zeros(len(before), dtype=torch.bool, device=before.device)
    standing = before if matched is before else where(usable(matched, before), matched, before)
    return Answers(matched, standing, accepted, torch.stack([accepted, accepted]))


@torch.no_grad()
def compare(problem: Problem, before: Tensor, after: Tensor, matched: Tensor) -> Answers:
    """Compares the answers given by outputs [B, ...]: to the original images, after adaptation, and to the matched images before it.

    The answer to the matched image stands: on validation images, matching alone does a classifier no harm (docs/log.md). Each distinct
    other answer is compared with it once. Outputs that are not finite are never accepted. Without a guard, the outputs after adaptation are
    accepted wherever they are finite.
    """
    task, standing = problem.task, before if matched is before else where(usable(matched, before), matched, before)
    fine = usable(after, before)
    if not problem.config.guard:
        return Answers(after, where(fine, after, standing), fine, torch.zeros_like(torch.stack([fine, fine])))
    stands, adapted, original = (task.decision(outputs, problem.denoiser) for outputs in (standing, after, before))
    same = fine & _equal(adapted, stands)  # the adapted weights give the same answer
    fresh = fine & ~same, usable(before, before) & ~_equal(original, stands) & ~(fine & _equal(original, adapted))
    return Answers(after, where(same, after, standing), same, torch.stack(fresh), torch.stack([stands, adapted, original]))


def _equal(answer: Tensor, other: Tensor) -> Tensor:
    return (answer == other).flatten(1).all(1)


@torch.no_grad()
def decide(config: AdaptConfig, answers: Answers, before: Tensor, losses: list[Tensor], trust: float = 1.0) -> tuple[Tensor, Tensor]:
    """Returns the accepted outputs [B, ...] and whether each comes from the adapted weights, [B] bool.

    An answer that is `fresh` replaces the standing one if its loss is lower by a paired test: the mean difference, times `trust`, plus
    guard_threshold standard errors is below 0. If both answers pass, the one with the lower sum wins.

    Args:
        answers: compare()'s. before: the outputs for the original images [B, ...]. losses: held_out_losses() [B, guard] under the standing
            answer, under that after adaptation, and under the original image's; empty if nothing was compared. trust: that of the
            denoiser's Calibration, of which at most 1 counts.
    """
    _, standing, accepted, fresh, _ = answers
    if not losses:
        return standing, accepted
    reference = losses[0]
    trust = min(1.0, trust)
    score = torch.zeros(len(standing), dtype=torch.float64, device=standing.device)
    for outputs, wanted, others, adapted in zip((answers.after, before), fresh, losses[1:], (True, False), strict=True):
        change = others - reference
        standard_error = change.std(1) / config.guard**0.5 if config.guard_threshold else torch.zeros_like(score)
        found = (trust * change.mean(1) + config.guard_threshold * standard_error).double()
        better = wanted & (found < score)
        standing, score = where(better, outputs, standing), torch.where(better, found, score)
        accepted = accepted | better if adapted else accepted & ~better
    return standing, accepted


def selected_losses(
    problem: Problem, schedule: Schedule, conditions: Tensor, x0: Tensor, image_ids: Tensor, step: Tensor, wanted: list[list[bool]]
) -> list[Tensor]:
    """Returns held_out_losses() [B, guard] under each of the conditions [A, B, ...]; zero where wanted[answer][image] is false."""
    answers, images = wanted_indices(wanted).to(x0.device, non_blocking=True)
    found = held_out_losses(problem, schedule, conditions[answers, images], x0[images], image_ids[images], step)
    return list(found.new_zeros(*conditions.shape[:2], found.shape[1]).index_put((answers, images), found))


def wanted_indices(wanted: list[list[bool]]) -> Tensor:
    """Returns the answer and the image [2, N] of each wanted loss, on the CPU: image by image, so that an image's run in one forward."""
    chosen = [(answer, image) for image, column in enumerate(zip(*wanted, strict=True)) for answer, ask in enumerate(column) if ask]
    return torch.tensor([list(column) for column in zip(*chosen, strict=True)], dtype=torch.int64, device="cpu")


def usable(outputs: Tensor, before: Tensor) -> Tensor:
    """Returns whether each image's outputs [B, ...] are finite, [B] bool. -inf is allowed where `before` has it too: a masked class."""
    return (outputs.isfinite() | ((outputs == -torch.inf) & (before == -torch.inf))).flatten(1).all(1)


def where(mask: Tensor, chosen: Tensor, otherwise: Tensor) -> Tensor:
    """Takes rows [B, ...] from `chosen` where the mask [B] is true, and from `otherwise` elsewhere."""
    return torch.where(mask.view(-1, *(1,) * (chosen.ndim - 1)), chosen, otherwise)


@torch.no_grad()
def held_out_losses(
    problem: Problem, schedule: Schedule, conditions: Tensor, x0: Tensor, image_ids: Tensor, step: Tensor, pairs: int | None = None
) -> Tensor:
    """Returns losses [B, pairs] of the source denoiser under conditions [B, ...], on pairs that no step draws and that all conditions
    share.

    pairs: number of pairs per image; None is the guard's number.
    """
    pairs, step, l1 = pairs or problem.config.guard, step + GUARD_STEP, problem.config.loss == "l1"
    timesteps = problem.held_out(pairs).timesteps(image_ids, step)
    drawn = Pairs(x0, problem.denoiser.process.table, timesteps, image_ids, problem.config.seed, step)
    if problem.row_counts != "any":
        forwards = forward_rows(len(x0), pairs, schedule.guard_rows, problem.row_counts)
        return pair_losses(problem.denoiser, conditions, drawn, l1, forwards, shared=problem.row_counts == "few")
    images = max(1, schedule.guard_rows // pairs)
    each = []
    for here in (slice(first, first + images) for first in range(0, len(x0), images)):
        parts = drawn.images(here).chunks(schedule.guard_rows)  # more than one if an image's pairs do not fit at once
        each.append(torch.cat([pair_losses(problem.denoiser, conditions[here], part, l1) for part in parts], dim=1))
    return torch.cat(each)


def forward_rows(images: int, pairs: int, most: int, row_counts: RowCounts) -> list[int]:
    """Returns the row counts of the forward passes for `pairs` pairs of each image: at most `most` rows each, and in total at least
    images * pairs.

    row_counts: "one" gives every forward pass `most` rows, for code that is compiled for one shape. "few" gives the last one the rows of
    1, 2, 3, 4, 6, 8, 12 .. images, because a GPU's libraries plan again for every new row count.
    """
    rows, together = images * pairs, most // pairs
    if row_counts == "one" or not together:
        return [most] * -(-rows // most)
    whole, rest = divmod(images, together)
    return [together * pairs] * whole + [min(together, padded_count(rest)) * pairs] * (rest > 0)


def padded_count(count: int) -> int:
    """Returns the least of 1, 2, 3, 4, 6, 8, 12 .. that is at least `count`."""
    power = 1 << (count - 1).bit_length()
    return power * 3 // 4 if count <= power * 3 // 4 and power > 2 else power
