"""The program of an Adapter on CUDA graphs: the model's forwards, the steps and the guard are recorded and replayed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dtta_fast.core import guard
from dtta_fast.core.guard import Answers
from dtta_fast.core.step import State
from dtta_fast.core.weights import Parameters, anchor
from dtta_fast.runtime.graphs import Graphs
from dtta_fast.session.checks import Request
from dtta_fast.session.loop import Batch, Decision
from dtta_fast.session.program import ModuleProgram

NAMES = "original", "matched", "x0", "image_ids"  # the tensors of a batch that recordings read


class RecordedProgram(ModuleProgram):
    """A program whose recordings read a batch and a state at fixed addresses; what leaves it is copied out of their memory.

    A call with `timesteps` or `noise` of its own makes its steps without them.
    """

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._graphs = Graphs()
        self._number = torch.zeros((), dtype=torch.int64, device=anchor(self.problem.model).device)  # of the next step

    def views(self, crop: Tensor, request: Request) -> Batch:
        return self._placed(super().views(crop, request), "original", "matched")

    def start(self, batch: Batch, online: State | None) -> tuple[State | None, Batch]:
        self._number.zero_()
        return super().start(self._placed(batch, *NAMES), online)

    def _placed(self, batch: Batch, *names: str) -> Batch:
        held = {name: getattr(batch, name) for name in names}
        return batch._replace(**{name: self._graphs.fixed(name, value) for name, value in held.items() if value is not None})

    def copied(self, online: State) -> State:
        leaves, form = pytree.tree_flatten(online)
        state: State = pytree.tree_unflatten([self._graphs.fixed(f"state {i}", leaf) for i, leaf in enumerate(leaves)], form)
        return state

    def forget_state(self, of_one: bool) -> None:
        if of_one in self._storage:
            self._graphs.forget()  # they hold the storage, and write to it
        super().forget_state(of_one)

    def forget_states(self) -> None:
        super().forget_states()
        self._graphs.clear()

    def plain_outputs(self, inputs: Tensor) -> Tensor:
        return self._replayed_forward({}, inputs)

    @torch.no_grad()
    def forward(self, state: State, inputs: Tensor) -> Tensor:
        return self._replayed_forward(state.theta, inputs)

    def _replayed_forward(self, theta: Parameters, inputs: Tensor) -> Tensor:
        return self._graphs.run("forward", lambda: self.outputs(theta, inputs), *theta.values(), inputs).clone()

    def step(self, state: State, batch: Batch, number: int) -> Tensor:
        if batch.timesteps is not None or batch.noise is not None:
            return super().step(state, batch, number)
        steps, dtype = self.problem.config.steps, torch.promote_types(batch.x0.dtype, torch.float32)
        losses = self._graphs.place("losses", (steps, len(batch.x0)), dtype, batch.x0.device)

        def stepped() -> Tensor:
            loss = super(RecordedProgram, self).step(state, batch, number)
            losses.index_copy_(0, self._number[None], loss[None])  # a later step must not overwrite it
            self._number.add_(1).remainder_(steps)
            return losses

        key = "step", self.schedule, self.problem.denoiser.checkpointing
        tensors = [*pytree.tree_leaves(state), batch.inputs, batch.x0, batch.image_ids, losses]
        return self._graphs.run(key, stepped, *tensors)[number]

    def finish(self, state: State, batch: Batch) -> Answers:
        before = self._graphs.fixed("before", batch.before)
        matched = before if batch.matched is None else self._graphs.fixed("matched outputs", batch.matched_outputs)

        def compared() -> Answers:
            return guard.compare(self.problem, before, self.outputs(state.theta, batch.inputs), matched)

        return self._graphs.run("finish", compared, *state.theta.values(), batch.inputs, before, matched)

    def losses(self, state: State, batch: Batch, answers: Answers, wanted: list[list[bool]]) -> list[Tensor]:
        conditions = answers.conditions
        assert conditions is not None
        found = guard.places(wanted)
        count, device = found.shape[1], batch.x0.device
        padded = torch.cat([found, found[:, -1:].expand(-1, guard.few(count) - count)], dim=1)  # few recordings for all counts
        which, images = self._graphs.fixed("places", padded, device)

        def held_out() -> Tensor:
            given = conditions[which, images], batch.x0[images], batch.image_ids[images]
            return guard.held_out_losses(self.problem, self.schedule, *given, state.step)

        with self._forwards(padded.shape[1] * self.guard):
            values = self._graphs.run(("guard", self.schedule), held_out, conditions, batch.x0, batch.image_ids, state.step, which, images)
        scattered = values.new_zeros(*conditions.shape[:2], self.guard)
        return list(scattered.index_put((which[:count], images[:count]), values[:count]))

    def decide(self, batch: Batch, answers: Answers, losses: list[Tensor]) -> Decision:
        if not losses:  # these leave as they are
            answers = answers._replace(standing=answers.standing.clone(), accepted=answers.accepted.clone())
        return super().decide(batch, answers, losses)

    def own(self, state: State) -> State:
        kept: State = pytree.tree_map(torch.clone, state)
        return kept
