"""The adaptation step: updates a state of tensors in place, and never writes to a module."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from dtta_fast.config import AdaptConfig
from dtta_fast.denoisers.base import Denoiser
from dtta_fast.draws import Draws
from dtta_fast.objectives import Pairs, accumulated_gradients, embedding_mix, noise_mix, noise_mix_null, pair_losses
from dtta_fast.optimizers import Slots, Tensors, init_slots, update_
from dtta_fast.parameters import Parameters, call, copies, in_dtypes_of
from dtta_fast.runtime.compiling import leaf
from dtta_fast.runtime.phases import phase
from dtta_fast.runtime.reads import read_one
from dtta_fast.tasks.base import Task

FREE_LOGITS = "<logits>"  # cannot be a parameter's name
GUARD_STEP = 2**31  # offset that keeps the guard's draws apart from those of any step
RowCounts = Literal["any", "few", "one"]


@dataclass(frozen=True)
class Problem:
    """Everything that stays constant from step to step. The modules are private copies.

    lr, denoiser_lr: 0-dim, on the modules' device, in the dtype that optimizers.rate() gives. chunk: pairs of an image that run at once.
    together: number of images whose gradients are computed at once, if all share one set of weights; None is all of them.
    guard_rows: maximum rows of a guard's forward pass. row_counts: which row counts it may have, see guard_forwards(). loop: whether
    images with separate weights run one by one. forward: the compiled version of forward(), if there is one. cumulative: the timesteps'
    cumulative density, if they are calibrated.
    """

    model: nn.Module
    denoiser: Denoiser
    task: Task
    config: AdaptConfig
    lr: Tensor
    denoiser_lr: Tensor
    chunk: int = 1
    together: int | None = None
    guard_rows: int = 1
    row_counts: RowCounts = "any"
    loop: bool = False
    forward: Callable[..., Tensor] | None = None
    cumulative: Tensor | None = None

    @property
    def per_image(self) -> bool:
        return self.config.mode == "episodic"

    def draws(self, pairs: int) -> Draws:
        """Returns the draws for a step."""
        config = self.config
        return dataclasses.replace(
            self.held_out(pairs), antithetic=config.antithetic, share_noise=config.share_noise, common=config.common_draws
        )

    def held_out(self, pairs: int) -> Draws:
        """Returns the draws for the guard or the diffusion classifier, with independent pairs."""
        low, high = self.config.timestep_range or (0, len(self.denoiser.process))
        return Draws(self.config.seed, pairs, self.config.timesteps, low, high, self.cumulative)

    def forwards(self) -> int:
        """Returns the number of denoiser forward passes for one pair of a step."""
        config = self.config
        if config.objective == "embedding_mix":
            return 1
        classes = self.task.class_count(self.denoiser) if config.top_k is None else config.top_k + config.drawn_classes
        return classes + config.null_condition


class State(NamedTuple):
    """Adapted weights with their optimizer state; in episodic mode their tensors have a leading image dimension."""

    theta: Parameters
    phi: Parameters
    theta_slots: Slots
    phi_slots: Slots
    step: Tensor


def initial_state(problem: Problem, theta: Parameters, phi: Parameters, outputs: Tensor) -> State:
    """Returns copies of the source weights (one set, or one per image) with empty optimizer state at step 0.

    Free logits start from the source model's `outputs` [B, ...].
    """
    images = len(outputs) if problem.per_image else None
    kind = problem.config.optimizer
    theta, phi = copies(theta, images, batched=kind != "adam8bit"), copies(phi, images)  # adam8bit's blocks follow the weights' own order
    if problem.config.parameters == "logits":
        theta = {FREE_LOGITS: outputs.detach().to(torch.promote_types(outputs.dtype, torch.float32), copy=True)}
    theta_slots, phi_slots = (init_slots(kind, list(moving.values()), images or 1) for moving in (theta, phi))
    return State(theta, phi, theta_slots, phi_slots, torch.zeros((), dtype=torch.int64, device=outputs.device))


def first_images(state: State, images: int, exactly: bool) -> State | None:
    """Returns the storage of a state's first `images` images; None if it has fewer or, with `exactly`, a different number."""
    held = min((len(p) for p in (*state.theta.values(), *state.phi.values())), default=0)
    if held < images or (exactly and held != images):
        return None
    theta, phi = ({name: p[:images] for name, p in moving.items()} for moving in (state.theta, state.phi))
    if held == images:
        return State(theta, phi, state.theta_slots, state.phi_slots, state.step)
    slots = ([[slot[:images] for slot in tensors] for tensors in kind] for kind in (state.theta_slots, state.phi_slots))
    return State(theta, phi, next(slots), next(slots), state.step)


