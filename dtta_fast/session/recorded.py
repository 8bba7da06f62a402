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
from dtta_fast.runtime.private import named_tensors
from dtta_fast.session.checks import Request
from dtta_fast.session.loop import Batch, Decision
from dtta_fast.session.program import ModuleProgram

NAMES = "original", "matched", "x0", "image_ids"  # the tensors of a batch that recordings read


class RecordedProgram(ModuleProgram):
    """A program whose recordings read a batch and a state at fixed addresses; what leaves it is copied out of their memory.

    If a call is given `timesteps` or `noise`, its steps are not recorded. A call on a different stream than the last one records everything
    anew. The caller's forward hooks run during a recording, but not during a replay.
    """

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        device = anchor(self.problem.model).device
        self._graphs = Graphs(device, self.compiles)
        self._number = torch.zeros((), dtype=torch.int64, device=device)  # of the next step
        self._online: State | None = None  # the storage of online states
        self._token: tuple[State | None, int] = None, -1  # the last state that was asked for, and what stands for its addresses

    def views(self, crop: Tensor, request: Request) -> Batch:
        self._graphs.begin()
        return self._placed(super().views(crop, request), "original", "matched")

    def start(self, batch: Batch, online: State | None) -> tuple[State | None, Batch]:
        self._number.zero_()
        state, batch = super().start(self._placed(batch, *NAMES), online)
        if online is None and state is not None and self.online:
            state = self.copied(state)
        return state, batch

    def _placed(self, batch: Batch, *names: str) -> Batch:
        held = {name: getattr(batch, name) for name in names}
        return batch._replace(**{name: self._graphs.placed(name, value) for name, value in held.items() if value is not None})

    @torch.no_grad()
    def copied(self, online: State) -> State:
        if self._online is None:
            self._online = super().copied(online)
        else:
            for place, values in zip(pytree.tree_leaves(self._online), pytree.tree_leaves(online), strict=True):
                place.copy_(values)
        return self._online

    def own(self, state: State) -> State:
        return super().copied(state)

    def forget_state(self, of_one: bool) -> None:
        if of_one in self._storage:
            self._graphs.forget()  # they hold the storage, and write to it
            self._token = None, -1
        super().forget_state(of_one)

    def forget_states(self) -> None:
        super().forget_states()
        self._graphs.clear()
        self._online, self._token = None, (None, -1)

    def gave_up(self) -> bool:
        return self._graphs.failed

    def frees_memory(self) -> bool:
        return self._graphs.forget()

    def _held(self, state: State | None = None) -> list[Tensor]:
        """Returns the tensors of the modules and of a state."""
        modules = self.problem.model, self.problem.denoiser
        return [*(tensor for module in modules for _, tensor in named_tensors(module)), self._number, *pytree.tree_leaves(state)]

    def _known(self, state: State) -> int:
        if state is not self._token[0]:
            self._token = state, self._graphs.token(pytree.tree_leaves(state))
        return self._token[1]

    def plain_outputs(self, inputs: Tensor) -> Tensor:
        return self._in_parts(lambda part: self._forward_of({}, part, ()), inputs)

    def forward(self, state: State, inputs: Tensor) -> Tensor:
        def run(part: Tensor) -> Tensor:
            return self._forward_of(state.theta, part, self._known(state))

        return run(inputs) if self.problem.per_image else self._in_parts(run, inputs)

    @torch.no_grad()
    def _forward_of(self, theta: Parameters, inputs: Tensor, given: Any) -> Tensor:
        return self._graphs.run("forward", lambda: self.outputs(theta, inputs), inputs, given=given, held=self._held).clone()

    def step(self, state: State, batch: Batch, number: int) -> Tensor:
        if batch.timesteps is not None or batch.noise is not None:
            return super().step(state, batch, number)
        steps, dtype = self.problem.config.steps, torch.promote_types(batch.x0.dtype, torch.float32)
        losses = self._graphs.place("losses", (steps, len(batch.x0)), dtype)

        def stepped() -> Tensor:
            loss = super(RecordedProgram, self).step(state, batch, number)
            losses.index_copy_(0, self._number[None], loss[None])  # a later step must not overwrite it
            self._number.add_(1).remainder_(steps)
            return losses

        given = self._known(state), self.schedule, self.problem.denoiser.checkpointing
        read = batch.inputs, batch.x0, batch.image_ids, losses
        return self._graphs.run("step", stepped, *read, given=given, held=lambda: self._held(state))[number]

    @torch.no_grad()
    def finish(self, state: State, batch: Batch) -> Answers:
        before = self._graphs.placed("before", batch.before)
        matched = before if batch.matched is None else self._graphs.placed("matched outputs", batch.matched_outputs)

        def compared() -> Answers:
            return guard.compare(self.problem, before, self.outputs(state.theta, batch.inputs), matched)

        return self._graphs.run("finish", compared, batch.inputs, before, matched, given=self._known(state), held=lambda: self._held(state))

    def losses(self, state: State, batch: Batch, answers: Answers, wanted: list[list[bool]]) -> list[Tensor]:
        conditions = answers.conditions
        assert conditions is not None
        found = conditions.new_zeros(*conditions.shape[:2], self.guard, dtype=torch.promote_types(batch.x0.dtype, torch.float32))
        for indices in guard.wanted_indices(wanted).split(self._together, dim=1):
            values, places = self._held_out(state, batch, conditions, indices)
            answer, image = places[:, : indices.shape[1]]
            found.index_put_((answer, image), values[: indices.shape[1]])
        return list(found)

    @property
    def _together(self) -> int:
        """The number of answers whose losses one forward of the guard computes."""
        return max(1, self.schedule.guard_rows // self.guard)

    def _held_out(self, state: State, batch: Batch, conditions: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the losses [N, guard] at indices [2, N] of answer and image, and the indices on the device.

        The last one is repeated, to one of a few numbers N: each has a recording of its own.
        """
        count = indices.shape[1]
        most = self._together
        padded = most if self.problem.row_counts == "one" else min(most, guard.padded_count(count))
        places = self._graphs.placed("indices", torch.cat([indices, indices[:, -1:].expand(-1, padded - count)], dim=1))

        def held_out() -> Tensor:
            answer, image = places
            given = conditions[answer, image], batch.x0[image], batch.image_ids[image]
            return guard.held_out_losses(self.problem, self.schedule, *given, state.step)

        with self._forwards(padded * self.guard):
            read = conditions, batch.x0, batch.image_ids, state.step, places
            return self._graphs.run("guard", held_out, *read, given=self.schedule, held=self._held), places

    def rehearse(self, state: State, batch: Batch) -> list[list[bool]]:
        """Records the guard for every number of answers that a forward of it may compare."""
        images, matching = len(batch.image_ids), self.problem.config.match == "both"
        if not self.guard:
            return []
        conditions = self.finish(state, batch).conditions
        assert conditions is not None
        most = min(self._together, (2 + matching) * images)
        for count in sorted({min(most, guard.padded_count(count)) for count in range(1, most + 1)}):
            indices = torch.arange(count, dtype=torch.int64, device="cpu") % images
            self._held_out(state, batch, conditions, torch.stack([torch.zeros_like(indices), indices]))
        return [[True] * images] * 2 + [[matching] * images]

    def decide(self, batch: Batch, answers: Answers, losses: list[Tensor]) -> Decision:
        if not losses:  # these leave as they are
            answers = answers._replace(standing=answers.standing.clone(), accepted=answers.accepted.clone())
        return super().decide(batch, answers, losses)
