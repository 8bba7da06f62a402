"""Turns the calls of a program into pure functions of tensors, which a package contains and a host calls in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dtta_fast.core import guard, step
from dtta_fast.core.guard import Answers
from dtta_fast.core.step import State
from dtta_fast.session.checks import Request
from dtta_fast.session.program import ModuleProgram

Tensors = list[Tensor]


class Function(NamedTuple):
    """A function from tensors to a list of tensors, and example tensors of the shapes for which it is compiled."""

    call: Callable[..., Tensors]
    example: Tensors


def _unbound(method: Callable[..., Tensors]) -> Callable[..., Tensors]:
    """Wraps a bound method for make_fx, which counts `self` as an argument."""
    return lambda *given: method(*given)


class Functions:
    """The calls of a program for crops [B, 3, H, W] as pure functions. `state` stands for the flat sequence of state tensors.

    state() -> state                                            initial state of every image, or of the stream
    start(crop, state) -> inputs, x0, before, matched_outputs, asked
                                                                model inputs; latents; outputs for the crop and for the inputs; mask [B] of
                                                                the images to adapt. Only an online program gets the state
    step(state, inputs, x0, image_ids) -> loss                  one update, in place in the state; loss [B]
    finish(state, inputs, before, matched_outputs, asked) -> after, standing, accepted, fresh
                                                                outputs; the result without a guard; mask [2, B] of the answers `after` and
                                                                `before` to compare with the standing one
    losses(outputs, x0, image_ids, step) -> losses [B, guard]   held-out losses under the answer of the outputs; only with a guard
    decide(before, after, standing, accepted, fresh, losses, losses_after, losses_before)
        -> outputs, accepted, predictions, predictions_before

    A host that calls them in the order of session.loop.run() gets the same results as Adapter.adapt.
    """

    def __init__(self, program: ModuleProgram, crop: Tensor, image_ids: Tensor) -> None:
        config = program.problem.config
        self._program, self._image_ids, self._size = program, image_ids, (crop.shape[-2], crop.shape[-1])
        state, batch = program.begin(crop, image_ids)
        if len(batch.image_ids) < len(crop):
            raise ValueError(f"batch is {len(crop)}, and memory_budget has room for {len(batch.image_ids)} at once")
        self._initial_outputs = batch.matched_outputs
        leaves, self._structure = pytree.tree_flatten(state)
        self._count = len(leaves)
        inputs, x0, before, matched_outputs, asked = self.start(crop, *leaves)
        after, standing, accepted, fresh = self.finish(*leaves, inputs, before, matched_outputs, asked)
        known = [x0.new_zeros(len(x0), max(1, config.guard))] * 3
        self.by_name = {
            "state": Function(_unbound(self.state), []),
            "start": Function(_unbound(self.start), [crop, *(leaves if program.online else [])]),
            "step": Function(_unbound(self.step), [*leaves, inputs, x0, image_ids]),
            "finish": Function(_unbound(self.finish), [*leaves, inputs, before, matched_outputs, asked]),
            "losses": Function(_unbound(self.losses), [before, x0, image_ids, state.step]),
            "decide": Function(_unbound(self.decide), [before, after, standing, accepted, fresh, *known]),
        }
        if not config.guard:
            del self.by_name["losses"]

    def _restored(self, given: tuple[Tensor, ...]) -> State:
        rebuilt: State = pytree.tree_unflatten(list(given[: self._count]), self._structure)
        return rebuilt

    def state(self) -> Tensors:
        found: Tensors = pytree.tree_leaves(step.initial_state(self._program.problem, *self._program.source(), self._initial_outputs))
        return found

    @torch.no_grad()
    def start(self, crop: Tensor, *given: Tensor) -> Tensors:
        program, problem = self._program, self._program.problem
        theta = self._restored(given).theta if program.online else {}
        batch = program.encoded(program.views(crop, Request(crop, self._image_ids)))
        before = step.forward(problem, theta, batch.original)
        matched_outputs = before if batch.matched is None else step.forward(problem, theta, batch.matched)
        asked = program.asked(batch._replace(before=before, matched_outputs=matched_outputs), crop)
        asked = torch.ones_like(self._image_ids, dtype=torch.bool) if asked is None else asked
        return [batch.inputs.clone(), batch.x0, before.clone(), matched_outputs.clone(), asked]  # outputs must not share memory

    @torch.enable_grad()
    def step(self, *given: Tensor) -> Tensors:
        program = self._program
        return [step.adaptation_step(program.problem, program.schedule, self._restored(given), *given[self._count :])]

    @torch.no_grad()
    def finish(self, *given: Tensor) -> Tensors:
        inputs, before, matched_outputs, asked = given[self._count :]
        after = step.forward(self._program.problem, self._restored(given).theta, inputs)
        answers = guard.compare(self._program.problem, before, after, matched_outputs)
        standing = guard.where(asked, answers.standing, guard.unchanged(before, matched_outputs).standing)
        return [after.clone(), standing, answers.accepted & asked, answers.fresh & asked]

    @torch.no_grad()
    def losses(self, outputs: Tensor, x0: Tensor, image_ids: Tensor, at: Tensor) -> Tensors:
        program, problem = self._program, self._program.problem
        conditions = problem.task.decision(outputs, problem.denoiser)
        return [guard.held_out_losses(problem, program.schedule, conditions, x0, image_ids, at)]

    @torch.no_grad()
    def decide(self, before: Tensor, after: Tensor, *given: Tensor) -> Tensors:
        standing, accepted, fresh, *known = given
        problem = self._program.problem
        answers = Answers(after, standing.clone(), accepted.clone(), fresh)
        outputs, accepted = guard.decide(problem.config, answers, before, known if problem.config.guard else [], problem.trust)
        return [outputs, accepted, *(problem.task.predict(which, self._size) for which in (outputs, before))]
