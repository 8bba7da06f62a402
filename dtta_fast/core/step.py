"""The adaptation step: updates a state of tensors in place, and never writes to a module."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dtta_fast.config import AdaptConfig
from dtta_fast.core.loss import accumulated_gradients, embedding_mix, noise_mix, noise_mix_null
from dtta_fast.core.optimizers import Slots, Tensors, init_slots, update_
from dtta_fast.core.problem import Problem, Schedule
from dtta_fast.core.weights import Parameters, call, copies, in_dtypes_of
from dtta_fast.kernels import Pairs
from dtta_fast.runtime.compiling import leaf
from dtta_fast.runtime.phases import phase

FREE_LOGITS = "<logits>"  # cannot be a parameter's name


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
    schedule: Schedule,
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
            heads = list(problem.class_task.class_conditions(outputs, denoiser, phi, config, chosen))
    if not any(head.requires_grad for head in heads):
        raise ValueError(
            f"model is a {type(problem.model).__name__} whose outputs carry no gradient to its {config.parameters!r} parameters; "
            "take torch.no_grad(), detach() or argmax out of its forward, or choose other parameters"
        )
    drawn = Pairs(x0, denoiser.process.table, timesteps, image_ids, config.seed, draws.step(state.step), noise=noise)
    loss, to_heads, to_phi, scale = accumulated_gradients(
        predict,
        denoiser,
        phi,
        heads,
        drawn,
        schedule.chunk,
        config.loss == "l1",
        problem.per_image,
        problem.batches_denoiser,
        half=outputs.dtype == torch.float16,
    )
    with phase("classifier"):
        moving, through_heads = [*theta.values(), *phi.values()], [head for head in heads if head.requires_grad]
        upstream = [gradient.to(head.dtype) for gradient, head in zip(to_heads, through_heads, strict=True)]
        through = torch.autograd.grad(through_heads, moving, upstream, allow_unused=True)
        if theta and FREE_LOGITS not in theta and all(g is None for g in through[: len(theta)]):
            raise ValueError(
                f"no gradient reaches the {config.parameters!r} parameters of the model, a {type(problem.model).__name__}; its forward "
                "may go through another module than itself, or through quantised layers: let it use its own floating-point layers, or "
                "choose other parameters"
            )
        to_theta = [torch.zeros_like(p) if g is None else g for p, g in zip(theta.values(), through, strict=False)]
        # gradients reach the label table through the condition, everything else through the prediction
        to_phi = [g if more is None else g + more for g, more in zip(to_phi, through[len(theta) :], strict=True)]
    return loss, unscaled(to_theta, scale), unscaled(to_phi, scale)


def _gradients_in_parts(
    problem: Problem, schedule: Schedule, together: int, state: State, *batch: Tensor | None
) -> tuple[Tensor, Tensors, Tensors]:
    """Computes gradients() for `together` images at a time and averages those of the shared weights over all images."""
    assert batch[0] is not None
    images = len(batch[0])
    losses, sums = [], [torch.zeros_like(p) for p in (*state.theta.values(), *state.phi.values())]
    for first in range(0, images, together):
        part = [None if tensor is None else tensor[first : first + together] for tensor in batch]
        loss, to_theta, to_phi = gradients(problem, schedule, state, *part)  # type: ignore[arg-type]
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
    schedule: Schedule,
    state: State,
    inputs: Tensor,
    x0: Tensor,
    image_ids: Tensor,
    timesteps: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Updates the state in place; returns the loss [B] before the update. This is the unit that compile="step" compiles."""
    batch = inputs, x0, image_ids, timesteps, noise
    together = len(inputs) if problem.per_image else schedule.together or len(inputs)
    if len(inputs) <= together:
        loss, to_theta, to_phi = gradients(problem, schedule, state, *batch)
    else:
        loss, to_theta, to_phi = _gradients_in_parts(problem, schedule, together, state, *batch)
    with phase("optimizer"):
        update(problem, state, to_theta, to_phi)
    return loss


def _update_(config: AdaptConfig, moving: Parameters, gradients: Tensors, slots: Slots, step: Tensor, lr: Tensor) -> None:
    if not moving:
        return
    update_(config.optimizer, list(moving.values()), gradients, slots, step, lr, config.momentum, config.weight_decay)
