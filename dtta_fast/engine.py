"""Runs the steps of a session: private modules, compiled parts, fixed state storage, and recovery when one of them fails."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dtta_fast import adam8bit, diffusion_classifier, lora, optimizers, step
from dtta_fast.config import AdaptConfig
from dtta_fast.denoisers.base import Denoiser
from dtta_fast.draws import cumulative_density
from dtta_fast.inputs import Checks
from dtta_fast.needs import Needs
from dtta_fast.parameters import Parameters, select
from dtta_fast.runtime import compiling, memory
from dtta_fast.runtime.phases import phase
from dtta_fast.runtime.precision import private_denoiser, products
from dtta_fast.runtime.private import PrivateCopy
from dtta_fast.runtime.reads import read_one
from dtta_fast.runtime.streams import StreamOrder
from dtta_fast.runtime.trial import (
    refusing_kept_tensors,
    refusing_recomputation,
    warn_of_weights_elsewhere,
    warning_of_random_numbers,
)
from dtta_fast.step import Problem, State
from dtta_fast.tasks.base import Task


def anchor(model: nn.Module) -> Tensor:
    """Returns a tensor with the model's device and dtype."""
    return next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0, dtype=torch.float32, device="cpu"))


class Engine:
    """The operations Adapter calls for each batch: refresh, plan, start, step, forward, guard.

    failed() handles an exception and decides whether to retry.
    """

    def __init__(self, model: nn.Module, denoiser: Denoiser, task: Task, config: AdaptConfig) -> None:
        if config.optimizer == "adam8bit":
            adam8bit.require()
        self.model, self.denoiser, self.task, self.config = model, denoiser, task, config
        self._compile = config.compile
        self._loop = False  # vmap is known to fail on these modules
        self._order = StreamOrder()
        self._limits = {"step": memory.Limit(), "guard": memory.Limit()}  # rows that run at once, after running out of memory
        self._running, self._at_once = "step", 1  # which of the two is running, and on how many rows
        self._least = 1  # rows of one pair of one image, the minimum for any plan of a step
        self._build()
        # determined once: a GPU's free memory changes from call to call, but the chunk should not
        self._budget = config.memory_budget or memory.default_budget(self.device)

    @torch.inference_mode(False)
    def _build(self) -> None:
        """Makes private copies of the modules as they are now, and compiles parts of them."""
        config = self.config
        self._stale = True  # until everything is built
        self.device = anchor(self.model).device
        self._batched = False  # vmap is known to work on these modules
        self._ran = self._stepped = False  # the first run's checks are done
        self._needs = Needs()
        # one for a single image, one for several: their weights have different layouts, and so round differently
        self._storage: dict[bool, State] = {}
        self._model = PrivateCopy(self.model)
        self._denoiser = private_denoiser(self.denoiser, config.precision, self.device)
        denoiser: Any = self._denoiser.module
        if config.parameters == "lora":
            lora.attach(self._model.module, config.lora_rank, config.lora_targets, "model", config.seed)
        if config.denoiser_parameters == "lora":
            lora.attach(denoiser.network_to_adapt(), config.lora_rank, config.lora_targets, "denoiser", config.seed)
        lr, denoiser_lr = (optimizers.rate(value, self.device) for value in (config.lr, config.denoiser_lr))
        self.problem = Problem(
            self._model.module, denoiser, self.task, config, lr, denoiser_lr, loop=self._loop, cumulative=self._cumulative(self.device)
        )
        self._step, self._forward = step.adaptation_step, step.forward
        self._compile_parts(denoiser)
        warn_of_weights_elsewhere(self._model.module)
        self._model.seal()
        self._denoiser.seal()
        self._stale = False

    def _cumulative(self, device: torch.device) -> Tensor | None:
        """Returns the timesteps' cumulative density if they are calibrated."""
        calibration, config = self.denoiser.calibration, self.config
        if config.timesteps != "calibrated" or calibration is None:
            return None
        rows = len(self.denoiser.process)
        return cumulative_density(calibration.density(rows), *(config.timestep_range or (0, rows))).to(device)

    def _compile_parts(self, denoiser: Denoiser) -> None:
        if self._compile == "off":
            if self.device.type == "cuda":
                self.problem = dataclasses.replace(self.problem, row_counts="few")
            return
        compiling.compile_regions(denoiser.regions())
        self._forward = compiling.compiled(step.forward)
        if self._compile == "step":
            self._step = compiling.compiled(step.adaptation_step)
            self.problem = dataclasses.replace(self.problem, row_counts="one")
        else:
            self.problem = dataclasses.replace(self.problem, row_counts="one", forward=self._forward)

    @contextmanager
    def context(self) -> Iterator[None]:
        """Sets up the context in which a call runs.

        A call returns while its last kernels are still queued, and the next call may use another stream.
        """
        with (
            self._order.within(self.device) as moved,
            products(self.config.precision, self.device),
            nullcontext() if self._compile == "off" else compiling.tracing(),
        ):
            if moved:
                self._storage.clear()  # its memory belongs to the other stream, which may reuse it once it is freed
            yield

    def rebuild(self) -> None:
        """Makes the next refresh() rebuild the private copies."""
        self._stale = True

    def check_copies(self) -> None:
        """Makes the next refresh() rebuild the private copies if an interrupted call has left its own weights in them."""
        self._stale = self._stale or not (self._model.is_intact() and self._denoiser.is_intact())

    def check_sources(self) -> None:
        """Checks that the caller's modules are unchanged since refresh().

        Raises:
            RuntimeError: a forward pass wrote to one of them. Their buffers have been restored.
        """
        if not self._stale:
            self._model.check_source()
            self._denoiser.check_source()

    def recast(self) -> None:
        """Makes the next refresh() cast all of the denoiser's weights again."""
        self._denoiser.recast()

    def refresh(self) -> None:
        """Updates the private copies with what the caller has written into the modules since the last call."""
        with torch.no_grad(), phase("restore"):
            self._running, self._at_once, self._least = "step", 1, 1  # for this attempt: before it has a plan, fewer rows would not help
            if self._stale or not (self._model.refresh() and self._denoiser.refresh()):
                self._build()

    def failed(self, error: BaseException) -> bool:
        """Returns whether another attempt may succeed. The next refresh() rebuilds anything the failed call may have left half done."""
        if not isinstance(error, Exception):
            self._stale = True
        self.check_copies()  # a signal handler may raise anything, even while weights are swapped
        if self._compile != "off" and compiling.is_failure(error) and os.environ.get("DTTA_FAST_STRICT") != "1":
            reason = str(error).strip().splitlines()[0]
            warnings.warn(f"compile is {self._compile!r}, and the compilation failed: {reason} Going on in eager mode", stacklevel=4)
            self._compile, self._stale = "off", True
            return True
        least = self._least if self._running == "step" else 1
        if memory.out_of_memory(error) and self._at_once > least:
            rows = max(least, self._at_once // 2)
            self._limits[self._running].lower(rows)
            self._storage.clear()  # it was allocated for all of the images
            if self._running == "step":
                self._limits["guard"].lower(2 * rows)  # a row needs less memory there, but memory is short
            self._at_once = 1
            return True
        return False

    def succeeded(self) -> None:
        """Records a call that had enough memory; after several of them the engine tries more rows again."""
        for limit in self._limits.values():
            limit.raise_after_successes()

    def source(self) -> tuple[Parameters, Parameters]:
        """Returns the caller's weights to adapt: the model's and the denoiser's."""
        config, phi = self.config, Parameters()
        # new adapters exist only in the private copy, which shares memory with the adapters the module already had
        theta = select(self.problem.model if config.parameters == "lora" else self.model, config.parameters)
        if config.denoiser_parameters == "lora":
            phi = select(self.problem.denoiser, "lora")
        elif config.denoiser_parameters == "all":
            own = dict(self.denoiser.named_parameters())
            phi = {name: own[name] for name in self.denoiser.adaptable()}
        return theta, phi

    def plan(self, inputs: Tensor, x0: Tensor, pairs: int) -> int:
        """Fits the step to the memory budget; returns how many images run at once.

        Raises:
            ValueError: the budget is too small for one pair of one image.
        """
        config, together = self.config, len(inputs)
        forwards = self.problem.forwards()
        # a denoiser with separate weights for each image runs image by image
        abreast = 1 if self.problem.per_image and config.denoiser_parameters != "frozen" else together
        rows, checkpoint = memory.ROWS_AT_ONCE if config.chunk == "auto" else config.chunk * abreast * forwards, False
        if self._budget is not None:
            most = pairs if config.chunk == "auto" else min(pairs, config.chunk)
            image, (row, checkpointed) = self._needs.of_image(self, inputs), self._needs.of_row(self, inputs, x0)
            sizes = (row * forwards, image, None if checkpointed is None else checkpointed * forwards)
            rows, together, checkpoint = memory.plan(self._budget, together, most, *sizes)
            rows *= forwards
            if config.chunk == "auto" and self.device.type == "cuda":  # more rows cost memory without any gain
                rows = min(rows, max(memory.ROWS_AT_ONCE, forwards * together))
        rows = self._limits["step"].of(rows)
        together = min(max(1, rows // forwards), together)
        abreast = min(abreast, together)
        fitting = max(1, rows // (abreast * forwards))
        chunk = fitting if config.chunk == "auto" else min(config.chunk, fitting)
        self._at_once, self._least = abreast * forwards * min(chunk, pairs), forwards
        self.problem.denoiser.checkpointing = checkpoint
        guard_rows = self._guard_rows(inputs, x0, together)
        self.problem = dataclasses.replace(self.problem, chunk=chunk, together=together, guard_rows=guard_rows)
        return together

    def _guard_rows(self, inputs: Tensor, x0: Tensor, together: int) -> int:
        """Returns how many rows a forward pass without gradients runs at once, for `together` images."""
        config = self.config
        rows = memory.GUARD_ROWS.get(self.device.type, memory.ROWS_AT_ONCE)
        if config.chunk != "auto":
            rows = min(rows, config.chunk * together)
        if self._budget is not None:
            rows = min(rows, max(1, self._budget // self._needs.of_forward_row(self, inputs, x0)))
        rows = self._limits["guard"].of(rows)
        if config.method == "adapt" and self.problem.row_counts == "one":
            # one shape is compiled: the rows of two answers per image, or of as many as fit
            rows = min(rows // config.guard, 2 * together) * config.guard if rows >= config.guard > 0 else rows
        return rows

    def plain_outputs(self, inputs: Tensor) -> Tensor:
        """Runs the source model."""
        with phase("classifier"):
            outputs: Tensor = self._forward(self.problem, {}, inputs)
        return outputs

    @torch.no_grad()
    def source_outputs(self, inputs: Tensor, checks: Checks) -> Tensor:
        """Runs the source model, and checks that the task can use its outputs."""
        with nullcontext() if self._ran else warning_of_random_numbers(self.problem.model, self.device):
            outputs = self.plain_outputs(inputs)
        self._ran = True
        self.task.check(outputs, self.problem.denoiser, self.config, checks)
        if len(outputs) != len(inputs):
            raise ValueError(f"model returns {len(outputs)} rows for {len(inputs)} images; it has to return one for each")
        wrong = (outputs.isnan() | (outputs == torch.inf)).flatten(1).any(1)
        checks.require(~wrong.any(), lambda: f"model returns NaN or infinity for images {wrong.nonzero()[:, 0].tolist()[:10]} of the batch")
        return outputs

    @torch.no_grad()
    def asked(self, before: Tensor, start: Tensor, crop: Tensor) -> Tensor:
        """Returns which images [B] the pre-check selects for adaptation.

        before, start: the source model's outputs for the original and the matched images. crop: [B, 3, H, W] in [0, 1].
        """
        calibration = self.denoiser.calibration
        if self.config.precheck == "statistics" and calibration is not None:
            return calibration.distance(crop) > calibration.limit
        answers = [self.task.decision(found, self.problem.denoiser) for found in (before, start)]
        return (answers[0] != answers[1]).flatten(1).any(1)

    def whole_batches(self) -> bool:
        """Returns whether steps run on whole batches because code is compiled for their size."""
        return self._compile != "off"

    @torch.no_grad()
    def start(self, inputs: Tensor, online: State | None, source: Tensor | None = None) -> tuple[State, Tensor]:
        """Returns a state that this call may modify, and the outputs before adaptation.

        source: the source model's outputs for these inputs, if they are known.
        """
        if online is not None:
            with phase("restore"):
                state: State = pytree.tree_map(torch.clone, online)  # steps write in place, and a failed call must leave no trace
            return state, self.forward(state, inputs)
        problem, (theta, phi) = self.problem, self.source()
        outputs = self.plain_outputs(inputs) if source is None else source
        images = len(inputs)
        with phase("restore"):
            held = self._storage.get(images == 1)
            kept = None if held is None else step.first_images(held, images, exactly=self.config.optimizer == "adam8bit")
            if kept is None:
                held = self._storage.pop(images == 1, None)
                del held  # free it before the new one is allocated
                kept = step.initial_state(problem, theta, phi, outputs)
                if problem.per_image:
                    self._storage[images == 1] = kept
            else:
                step.restore_(kept, theta, phi, outputs)
        if problem.per_image and images > 1 and not (self._loop or self._batched):
            self._try_batching(kept, inputs)
        return kept, outputs

    @torch.enable_grad()
    def _try_batching(self, state: State, inputs: Tensor) -> None:
        """Tests whether vmap can batch the model's forward and backward passes; if it cannot, images run one by one."""
        theta = {name: p.detach().requires_grad_() for name, p in state.theta.items()}
        try:
            with refusing_kept_tensors(self.problem.model):
                outputs = step.forward(self.problem, theta, inputs)
                if outputs.requires_grad:
                    torch.autograd.grad(outputs, list(theta.values()), torch.ones_like(outputs), allow_unused=True)
            self._batched = True
        except Exception as error:  # whatever a module raises under vmap
            if memory.out_of_memory(error) or isinstance(error, OSError):  # a TimeoutError belongs to the caller
                raise
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            warnings.warn(f"images with weights of their own run one by one: vmap fails ({reason})", stacklevel=5)
            self._loop = True
            self.problem = dataclasses.replace(self.problem, loop=True)

    def step(self, state: State, *inputs: Tensor | None) -> Tensor:
        """Updates the state in place; returns the loss [B] before the update."""
        tried = self._stepped or self._compile != "off"
        with (
            phase("step (compiled)") if self._compile == "step" else nullcontext(),
            nullcontext() if tried else refusing_recomputation(self.problem.model),
        ):
            loss: Tensor = self._step(self.problem, state, *inputs)  # type: ignore[arg-type]
        self._stepped = True
        return loss

    @torch.no_grad()
    def forward(self, state: State, inputs: Tensor) -> Tensor:
        """Returns the model's outputs [B, ...] under the state's weights."""
        with phase("classifier"):
            outputs: Tensor = self._forward(self.problem, state.theta, inputs)
        return outputs

    def guard(
        self,
        before: Tensor,
        candidates: list[Tensor],
        x0: Tensor,
        image_ids: Tensor,
        step_number: Tensor,
        read: Callable[[Tensor], list[list[bool]]] = read_one,
        in_time: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Runs step.guard: returns the accepted outputs, whether each comes from a candidate, and the denoiser evaluations."""
        with self._forwards(3 * len(x0) * max(1, self.config.guard)):
            return step.guard(self.problem, before, candidates, x0, image_ids, step_number, read, in_time)

    @contextmanager
    def _forwards(self, rows: int) -> Iterator[None]:
        """Records that forward passes without gradients run, on `rows` rows in total, so that running out of memory lowers their limit.
        If that happens, the record is left in place for failed() to read."""
        before = self._running, self._at_once
        self._running, self._at_once = "guard", min(self.problem.guard_rows, rows)
        yield
        self._running, self._at_once = before

    def classify(self, outputs: Tensor, x0: Tensor, image_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the answers [B, K] of the training-free methods, and the denoiser evaluations [B]."""
        with self._forwards(self.problem.guard_rows):
            found, evaluations = diffusion_classifier.classify(self.problem, outputs, x0, image_ids)
        if self.config.method == "ensemble":
            found = diffusion_classifier.mean_probability(outputs, found)
        return found, evaluations

    def warm_guard(self, outputs: Tensor, x0: Tensor, image_ids: Tensor, at: Tensor) -> None:
        """Runs the guard's forward passes with every row count that a GPU may encounter, so that its libraries plan for them."""
        problem = self.problem
        if self.config.guard and problem.row_counts == "few":
            decision, pairs = self.task.decision(outputs, problem.denoiser), self.config.guard
            last = (step.guard_forwards(images, pairs, problem.guard_rows, "few")[-1] for images in range(1, 3 * len(x0) + 1))
            counts = {max(1, rows // pairs) for rows in last}
            for images in sorted(counts):
                rows = torch.arange(images, dtype=torch.int64, device=x0.device) % len(x0)
                with self._forwards(images * pairs):
                    step.held_out_losses(problem, decision[rows], x0[rows], image_ids[rows], at)

    def run_guard(self, outputs: Tensor, x0: Tensor, image_ids: Tensor, at: Tensor) -> None:
        """Runs the guard's forward passes for the maximum number of answers, whether or not an answer changed, so that they are timed."""
        if self.config.guard:
            decision = self.task.decision(outputs, self.problem.denoiser)
            rows = torch.arange(len(x0), dtype=torch.int64, device=x0.device).repeat_interleave(3 if self.config.match == "both" else 2)
            with self._forwards(len(rows) * self.config.guard):
                step.held_out_losses(self.problem, decision[rows], x0[rows], image_ids[rows], at)

    @torch.no_grad()
    def finite(self, state: State) -> Tensor:
        """Returns whether all of a state's numbers are finite, as a 0-dim bool tensor."""
        numbers = [tensor for tensor in pytree.tree_leaves(state) if tensor.is_floating_point() and tensor.numel()]
        return torch.stack(list(torch._foreach_norm(numbers, torch.inf))).isfinite().all()
