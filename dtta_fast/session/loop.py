"""The loop of an adaptation: the order of its calls, its deadline and its guard, for eager, compiled and packaged sessions alike.

The C++ session (embed/cpp/session.cpp) makes the same calls in the same order; tests/test_embed.py compares the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dtta_fast.core.guard import Answers, unchanged, usable, where
from dtta_fast.runtime.clock import Clock, Durations, Pace
from dtta_fast.runtime.reads import read


class Batch(NamedTuple):
    """A batch of B images, one per row of every tensor.

    original: the model's inputs for the unchanged images (a package has only the crops). matched: its inputs for the matched images; None
    if the model sees the unchanged images. crop: [B, 3, H, W] in [0, 1], the denoiser's view. image_ids: [B]. x0: latents [B, C, h, w],
    None until they are encoded. timesteps [B, steps, P] and noise [B, steps, P, C, h, w]: None if they are drawn. before: outputs [B, ...]
    before any update for the unchanged images, and matched_outputs: those for the inputs used for adaptation; None until they are known.
    asked: [B] bool, the images that the pre-check selects; None is all of them.
    """

    original: Tensor
    matched: Tensor | None
    crop: Tensor
    image_ids: Tensor
    x0: Any = None  # Any: calls take these three tensors after they are known
    timesteps: Tensor | None = None
    noise: Tensor | None = None
    before: Any = None
    matched_outputs: Any = None
    asked: Any = None

    @property
    def inputs(self) -> Tensor:
        """The model inputs used for adaptation."""
        return self.original if self.matched is None else self.matched

    def of(self, rows: Tensor | slice) -> Batch:
        """Selects some of the images."""
        return Batch(*(None if tensor is None else tensor[rows] for tensor in self))  # type: ignore[arg-type]

    def pairs_of(self, step: int) -> list[Tensor | None]:
        """The given timesteps [B, P] and noise [B, P, C, h, w] of a step; None for those that are drawn."""
        return [None if given is None else given[:, step] for given in (self.timesteps, self.noise)]


class Decision(NamedTuple):
    """The final answer: outputs [B, ...], whether each comes from the adaptation, [B] bool, and the predictions after and before."""

    outputs: Tensor
    accepted: Tensor
    predictions: Tensor
    predictions_before: Tensor


class Outcome(NamedTuple):
    """The results of images that ran at once, as in AdaptResult. keep: whether later batches may continue from the state."""

    keep: bool
    before: Tensor
    outputs: Tensor
    predictions: Tensor
    predictions_before: Tensor
    loss: Tensor
    accepted: Tensor
    evaluations: Tensor


class Program(Protocol):
    """The calls that run() makes for a batch; `state` is the program's own kind of state, a pytree of tensors.

    Attributes:
        guard: number of the guard's pairs, 0 without a guard. online: whether the state carries on from batch to batch.
    """

    @property
    def guard(self) -> int: ...

    @property
    def online(self) -> bool: ...

    def step(self, state: Any, batch: Batch, number: int) -> Tensor:
        """Updates the state in place; returns the loss [B] before the update. number: 0 for the first step."""

    def finish(self, state: Any, batch: Batch) -> Answers:
        """Computes the outputs under the adapted weights and compares the answers."""

    def losses(self, state: Any, batch: Batch, answers: Answers, wanted: list[list[bool]]) -> list[Tensor]:
        """Computes the held-out losses [B, guard] under the standing answer, the adapted one and the original image's.

        wanted: for each of the three, the images whose losses are needed. The others' values do not matter.
        """

    def decide(self, batch: Batch, answers: Answers, losses: list[Tensor]) -> Decision:
        """Chooses between the answers by their losses, which are empty if nothing was compared."""

    def source_outputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Computes the unadapted model's outputs [B, ...] for the unchanged images, and for the inputs used for adaptation."""

    def rehearse(self, state: Any, batch: Batch) -> list[list[bool]]:
        """Warms up what later batches may need; returns the losses that a guard wants at most, in the form of losses()."""


