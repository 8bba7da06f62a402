"""Splits an adaptation into pure tensor functions, which a package contains and a host calls in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dtta_fast import step
from dtta_fast.engine import Engine, anchor
from dtta_fast.step import State

Tensors = list[Tensor]


class Function(NamedTuple):
    """A function from tensors to a list of tensors, and example tensors of the shapes for which it is compiled."""

    call: Callable[..., Tensors]
    example: Tensors


def functions(engine: Engine, crop: Tensor, image_ids: Tensor) -> dict[str, Function]:
    """Builds the functions for adapting crops [B, 3, H, W], by name. `state` stands for the flat sequence of state tensors.

    state() -> state                                            initial state of every image, or of the stream
    start(crop, state) -> inputs, x0, before, first, asked      model inputs; latents; outputs for the crop and for the inputs; mask [B] of
                                                                the images to adapt
    step(state, inputs, x0, image_ids) -> loss                  one update, in place in the state; loss [B]
    finish(state, inputs, before, first, asked) -> after, standing, accepted, fresh
                                                                outputs; the result without a guard; mask [2, B] of the answers `after` and
                                                                `first` to compare with the answer before
    losses(outputs, x0, image_ids, step) -> losses [B, guard]   held-out losses under the answer of the outputs; only with a guard
    decide(before, after, first, standing, accepted, fresh, losses, losses_after, losses_first)
        -> outputs, accepted, predictions, predictions_before

    A host that calls them in the same way as Package.adapt gets the same results as Adapter.adapt.
    """
    config, task, online = engine.config, engine.task, engine.config.mode == "online"
    size, dtype = (crop.shape[-2], crop.shape[-1]), anchor(engine.model).dtype
    example = task.normalise(engine.problem.model, crop).to(dtype)  # only its shape matters
    together = engine.plan(example, engine.problem.denoiser.encode(crop), config.pairs)
    if together < len(crop):
        raise ValueError(f"batch is {len(crop)}, and memory_budget has room for {together} at once")
    problem, calibration = engine.problem, engine.denoiser.calibration
    model, denoiser = problem.model, problem.denoiser
    state, found = engine.start(example, None)
    leaves, structure = pytree.tree_flatten(state)
    count = len(leaves)

    def restored(given: tuple[Tensor, ...]) -> State:
        rebuilt: State = pytree.tree_unflatten(list(given[:count]), structure)
        return rebuilt

    def initial() -> Tensors:
        return pytree.tree_leaves(step.initial_state(problem, *engine.source(), found))

    @torch.no_grad()
    def start(crop: Tensor, *given: Tensor) -> Tensors:
        theta = restored(given).theta if online else {}
        matched = crop if config.match == "off" or calibration is None else calibration.match(crop)
        original = task.normalise(model, crop).to(dtype)
        before = step.forward(problem, theta, original)
        inputs, first = original, before
        if config.match == "both":
            inputs = task.normalise(model, matched).to(dtype)
            first = step.forward(problem, theta, inputs)
        asked = torch.ones_like(image_ids, dtype=torch.bool)
        if config.precheck == "statistics" and calibration is not None:
            asked = calibration.distance(crop) > calibration.limit
        elif config.precheck == "answer":
            asked = (task.decision(before, denoiser) != task.decision(first, denoiser)).flatten(1).any(1)
        return [inputs.clone(), denoiser.encode(matched), before.clone(), first.clone(), asked]  # outputs must not share memory

    def update(*given: Tensor) -> Tensors:
        with torch.enable_grad():
            return [step.adaptation_step(problem, restored(given), *given[count:])]

    @torch.no_grad()
    def finish(*given: Tensor) -> Tensors:
        inputs, before, first, asked = given[count:]
        after = step.forward(problem, restored(given).theta, inputs)
        standing, accepted, fresh, _ = step.compared(problem, before, [after, first])
        if not config.guard:  # the only check on a single answer is that it is finite
            fresh = [torch.zeros_like(asked)] * 2
        wide = asked.view(-1, *(1,) * (after.ndim - 1))
        return [after.clone(), torch.where(wide, standing, before), accepted & asked, torch.stack(fresh) & asked]

    @torch.no_grad()
    def losses(outputs: Tensor, x0: Tensor, image_ids: Tensor, at: Tensor) -> Tensors:
        return [step.held_out_losses(problem, task.decision(outputs, denoiser), x0, image_ids, at)]

    @torch.no_grad()
    def decide(before: Tensor, after: Tensor, first: Tensor, standing: Tensor, accepted: Tensor, fresh: Tensor, *known: Tensor) -> Tensors:
        outputs = standing.clone()
        accepted = accepted.clone()
        if config.guard:
            outputs, accepted = step.decided(config, outputs, accepted, [after, first], list(fresh), known[0], list(known[1:]))
        return [outputs, accepted, *(task.predict(which, size) for which in (outputs, before))]

    inputs, x0, before, first, asked = start(crop, *leaves)
    with torch.no_grad():
        after, standing, accepted, fresh = finish(*leaves, inputs, before, first, asked)
    known = [x0.new_zeros(len(x0), max(1, config.guard))] * 3
    made = {
        "state": Function(initial, []),
        "start": Function(start, [crop, *(leaves if online else [])]),
        "step": Function(update, [*leaves, inputs, x0, image_ids]),
        "finish": Function(finish, [*leaves, inputs, before, first, asked]),
        "losses": Function(losses, [before, x0, image_ids, state.step]),
        "decide": Function(decide, [before, after, first, standing, accepted, fresh, *known]),
    }
    if not config.guard:
        del made["losses"]
    return made
