"""Makes the private modules of a session, keeps them up to date, and recovers when memory or a compilation fails."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dtta_fast.config import AdaptConfig
from dtta_fast.core import adam8bit, lora, optimizers
from dtta_fast.core.draws import cumulative_density
from dtta_fast.core.problem import Problem
from dtta_fast.core.weights import anchor
from dtta_fast.denoisers.base import Denoiser
from dtta_fast.runtime import compiling, graphs
from dtta_fast.runtime.attention import math_attention
from dtta_fast.runtime.clock import Paces
from dtta_fast.runtime.failures import out_of_memory, reason
from dtta_fast.runtime.float32 import float32_products
from dtta_fast.runtime.phases import phase
from dtta_fast.runtime.private import PrivateCopy
from dtta_fast.runtime.streams import StreamOrder
from dtta_fast.runtime.torch_state import TorchState, interrupt_behind
from dtta_fast.runtime.trial import warn_of_weights_elsewhere
from dtta_fast.runtime.warn import warn
from dtta_fast.session.planning import Planner
from dtta_fast.session.precision import private_denoiser, products
from dtta_fast.session.program import ModuleProgram
from dtta_fast.session.recorded import RecordedProgram
from dtta_fast.tasks.base import Task

ATTEMPTS = 20  # running out of memory halves the chunk, a failed compilation falls back to eager mode; neither retries forever


class Attempt(NamedTuple):
    """An attempt at a call: how many failed before, torch's state at its start, and the exception that the caller is handling."""

    number: int
    torch_state: TorchState
    outer: BaseException | None


class Engine:
    """The modules of a session, and what happens around an attempt at a call.

    Attributes:
        program: runs the calls on the private modules; a new one after each time they were copied.
        paces: how long the parts of a call took.
    """

    program: ModuleProgram

    def __init__(self, model: nn.Module, denoiser: Denoiser, task: Task, config: AdaptConfig) -> None:
        if config.optimizer == "adam8bit":
            adam8bit.require()
        self.model, self.denoiser, self.task, self.config = model, denoiser, task, config
        self.paces = Paces()
        self._compile = config.compile
        self._order = StreamOrder()
        self._planner = Planner(config)
        self._build(loop=False)
        self._planner.measure(self.device)  # after the private copies were made, which take memory too

    @torch.inference_mode(False)
    def _build(self, loop: bool) -> None:
        """Makes private copies of the modules as they are now, and compiles parts of them. loop: vmap is known to fail on them."""
        config = self.config
        self._stale = True  # until everything is built
        if "program" in vars(self):
            self.program.forget_states()  # before the copies are made, which take memory too
            if self.program.gave_up():
                self._compile = "regional" if self.program.compiles else "off"
        self.device = anchor(self.model).device
        self._model = PrivateCopy(self.model)
        self._denoiser = private_denoiser(self.denoiser, config.precision, self.device, config.denoiser_parameters == "frozen")
        denoiser: Any = self._denoiser.module
        if config.parameters == "lora":
            lora.attach(self._model.module, config.lora_rank, config.lora_targets, "model", config.seed)
        if config.denoiser_parameters == "lora":
            lora.attach(denoiser.network_to_adapt(), config.lora_rank, config.lora_targets, "denoiser", config.seed)
        lr, denoiser_lr = (optimizers.rate(value, self.device) for value in (config.lr, config.denoiser_lr))
        calibration = self.denoiser.calibration
        problem = Problem(
            self._model.module,
            denoiser,
            self.task,
            config,
            lr,
            denoiser_lr,
            loop=loop,
            cumulative=self._cumulative(self.device),
            trust=1.0 if calibration is None else calibration.trust,
        )
        kind = RecordedProgram if "graphs" in self._compile and graphs.there_are_on(self.device) else ModuleProgram
        self.program = kind(problem, self.model, self.denoiser, self._planner, self._compile)
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

    def attempt(self, number: int = 0) -> Attempt:
        """Starts an attempt at a call; number: how many have failed."""
        return Attempt(number, TorchState.now(), sys.exc_info()[1])

    def ended(self) -> None:
        """Ends a call that succeeded.

        Raises:
            RuntimeError: a forward pass wrote to one of the caller's modules. Their buffers have been restored.
        """
        self._check_sources()
        self._planner.succeeded()

    def recovers(self, error: BaseException, attempt: Attempt) -> bool:
        """Cleans up after a failed attempt; returns whether another one may succeed, since less memory or eager mode may help."""
        attempt.torch_state.restore()  # Ctrl-C, too, leaves our tensors in the private modules
        math_attention.leave()
        float32_products.leave()
        with suppress(RuntimeError):  # the original error is more informative
            self._check_sources()
        interrupt = interrupt_behind(error, attempt.outer)
        again = self._failed(error if interrupt is None else interrupt, attempt.number)
        if again or interrupt is not None:
            self.paces.clear()  # later runs take a different time
        try:
            if interrupt is not None and interrupt is not error:
                raise interrupt from None
        finally:
            del interrupt, error  # a frame that its own exception holds would keep the call's tensors until a collection
        return again and attempt.number + 1 < ATTEMPTS

    @contextmanager
    def context(self) -> Iterator[None]:
        """Sets up the context in which a call runs: gradients on, and the private copies up to date.

        A call returns while its last kernels are still queued, and the next call may use another stream.
        """
        with (
            torch.enable_grad(),
            torch.autocast(self.device.type, enabled=False),
            self._order.within(self.device) as moved,
            products(self.config.precision, self.device),
            compiling.tracing() if self.program.compiles else nullcontext(),
        ):
            if moved:
                self.program.forget_states()  # their memory belongs to the other stream, which may reuse it once it is freed
            self.refresh()
            yield

    def refresh(self) -> None:
        """Updates the private copies with what the caller has written into the modules since the last call."""
        with torch.no_grad(), phase("restore"):
            self._planner.begin()
            if self._stale or not (self._model.refresh() and self._denoiser.refresh()):
                self._build(loop=self.program.problem.loop)

    def rebuild(self) -> None:
        """Makes the next refresh() copy the modules again."""
        self._stale = True

    def check_copies(self) -> None:
        """Makes the next refresh() copy the modules again if an interrupted call has left its own weights in them."""
        self._stale = self._stale or not (self._model.is_intact() and self._denoiser.is_intact())

    def recast(self) -> None:
        """Makes the next refresh() cast all of the denoiser's weights again."""
        self._denoiser.recast()

    def _check_sources(self) -> None:
        """Checks that the caller's modules are unchanged since refresh().

        Raises:
            RuntimeError: a forward pass wrote to one of them. Their buffers have been restored.
        """
        if not self._stale:
            self._model.check_source()
            self._denoiser.check_source()

    def _failed(self, error: BaseException, number: int) -> bool:
        """Returns whether another attempt may succeed. The next refresh() copies anew what the failed call may have left half done."""
        if not isinstance(error, Exception):
            self._stale = True
        self.check_copies()  # a signal handler may raise anything, even while weights are swapped
        if self.program.compiles and compiling.is_failure(error) and os.environ.get("DTTA_FAST_STRICT") != "1":
            warn(f"compile is {self._compile!r}, and the compilation failed: {reason(error)} Going on in eager mode")
            self._compile, self._stale = "graphs" if self._compile == "regional+graphs" else "off", True
            return True
        if number == 0 and out_of_memory(error) and self.program.frees_memory():
            return True
        if self._planner.shrink(error):
            self.program.forget_states()  # they were allocated for all of the images
            return True
        return False
