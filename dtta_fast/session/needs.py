"""Measures, once per session, the memory in bytes that rows and images need."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dtta_fast.core import optimizers
from dtta_fast.core.problem import Problem
from dtta_fast.core.weights import Parameters
from dtta_fast.session import memory


class Needs:
    """Measures the modules of a program on the first inputs it receives."""

    def __init__(
        self, problem: Problem, source: Callable[[], tuple[Parameters, Parameters]], plain_outputs: Callable[[Tensor], Tensor]
    ) -> None:
        self._problem, self._source, self._plain_outputs = problem, source, plain_outputs
        self._row: tuple[int, int | None] | None = None
        self._forward_row: int | None = None
        self._image: int | None = None

    @torch.no_grad()
    def of_forward_row(self, inputs: Tensor, x0: Tensor) -> int:
        """Bytes per row of a forward pass without gradients; measured once."""
        if self._forward_row is None:
            denoiser = self._problem.denoiser
            with torch.compiler.set_stance("force_eager"):  # no step runs at these sizes, so do not compile
                condition = self._problem.task.condition(self._plain_outputs(inputs[:1]), denoiser, {}, self._problem.config)
                self._forward_row = memory.forward_bytes(denoiser, x0[:1], condition)
        return self._forward_row

    @torch.no_grad()
    def of_row(self, inputs: Tensor, x0: Tensor) -> tuple[int, int | None]:
        """Bytes per row without and with activation checkpointing (None if the denoiser does not support it); measured once."""
        if self._row is None:
            denoiser = self._problem.denoiser
            sizes: list[int | None] = []
            moving = list(self._source()[1])
            with torch.compiler.set_stance("force_eager"):
                condition = self._problem.task.condition(self._plain_outputs(inputs[:1]), denoiser, {}, self._problem.config)
                for checkpointing in (False, True):
                    possible = denoiser.can_checkpoint or not checkpointing
                    sizes.append(memory.row_bytes(denoiser, x0[:1], condition, moving, checkpointing) if possible else None)
            self._row = sizes[0] or 1, sizes[1]
        return self._row

    @torch.no_grad()
    def of_image(self, inputs: Tensor) -> int:
        """Bytes per image; measured once.

        Counts the model's activations and, if each image has its own weights, these weights, their gradients, the optimizer state and one
        temporary of an update.
        """
        if self._image is None:
            theta, phi = self._source()
            with torch.compiler.set_stance("force_eager"):
                self._image = sum(memory.saved_bytes(self._problem.model, list(theta), inputs[:1])) if theta else 0
            if self._problem.per_image:
                moving = [torch.empty_like(p, dtype=torch.float32, device="meta") for own in (theta, phi) for p in own.values()]
                kept = optimizers.init_slots(self._problem.config.optimizer, moving)
                self._image += sum(3 * p.nbytes for p in moving) + sum(slot.nbytes for slots in kept for slot in slots)
        return self._image