class Call(NamedTuple):
    """The deadline, timings and mode of a call.

    deadline: time in seconds on the clock of time.perf_counter(), or None. pace: how long the parts took lately. warming: whether to run
    and time every part, even if this batch does not need it. advance: called after each step with the number of images.
    """

    clock: Clock
    pace: Pace
    deadline: float | None = None
    warming: bool = False
    advance: Callable[[int], None] | None = None

    def has_time(self, *parts: Durations) -> bool:
        """Returns whether these parts are expected to finish before the deadline."""
        return self.deadline is None or self.clock.now() + sum(part.expected for part in parts) <= self.deadline


def run(program: Program, state: Any, batch: Batch, call: Call, steps: int) -> Outcome:
    """Adapts to a batch whose `before` and `matched_outputs` are known: makes the steps, lets the guard compare, and decides.

    No step is started that is expected to finish, with what follows it, after the deadline. If no time is left for the guard, no changed
    answer is accepted. The host waits for the device at most once, to read what the guard has to compare; with a deadline, after every
    part.
    """
    clock, pace = call.clock, call.pace
    timed = call.warming or call.deadline is not None or not clock.waits
    losses: list[Tensor] = []
    with clock.phase("adapt"):
        while len(losses) < steps and call.has_time(pace.step, pace.end, pace.guard):
            with pace.step.timed(clock, timed):
                losses.append(program.step(state, batch, len(losses)))
            if call.advance is not None:
                call.advance(len(batch.image_ids))
        if losses:
            with pace.end.timed(clock, timed):
                answers = program.finish(state, batch)
        else:
            answers = unchanged(batch.before, batch.matched_outputs)
    most = program.rehearse(state, batch) if call.warming and losses else []
    in_time = call.has_time(pace.guard)
    if not in_time:
        answers = answers._replace(fresh=torch.zeros_like(answers.fresh))
    compared = torch.cat([answers.fresh.any(0)[None], answers.fresh])
    held_out: list[Tensor] = []
    with clock.phase("guard"):
        begun = clock.now() if timed else 0.0
        wanted, sound, sound_before = _read(program, state, batch, answers, compared if losses and in_time else None)
        if program.guard and (most or any(map(any, wanted))):
            held_out = program.losses(state, batch, answers, most or wanted)
            if timed:
                pace.guard.note(clock.now() - begun)
    decision = program.decide(batch, answers, held_out)
    if not sound_before:  # the state is useless for these images: they get the source model's answers
        source, source_matched = program.source_outputs(batch)
        stands = unchanged(source, source_matched).standing
        outputs = where(usable(decision.outputs, source), decision.outputs, stands)
        before = where(usable(batch.before, source), batch.before, source)
        accepted = decision.accepted & usable(decision.outputs, source)
        batch = batch._replace(before=before)
        answers = answers._replace(standing=outputs, accepted=accepted, fresh=torch.zeros_like(answers.fresh))
        decision = program.decide(batch, answers, [])
    loss = torch.stack(losses, dim=1) if losses else batch.x0.new_empty(len(batch.x0), 0)
    return Outcome(
        keep=program.online and bool(losses) and sound,
        before=batch.before,
        outputs=decision.outputs,
        predictions=decision.predictions,
        predictions_before=decision.predictions_before,
        loss=loss,
        accepted=decision.accepted,
        evaluations=program.guard * compared.sum(0),
    )


@torch.no_grad()
def _read(program: Program, state: Any, batch: Batch, answers: Answers, compared: Tensor | None) -> tuple[list[list[bool]], bool, bool]:
    """Reads, in one transfer, what the guard has to compare and whether an online state is usable.

    compared: the mask [3, B] for losses(); None if nothing is to be compared.

    Returns:
        The mask as lists; whether the state and its outputs are usable; whether its outputs before the steps were. An episodic state is
        not looked at: its outputs are compared image by image.
    """
    masks = [] if compared is None or not program.guard else [compared]
    count = len(masks)
    if program.online:
        before = usable(batch.before, batch.before).all()
        masks += [finite(state) & usable(answers.after, batch.before).all() & before, before]
    found = read(*masks) if masks else []
    sound, sound_before = found[count:] or (True, True)
    return found[0] if count else [], sound, sound_before


def finite(state: Any) -> Tensor:
    """Returns whether all of a state's numbers are finite, as a 0-dim bool tensor."""
    numbers = [tensor for tensor in pytree.tree_leaves(state) if tensor.is_floating_point() and tensor.numel()]
    return torch.stack(list(torch._foreach_norm(numbers, torch.inf))).isfinite().all()
