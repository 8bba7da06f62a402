"""The program of an Adapter: its calls run on private modules, eagerly or with parts compiled."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dtta_fast.config import Compile
from dtta_fast.core import diffusion_classifier, guard, step
from dtta_fast.core.guard import Answers, usable, where
from dtta_fast.core.problem import Problem, RowCounts, Schedule
from dtta_fast.core.step import State
from dtta_fast.core.weights import Parameters, anchor, call, in_dtypes_of, source_weights
from dtta_fast.denoisers.base import Denoiser
from dtta_fast.runtime import compiling, reads
from dtta_fast.runtime.clock import Clock
from dtta_fast.runtime.failures import is_the_callers, out_of_memory, reason
from dtta_fast.runtime.phases import phase
from dtta_fast.runtime.reads import Checks
from dtta_fast.runtime.trial import (
    Notice,
    are_bright,
    are_logits,
    first_run,
    have_moved,
    is_its_own,
    refusing_kept_tensors,
    refusing_recomputation,
)
from dtta_fast.runtime.warn import warn
from dtta_fast.session.checks import Request
from dtta_fast.session.loop import Batch, Decision, Outcome, Program
from dtta_fast.session.memory import Needs
from dtta_fast.session.planning import Planner

SURE = 0.8  # probability from which the pre-check takes an answer that matching does not change; chosen on validation images (docs/log.md)


class ModuleProgram(Program):
    """A program on one set of private modules; the engine makes a new one when it copies the modules again.

    Attributes:
        problem, schedule: what the steps are computed from, and how they are split; plan() updates the schedule.
        compile: what is compiled, as in AdaptConfig; compiled code takes batches of one size.
        compiles: whether torch.compile compiles any of it.
    """

    def __init__(self, problem: Problem, model: nn.Module, denoiser: Denoiser, planner: Planner, compile: Compile) -> None:
        """model, denoiser: the caller's, whose weights are adapted; `problem` holds their private copies."""
        self._step, self._forward = step.adaptation_step, step.forward
        row_counts: RowCounts = "few" if anchor(problem.model).device.type == "cuda" else "any"
        self.compiles = compile not in ("off", "graphs")
        if self.compiles:
            row_counts = "one"
            compiling.compile_regions(problem.denoiser.regions())
            self._forward = compiling.compiled(step.forward)
            problem = dataclasses.replace(problem, denoiser_loop=True)  # its blocks are compiled for plain tensors
            if compile == "step":
                self._step = compiling.compiled(step.adaptation_step)
            else:
                problem = dataclasses.replace(problem, forward=self._forward)
        self.problem, self.schedule = dataclasses.replace(problem, row_counts=row_counts), Schedule()
        # no method of self in either: a session that is dropped has to free its memory at once
        self._calibration = denoiser.calibration  # as it was when the guard's trust was read
        self.source = functools.partial(source_weights, problem.config, model, denoiser, problem.model, problem.denoiser)
        self.needs = Needs(problem, self.source, self._forward)
        self.compile = compile
        self._planner = planner
        self._ran = self._stepped = False  # the first run's checks are done
        self._notices: list[Notice] = []
        self._tried: set[str] = set()  # the modules of which is known whether vmap can batch them
        # one for a single image, one for several: their weights have different layouts, and so round differently
        self._storage: dict[bool, State] = {}

    @property
    def guard(self) -> int:
        return self.problem.config.guard

    @property
    def online(self) -> bool:
        return self.problem.config.mode == "online"

    def _note(self, notice: Notice | None) -> None:
        if notice is not None:
            self._notices.append(notice)

    def tell(self) -> None:
        """Tells what the first call found out about the model; the host waits for the device only if there is something to read."""
        notices, self._notices = self._notices, []
        if notices:
            for (_, tell), fine in zip(notices, reads.read(*(fine for fine, _ in notices)), strict=True):
                if not fine:
                    tell()

    def views(self, crop: Tensor, request: Request) -> Batch:
        """Prepares what the model and the denoiser see of crops [B, 3, H, W] in [0, 1]: matched as the config says, and normalised."""
        problem, calibration = self.problem, self._calibration
        match, dtype = problem.config.match, anchor(problem.model).dtype
        seen = crop if match == "off" or calibration is None else calibration.match(crop)
        original = problem.task.normalise(problem.model, crop.clone()).to(dtype)
        matched = problem.task.normalise(problem.model, seen.clone()).to(dtype) if match == "both" else None
        return Batch(original, matched, seen, request.image_ids, request.latents, request.timesteps, request.noise)

    def answered(self, batch: Batch, crop: Tensor, checks: Checks) -> Batch:
        """Adds the source model's outputs, checked, and the images that the pre-check selects; crop [B, 3, H, W] as given to views()."""
        if not self._ran:
            self._note(are_bright(crop))
        before = self.checked_outputs(batch.original, checks)
        matched_outputs = before if batch.matched is None else self.checked_outputs(batch.matched, checks)
        batch = batch._replace(before=before, matched_outputs=matched_outputs)
        return batch._replace(asked=self.asked(batch, crop))

    @torch.no_grad()
    def asked(self, batch: Batch, crop: Tensor) -> Tensor | None:
        """Returns which images [B] the pre-check selects for adaptation; None without a pre-check.

        batch: with its outputs before adaptation. crop: [B, 3, H, W] as given to views().
        """
        problem, calibration = self.problem, self._calibration
        if problem.config.precheck == "off":
            return None
        if problem.trust == 0 and (problem.config.guard or problem.config.method == "posterior"):  # no answer would change
            return torch.zeros(len(crop), dtype=torch.bool, device=crop.device)
        if problem.config.precheck == "statistics" and calibration is not None:
            return calibration.distance(crop) > calibration.limit
        answers = [problem.task.decision(found, problem.denoiser) for found in (batch.before, batch.matched_outputs)]
        possible = problem.class_task.possible(batch.matched_outputs)
        confidence = batch.matched_outputs.masked_fill(~possible, -torch.inf).softmax(1).amax(1)
        moved = (batch.crop != crop).flatten(1).any(1)  # by the matching
        return (answers[0] != answers[1]).flatten(1).any(1) | moved & (confidence < SURE)

    def outputs(self, theta: Parameters, inputs: Tensor) -> Tensor:
        """Runs the model with the weights `theta` in place of its own."""
        with phase("classifier"):
            outputs: Tensor = self._forward(self.problem, theta, inputs)
        return outputs

    def plain_outputs(self, inputs: Tensor) -> Tensor:
        """Runs the source model."""
        return self._in_parts(functools.partial(self.outputs, {}), inputs)

    def _in_parts(self, run: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        """Runs the model on inputs [B, 3, H, W] that share its weights: all at once, or as many as memory has room for."""
        rows = len(inputs) if self.compiles else self._planner.model_rows(len(inputs))
        with self._planner.forwards(rows, "model"):
            parts = [run(part) for part in inputs.split(rows)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @torch.no_grad()
    def checked_outputs(self, inputs: Tensor, checks: Checks) -> Tensor:
        """Runs the source model, and checks that the task can use its outputs."""
        problem = self.problem
        with nullcontext() if self._ran else first_run(problem.model, inputs):
            outputs = self.plain_outputs(inputs)
        problem.task.check(outputs, problem.denoiser, problem.config, checks)
        _check_rows(outputs, inputs)
        if not self._ran:
            self._note(are_logits(problem.model, outputs))
            self._note(is_its_own(problem.model, functools.partial(step.forward, problem, {}), inputs, outputs))
        self._ran = True
        wrong = ~_complete(outputs)
        checks.require(~wrong.any(), lambda: f"model returns NaN or infinity for images {wrong.nonzero()[:, 0].tolist()[:10]} of the batch")
        return outputs

    @torch.no_grad()
    def has_outputs(self, crop: Tensor) -> Tensor:
        """Returns for which crops [B, 3, H, W] the source model gives usable outputs, [B] bool; checked_outputs() raises for the others."""
        batch = self.views(crop, Request(crop, torch.arange(len(crop), dtype=torch.int64, device=crop.device)))
        looks = [look for look in (batch.original, batch.matched) if look is not None]
        answers = [self.plain_outputs(look) for look in looks]
        for outputs in answers:
            _check_rows(outputs, crop)
        return torch.stack([_complete(outputs) for outputs in answers]).all(0)

    def encoded(self, batch: Batch) -> Batch:
        """Encodes the latents unless they were given."""
        return batch if batch.x0 is not None else batch._replace(x0=self.problem.denoiser.encode(batch.crop))

    def plan(self, inputs: Tensor, x0: Tensor, pairs: int) -> int:
        """Plans the schedule; returns how many images run at once. Raises ValueError if memory_budget is too small for one image."""
        self.schedule = self._planner.plan(self.problem, self.needs, inputs, x0, pairs)
        together = self.schedule.together or len(inputs)
        return together if self.problem.per_image else len(inputs)  # one update for all of them; the step itself splits them

    def parts(self, batch: Batch, request: Request) -> list[Batch]:
        """Splits a batch with latents into the images that run at once.

        Raises:
            ValueError: memory_budget is too small for one image, or with a deadline, for all of them at once.
        """
        config, count = self.problem.config, len(batch.image_ids)
        together = self.plan(batch.inputs, batch.x0, config.pairs if batch.timesteps is None else batch.timesteps.shape[2])
        if together < count and request.deadline is not None:
            bound, remedy = ("memory", "") if config.memory_budget is None else ("memory_budget", ", or a larger memory_budget")
            raise ValueError(
                f"images holds {len(request.images)}, and {bound} has room for {together} at once; deadline_ms takes a batch together: "
                f"give {together} images and fewer{remedy}"
            )
        return [batch.of(slice(first, first + together)) for first in range(0, count, together)]

    def begin(self, crop: Tensor, image_ids: Tensor, latents: Tensor | None = None) -> tuple[Any, Batch]:
        """Returns a new state and a batch that are ready for the first step, for as many of the crops [B, 3, H, W] as run at once."""
        batch = self.encoded(self.views(crop, Request(crop, image_ids, latents)))
        together = self.plan(batch.inputs, batch.x0, self.problem.config.pairs)
        return self.start(batch.of(slice(0, together)), None)

    @torch.no_grad()
    def start(self, batch: Batch, online: State | None) -> tuple[State | None, Batch]:
        """Returns a state that this call may modify (None for a training-free method), and the batch with its outputs before adaptation."""
        if self.problem.config.method != "adapt":
            return None, batch
        if online is not None:
            with phase("restore"):
                state = self.copied(online)  # steps write in place, and a failed call must leave no trace
            return state, _with_outputs(batch, functools.partial(self.forward, state))
        if batch.matched_outputs is None:
            batch = _with_outputs(batch, self.plain_outputs)
        problem, (theta, phi), images = self.problem, self.source(), len(batch.image_ids)
        with phase("restore"):
            held = self._storage.get(images == 1)
            kept = None if held is None else step.first_images(held, images, exactly=problem.config.optimizer == "adam8bit")
            if kept is None:
                del held  # before the new one is allocated
                self.forget_state(images == 1)
                kept = step.initial_state(problem, theta, phi, batch.matched_outputs)
                if problem.per_image:
                    self._storage[images == 1] = kept
            else:
                step.restore_(kept, theta, phi, batch.matched_outputs)
        if problem.per_image and images > 1:
            self._try_batching(kept, batch)
        return kept, batch

    def _try_batching(self, state: State, batch: Batch) -> None:
        """Tests whether vmap can batch the forward and backward passes of images with weights of their own; if not, they run one by one."""
        problem = self.problem
        if not problem.loop and "model" not in self._tried:
            fails = self._fails(problem.model, state.theta, lambda theta: step.forward(problem, theta, batch.inputs))
            self.problem = dataclasses.replace(self.problem, loop=fails)
            self._tried.add("model")
        if problem.batches_denoiser and not problem.denoiser.checkpointing and "denoiser" not in self._tried:
            conditions = problem.task.decision(batch.matched_outputs, problem.denoiser)[:, None]
            rows = tuple(
                x.repeat_interleave(2, dim=1)  # two rows: the strides of one do not say which memory format it has
                for x in (batch.x0[:, None].to(problem.denoiser.dtype), torch.zeros_like(batch.image_ids)[:, None], conditions)
            )

            def denoised(phi: Parameters) -> Tensor:
                return call(problem.denoiser, in_dtypes_of(problem.denoiser, phi), *rows, per_image=True)

            self.problem = dataclasses.replace(self.problem, denoiser_loop=self._fails(problem.denoiser, state.phi, denoised))
            self._tried.add("denoiser")

    @staticmethod
    @torch.enable_grad()
    def _fails(module: nn.Module, weights: Parameters, run: Callable[[Parameters], Tensor]) -> bool:
        """Returns whether run(weights) fails under vmap, forward or backward, with a warning that says why."""
        leaves = {name: p.detach().requires_grad_() for name, p in weights.items()}
        outer = sys.exc_info()[1]
        try:
            with refusing_kept_tensors(module):
                outputs = run(leaves)
                if outputs.requires_grad:
                    torch.autograd.grad(outputs, list(leaves.values()), torch.ones_like(outputs), allow_unused=True)
        except Exception as error:  # whatever a module raises under vmap
            if out_of_memory(error) or is_the_callers(error, outer):
                raise
            warn(f"images with weights of their own run one by one: vmap fails ({reason(error)})")
            return True
        return False

    def copied(self, online: State) -> State:
        """Copies an online state."""
        state: State = pytree.tree_map(torch.clone, online)
        return state

    def own(self, state: State) -> State:
        """Returns an online state that no later call writes to."""
        return state

    def gave_up(self) -> bool:
        """Returns whether recording failed, so that a program without it does as well."""
        return False

    def frees_memory(self) -> bool:
        """Gives up memory that a call does not need; returns whether there was any."""
        return False

    def forget_state(self, of_one: bool) -> None:
        """Frees the storage of states of one image, or of several."""
        self._storage.pop(of_one, None)

    def forget_states(self) -> None:
        """Frees the storage of all states."""
        for of_one in list(self._storage):
            self.forget_state(of_one)

    def step(self, state: State, batch: Batch, number: int) -> Tensor:
        """Updates the state in place; returns the loss [B] before the update."""
        tried = self._stepped or self.compiles
        with (
            phase("step (compiled)") if self.compile == "step" else nullcontext(),
            nullcontext() if tried else refusing_recomputation(self.problem.model),
        ):
            given = (batch.inputs, batch.x0, batch.image_ids, *batch.pairs_of(number))
            loss: Tensor = self._step(self.problem, self.schedule, state, *given)
        config = self.problem.config
        if not self._stepped and not config.weight_decay:
            self._note(have_moved(self.problem.model, state.theta, self.source()[0], config.parameters, config.lr))
        self._stepped = True
        return loss

    @torch.no_grad()
    def forward(self, state: State, inputs: Tensor) -> Tensor:
        """Returns the model's outputs [B, ...] under the state's weights."""
        run = functools.partial(self.outputs, state.theta)
        return run(inputs) if self.problem.per_image else self._in_parts(run, inputs)

    def finish(self, state: State, batch: Batch) -> Answers:
        return guard.compare(self.problem, batch.before, self.forward(state, batch.inputs), batch.matched_outputs)

    def losses(self, state: State, batch: Batch, answers: Answers, wanted: list[list[bool]]) -> list[Tensor]:
        assert answers.conditions is not None
        rows = self.schedule.guard_rows if self.problem.row_counts == "one" else sum(map(sum, wanted)) * self.guard
        with self._forwards(rows):
            given = (answers.conditions, batch.x0, batch.image_ids, state.step, wanted)
            return guard.selected_losses(self.problem, self.schedule, *given)

    def decide(self, batch: Batch, answers: Answers, losses: list[Tensor]) -> Decision:
        outputs, accepted = guard.decide(self.problem.config, answers, batch.before, losses, self.problem.trust)
        return Decision(outputs, accepted, self.predictions(outputs, batch), self.predictions(batch.before, batch))

    def predictions(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Returns the task's predictions for outputs [B, ...], at the size of the batch's crops."""
        return self.problem.task.predict(outputs, (batch.crop.shape[-2], batch.crop.shape[-1]))

    def source_outputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        before = self.checked_outputs(batch.original, Checks())
        return before, before if batch.matched is None else self.checked_outputs(batch.matched, Checks())

    def classified(self, batch: Batch, clock: Clock) -> Outcome:
        """Answers by a training-free method: there is no state, and every finite answer is accepted."""
        problem = self.problem
        with clock.phase("adapt"), self._forwards(self.schedule.guard_rows):
            scores = diffusion_classifier.class_scores(problem, self.schedule, batch.matched_outputs, batch.x0, batch.image_ids)
            if problem.config.method == "posterior":
                found = diffusion_classifier.posterior_logits(scores, batch.matched_outputs, problem.trust)
            else:
                found = diffusion_classifier.class_logits(scores, batch.x0).to(torch.promote_types(batch.before.dtype, torch.float32))
        accepted = usable(found, batch.before)
        standing = guard.unchanged(batch.before, batch.matched_outputs).standing
        outputs = where(accepted, found, standing.to(found.dtype))
        predictions = self.predictions(outputs, batch), self.predictions(batch.before, batch)
        loss = batch.x0.new_empty(len(outputs), 0)
        return Outcome(False, batch.before, outputs, *predictions, loss, accepted, scores.evaluations)

    def rehearse(self, state: State, batch: Batch) -> list[list[bool]]:
        """Runs the guard's forward passes with every row count that a GPU may encounter, so that its libraries plan for them."""
        problem, pairs, rows, images = self.problem, self.guard, self.schedule.guard_rows, len(batch.image_ids)
        if not pairs:
            return []
        if problem.row_counts == "few":
            conditions = problem.task.decision(batch.before, problem.denoiser)
            last = (guard.forward_rows(count, pairs, rows, "few")[-1] for count in range(1, 3 * images + 1))
            for count in sorted({max(1, found // pairs) for found in last}):
                which = torch.arange(count, dtype=torch.int64, device=batch.x0.device) % images
                with self._forwards(count * pairs):
                    given = (conditions[which], batch.x0[which], batch.image_ids[which])
                    guard.held_out_losses(problem, self.schedule, *given, state.step)
        return [[True] * images] * 2 + [[problem.config.match == "both"] * images]

    def _forwards(self, rows: int) -> Any:
        return self._planner.forwards(min(self.schedule.guard_rows, rows))


def _with_outputs(batch: Batch, run: Callable[[Tensor], Tensor]) -> Batch:
    """Adds the outputs that run() gives for the batch's inputs."""
    matched_outputs = run(batch.inputs)
    return batch._replace(before=matched_outputs if batch.matched is None else run(batch.original), matched_outputs=matched_outputs)


def _check_rows(outputs: Tensor, inputs: Tensor) -> None:
    if len(outputs) != len(inputs):
        raise ValueError(f"model returns {len(outputs)} rows for {len(inputs)} images; it has to return one for each")


def _complete(outputs: Tensor) -> Tensor:
    """Returns whether each image's outputs [B, ...] hold neither NaN nor +infinity, [B] bool. -infinity is a masked class."""
    return ~(outputs.isnan() | (outputs == torch.inf)).flatten(1).any(1)