@torch.no_grad()
def restore_(state: State, theta: Parameters, phi: Parameters, outputs: Tensor) -> None:
    """Resets `state` in place to what initial_state returns."""
    for moving, source, slots in ((state.theta, theta, state.theta_slots), (state.phi, phi, state.phi_slots)):
        sources = [outputs] if FREE_LOGITS in moving else list(source.values())
        if moving:
            targets = list(moving.values())
            torch._foreach_copy_(targets, [own.expand_as(target) for own, target in zip(sources, targets, strict=True)])
            for tensors in slots:
                torch._foreach_zero_(tensors)
    state.step.zero_()


def forward(problem: Problem, theta: Parameters, inputs: Tensor) -> Tensor:
    """Returns the model's outputs [B, ...] under the weights `theta` for inputs [B, 3, H, W]."""
    if FREE_LOGITS in theta:
        return theta[FREE_LOGITS].clone()  # the step updates its state in place
    weights, inputs = in_dtypes_of(problem.model, theta), inputs.clone()  # some models write to their input
    if problem.per_image and theta:
        return call(problem.model, weights, inputs[:, None], per_image=True, loop=problem.loop)[:, 0]
    return call(problem.model, weights, inputs, per_image=False)


def gradients(
    problem: Problem,
    state: State,
    inputs: Tensor,
    x0: Tensor,
    image_ids: Tensor,
    timesteps: Tensor | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensors, Tensors]:
    """Returns the loss [B] and its gradients with respect to theta and phi; the state is only read.

    The model runs forward and backward once, regardless of the number of chunks: the chunks accumulate the gradient with respect to the
    condition, and one vector-Jacobian product propagates it to the weights.
    """
    config, task, denoiser = problem.config, problem.task, problem.denoiser
    draws = problem.draws(config.pairs if timesteps is None else timesteps.shape[1])
    with phase("noising"):
        timesteps = draws.timesteps(image_ids, state.step) if timesteps is None else timesteps
        noise = draws.noise(x0, image_ids, state.step) if noise is None else noise
    with phase("classifier"):
        theta = {name: leaf(p) for name, p in state.theta.items()}
        phi = {name: leaf(p) for name, p in state.phi.items()}
        outputs = (problem.forward or forward)(problem, theta, inputs)
        chosen = task.choose(outputs, config, image_ids, state.step)
        if config.objective == "embedding_mix":
            predict, heads = embedding_mix, [task.condition(outputs, denoiser, phi, config, chosen)]
        else:
            predict = noise_mix_null if config.null_condition else noise_mix
            heads = list(task.class_conditions(outputs, denoiser, phi, config, chosen))
    if not any(head.requires_grad for head in heads):
        raise ValueError(
            f"model is a {type(problem.model).__name__} whose outputs carry no gradient to its {config.parameters!r} parameters; "
            "take torch.no_grad(), detach() or argmax out of its forward, or choose other parameters"
        )
    drawn = Pairs(x0, timesteps, image_ids, config.seed, draws.step(state.step), noise)
    loss, to_heads, to_phi, scale = accumulated_gradients(
        predict, denoiser, phi, heads, drawn, problem.chunk, config.loss == "l1", problem.per_image
    )
    with phase("classifier"):
        moving, through_heads = [*theta.values(), *phi.values()], [head for head in heads if head.requires_grad]
        upstream = [gradient.to(head.dtype) for gradient, head in zip(to_heads, through_heads, strict=True)]
        through = torch.autograd.grad(through_heads, moving, upstream, allow_unused=True)
        if theta and FREE_LOGITS not in theta and all(g is None for g in through[: len(theta)]):
            raise ValueError(
                f"no gradient reaches the {config.parameters!r} parameters of the model, a {type(problem.model).__name__}; its forward "
                "may go through another module than itself: let it use its own layers, or choose other parameters"
            )
        to_theta = [torch.zeros_like(p) if g is None else g for p, g in zip(theta.values(), through, strict=False)]
        # gradients reach the label table through the condition, everything else through the prediction
        to_phi = [g if more is None else g + more for g, more in zip(to_phi, through[len(theta) :], strict=True)]
    return loss, unscaled(to_theta, scale), unscaled(to_phi, scale)


