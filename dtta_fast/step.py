"""The adaptation step: tensors in, tensors out; nothing here writes to a module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dtta_fast.config import AdaptConfig
from dtta_fast.denoisers.base import Denoiser
from dtta_fast.draws import Draws
from dtta_fast.objectives import Pairs, embedding_mix, pair_losses
from dtta_fast.optimizers import Slots, Tensors, init_slots, update_
from dtta_fast.parameters import Parameters, call, copies
from dtta_fast.tasks.base import Task

FREE_LOGITS = "logits"
GUARD_STEP = 2**31  # the guard's draws lie beyond every step's


@dataclass(frozen=True)
class Problem:
    """What stays the same from step to step."""

    model: nn.Module
    denoiser: Denoiser
    task: Task
    config: AdaptConfig

    @property
    def per_image(self) -> bool:
        return self.config.mode == "episodic"

    def draws(self, pairs: int) -> Draws:
        low, high = self.config.timestep_range or (0, len(self.denoiser.process))
        return Draws(self.config.seed, pairs, self.config.timesteps, low, high)


class State(NamedTuple):
    """Adapted weights with their optimizer memory; in episodic mode every tensor has a leading image dimension."""

    theta: Parameters
    phi: Parameters
    theta_slots: Slots
    phi_slots: Slots
    step: Tensor


def initial_state(problem: Problem, theta: Parameters, phi: Parameters, outputs: Tensor) -> State:
    """Copies of the source weights (one set, or one an image), empty optimizer memory, step 0.

    `outputs` [B, ...] of the source are where free logits start.
    """
    images = len(outputs) if problem.per_image else None
    theta, phi = copies(theta, images), copies(phi, images)
    if problem.config.parameters == "logits":
        theta = {FREE_LOGITS: outputs.detach().clone()}
    kind = problem.config.optimizer
    theta_slots, phi_slots = (init_slots(kind, list(moving.values())) for moving in (theta, phi))
    return State(theta, phi, theta_slots, phi_slots, torch.zeros((), dtype=torch.int64, device=outputs.device))


def forward(problem: Problem, theta: Parameters, inputs: Tensor) -> Tensor:
    """The model's outputs [B, ...] under the weights `theta` for inputs [B, 3, H, W]."""
    if problem.config.parameters == "logits":
        return theta[FREE_LOGITS].clone()  # the step updates its state in place
    if problem.per_image:
        return call(problem.model, theta, inputs[:, None], per_image=True)[:, 0]
    return call(problem.model, theta, inputs, per_image=False)


def adaptation_step(
    problem: Problem,
    state: State,
    inputs: Tensor,
    x0: Tensor,
    image_ids: Tensor,
    timesteps: Tensor | None = None,
    noise: Tensor | None = None,
) -> tuple[State, Tensor]:
    """One update: the state, its tensors updated in place, and the loss [B] before the update.

    The model runs forward and backward once, whatever the number of chunks: they add up the gradient to the condition, and one
    vector-Jacobian product carries it into the weights.
    """
    config = problem.config
    if timesteps is None:
        timesteps = problem.draws(config.pairs).timesteps(image_ids, state.step)
    theta = {name: p.detach().requires_grad_() for name, p in state.theta.items()}
    phi = {name: p.detach().requires_grad_() for name, p in state.phi.items()}
    conditions = problem.task.condition(forward(problem, theta, inputs), problem.denoiser, phi, config)
    drawn = Pairs(x0, timesteps, image_ids, config.seed, state.step, noise)
    loss, to_conditions, to_phi = embedding_mix(
        problem.denoiser, phi, conditions, drawn, config.chunk, config.loss == "l1", problem.per_image
    )
    through = torch.autograd.grad(conditions, [*theta.values(), *phi.values()], to_conditions, allow_unused=True, materialize_grads=True)
    to_theta, to_phi_too = list(through[: len(theta)]), list(through[len(theta) :])
    _update_(config, state.theta, to_theta, state.theta_slots, state.step, config.lr)
    if phi:
        # the label table is reached through the condition, everything else through the prediction
        _update_(config, state.phi, list(torch._foreach_add(to_phi, to_phi_too)), state.phi_slots, state.step, config.denoiser_lr)
    return state._replace(step=state.step + 1), loss


def _update_(config: AdaptConfig, moving: Parameters, gradients: Tensors, slots: Slots, step: Tensor, lr: float) -> None:
    update_(config.optimizer, list(moving.values()), gradients, slots, step, lr, config.momentum, config.weight_decay)


@torch.no_grad()
def guard(problem: Problem, before: Tensor, after: Tensor, x0: Tensor, image_ids: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Which images keep their adapted answer, [B] bool, and the denoiser evaluations spent on it, [B].

    Where the answer changed, both answers condition the source denoiser on the same pairs, held out from the adaptation; the new
    one stands where its loss is lower, by a paired test. Outputs that are not finite never stand.
    """
    task, config = problem.task, problem.config
    accepted = after.isfinite().flatten(1).all(1)
    evaluations = torch.zeros_like(image_ids)
    if not config.guard:
        return accepted, evaluations
    old, new = (task.decision(outputs, problem.denoiser) for outputs in (before, after))
    rows = (accepted & (old != new).flatten(1).any(1)).nonzero()[:, 0]
    if not len(rows):
        return accepted, evaluations
    ids, step = image_ids[rows], step + GUARD_STEP
    drawn = Pairs(x0[rows], problem.draws(config.guard).timesteps(ids, step), ids, config.seed, step)
    l1, parts = config.loss == "l1", list(drawn.chunks(config.chunk))
    was, would_be = (
        torch.cat([pair_losses(problem.denoiser, conditions[rows], part, l1) for part in parts], dim=1) for conditions in (old, new)
    )
    change = would_be - was
    standard_error = change.std(1) / config.guard**0.5 if config.guard_threshold else 0.0
    accepted[rows] = change.mean(1) + config.guard_threshold * standard_error < 0
    evaluations[rows] = 2 * config.guard
    return accepted, evaluations