def _gradients_in_parts(problem: Problem, state: State, *batch: Tensor | None) -> tuple[Tensor, Tensors, Tensors]:
    """Computes gradients() for a few images at a time if memory is short; shared weights get the mean over all images."""
    assert batch[0] is not None
    images = len(batch[0])
    together = images if problem.per_image else problem.together or images
    if images <= together:
        return gradients(problem, state, *batch)  # type: ignore[arg-type]
    losses, sums = [], [torch.zeros_like(p) for p in (*state.theta.values(), *state.phi.values())]
    for first in range(0, images, together):
        part = [None if tensor is None else tensor[first : first + together] for tensor in batch]
        loss, to_theta, to_phi = gradients(problem, state, *part)  # type: ignore[arg-type]
        torch._foreach_add_(sums, [*to_theta, *to_phi], alpha=len(loss) / images)
        losses.append(loss)
    return torch.cat(losses), sums[: len(state.theta)], sums[len(state.theta) :]


def unscaled(gradients: Tensors, scale: float) -> Tensors:
    return gradients if scale == 1 or not gradients else list(torch._foreach_div(gradients, scale))


def update(problem: Problem, state: State, to_theta: Tensors, to_phi: Tensors) -> None:
    """Applies the optimizers' update to the state, in place."""
    _update_(problem.config, state.theta, to_theta, state.theta_slots, state.step, problem.lr)
    _update_(problem.config, state.phi, to_phi, state.phi_slots, state.step, problem.denoiser_lr)
    state.step.add_(1)


def adaptation_step(
    problem: Problem,
    state: State,
    inputs: Tensor,
    x0: Tensor,
    image_ids: Tensor,
    timesteps: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Updates the state in place; returns the loss [B] before the update. This is the unit that compile="step" compiles."""
    loss, to_theta, to_phi = _gradients_in_parts(problem, state, inputs, x0, image_ids, timesteps, noise)
    with phase("optimizer"):
        update(problem, state, to_theta, to_phi)
    return loss


def _update_(config: AdaptConfig, moving: Parameters, gradients: Tensors, slots: Slots, step: Tensor, lr: Tensor) -> None:
    if not moving:
        return
    update_(config.optimizer, list(moving.values()), gradients, slots, step, lr, config.momentum, config.weight_decay)


@torch.no_grad()
def guard(
    problem: Problem,
    before: Tensor,
    candidates: list[Tensor],
    x0: Tensor,
    image_ids: Tensor,
    step: Tensor,
    read: Callable[[Tensor], list[list[bool]]] = read_one,
    in_time: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the accepted outputs [B, ...]; whether each comes from a candidate, [B] bool; and denoiser evaluations used, [B].

    If an image's answer changed, each of its distinct answers conditions the source denoiser on the same pairs, held out from the
    adaptation. The original answer is kept unless a candidate's loss is lower by a paired test: its mean difference plus guard_threshold
    standard errors is below 0; among several such candidates the one with the lowest sum wins. Among equal answers the earlier candidate
    wins. Non-finite outputs are never accepted. Without a guard the first candidate is accepted. If there is no time to compare (in_time
    is False), no changed answer is accepted.

    read: copies a mask [1 + candidates, B] of the answers to compare to the host; this is the guard's only wait.
    """
    config, evaluations = problem.config, torch.zeros_like(image_ids)
    standing, accepted, fresh, decisions = compared(problem, before, candidates)
    if not config.guard or not in_time:
        return standing, accepted, evaluations
    wanted = torch.stack([torch.stack(fresh).any(0), *fresh])
    # image by image, so that those of an image run in one forward
    asked = [(answer, image) for image, column in enumerate(zip(*read(wanted), strict=True)) for answer, ask in enumerate(column) if ask]
    if not asked:
        return standing, accepted, evaluations
    losses = _answers_losses(problem, torch.stack(decisions), asked, x0, image_ids, step)
    standing, accepted = decided(config, standing, accepted, candidates, fresh, losses[0], list(losses[1:]))
    return standing, accepted, evaluations + config.guard * wanted.sum(0)


def _answers_losses(
    problem: Problem, decisions: Tensor, asked: list[tuple[int, int]], x0: Tensor, image_ids: Tensor, step: Tensor
) -> Tensor:
    """Computes held_out_losses [answers, B, guard] under those decisions [answers, B, ...] whose (answer, image) is in `asked`; the
    others are zero."""
    columns = (torch.tensor(column, dtype=torch.int64, device="cpu") for column in zip(*asked, strict=True))
    answers, images = (column.to(x0.device, non_blocking=True) for column in columns)
    found = held_out_losses(problem, decisions[answers, images], x0[images], image_ids[images], step)
    return found.new_zeros(*decisions.shape[:2], found.shape[1]).index_put((answers, images), found)


@torch.no_grad()
def compared(problem: Problem, before: Tensor, candidates: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Returns the outputs [B, ...] accepted before any loss is known; whether each comes from a candidate, [B] bool; for each candidate,
    whether its answer has to be compared with the original one, [B] bool; and, if there is a guard, the conditions [B, ...] of all
    answers, the original one first."""
    task = problem.task
    finite = [usable(outputs, before) for outputs in candidates]
    if not problem.config.guard:
        return where(finite[0], candidates[0], before), finite[0], [torch.zeros_like(fine) for fine in finite], []
    source = task.decision(before, problem.denoiser)
    answers = [task.decision(outputs, problem.denoiser) for outputs in candidates]
    # each distinct answer is compared once: only if it differs from the original one and from earlier candidates
    fresh = []
    for k, (answer, fine) in enumerate(zip(answers, finite, strict=True)):
        asked_already = (answer == source).flatten(1).all(1)
        for other, other_fine in zip(answers[:k], finite[:k], strict=True):
            asked_already = asked_already | (other_fine & (answer == other).flatten(1).all(1))
        fresh.append(fine & ~asked_already)
    same = finite[0] & (answers[0] == source).flatten(1).all(1)  # the adapted weights give the same answer
    return where(same, candidates[0], before), same, fresh, [source, *answers]


def usable(outputs: Tensor, before: Tensor) -> Tensor:
    """Returns whether each image's outputs [B, ...] are finite, [B] bool. -inf is allowed where `before` has it too: a masked class."""
    return (outputs.isfinite() | ((outputs == -torch.inf) & (before == -torch.inf))).flatten(1).all(1)


def decided(
    config: AdaptConfig,
    standing: Tensor,
    accepted: Tensor,
    candidates: list[Tensor],
    fresh: list[Tensor],
    losses: Tensor,
    changed: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """Updates compared()'s result with the losses [B, guard] under the original answers and under each candidate's answers."""
    score = torch.zeros(len(losses), dtype=torch.float64, device=losses.device)
    for outputs, wanted, others in zip(candidates, fresh, changed, strict=True):
        change = others - losses
        standard_error = change.std(1) / config.guard**0.5 if config.guard_threshold else torch.zeros_like(score)
        found = (change.mean(1) + config.guard_threshold * standard_error).double()
        better = wanted & (found < score)
        standing, score, accepted = where(better, outputs, standing), torch.where(better, found, score), accepted | better
    return standing, accepted


def where(mask: Tensor, chosen: Tensor, otherwise: Tensor) -> Tensor:
    """Takes rows [B, ...] from `chosen` where the mask [B] is true, and from `otherwise` elsewhere."""
    return torch.where(mask.view(-1, *(1,) * (chosen.ndim - 1)), chosen, otherwise)


@torch.no_grad()
def held_out_losses(problem: Problem, conditions: Tensor, x0: Tensor, image_ids: Tensor, step: Tensor, pairs: int | None = None) -> Tensor:
    """Returns losses [B, pairs] of the source denoiser under conditions [B, ...], on pairs that no step draws and that all conditions
    share.

    pairs: number of pairs per image; None is the guard's number.
    """
    pairs, step, l1 = pairs or problem.config.guard, step + GUARD_STEP, problem.config.loss == "l1"
    drawn = Pairs(x0, problem.held_out(pairs).timesteps(image_ids, step), image_ids, problem.config.seed, step)
    if problem.row_counts != "any":
        forwards = guard_forwards(len(x0), pairs, problem.guard_rows, problem.row_counts)
        return pair_losses(problem.denoiser, conditions, drawn, l1, forwards, shared=problem.row_counts == "few")
    images = max(1, problem.guard_rows // pairs)
    each = []
    for here in (slice(first, first + images) for first in range(0, len(x0), images)):
        parts = drawn.images(here).chunks(problem.guard_rows)  # more than one if an image's pairs do not fit at once
        each.append(torch.cat([pair_losses(problem.denoiser, conditions[here], part, l1) for part in parts], dim=1))
    return torch.cat(each)


def guard_forwards(images: int, pairs: int, most: int, row_counts: RowCounts) -> list[int]:
    """Returns the row counts of the forward passes for `pairs` pairs of each image: at most `most` rows each, and in total at least
    images * pairs.

    row_counts: "one" gives every forward pass `most` rows, for code that is compiled for one shape. "few" gives the last one the rows of
    1, 2, 3, 4, 6, 8, 12 .. images, because a GPU's libraries plan again for every new row count.
    """
    rows, together = images * pairs, most // pairs
    if row_counts == "one" or not together:
        return [most] * -(-rows // most)
    whole, rest = divmod(images, together)
    sizes = [together * pairs] * whole
    if rest:
        power = 1 << (rest - 1).bit_length()
        sizes.append(min(together, power * 3 // 4 if rest <= power * 3 // 4 and power > 2 else power) * pairs)
    return sizes
