"""Measures, once per session, the memory in bytes that rows and images need."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dtta_fast import optimizers
from dtta_fast.runtime import memory

if TYPE_CHECKING:
    from dtta_fast.engine import Engine


class Needs:
    """Measures an engine's modules on the first inputs it receives; the engine creates a new instance when it copies its modules again."""

    def __init__(self) -> None:
        self._row: tuple[int, int | None] | None = None
        self._forward_row: int | None = None
        self._image: int | None = None

    @torch.no_grad()
    def of_forward_row(self, engine: Engine, inputs: Tensor, x0: Tensor) -> int:
        """Bytes per row of a forward pass without gradients; measured once."""
        if self._forward_row is None:
            denoiser = engine.problem.denoiser
            with torch.compiler.set_stance("force_eager"):  # no step runs at these sizes, so do not compile
                condition = engine.task.condition(engine.plain_outputs(inputs[:1]), denoiser, {}, engine.config)
                self._forward_row = memory.forward_bytes(denoiser, x0[:1], condition)
        return self._forward_row

    @torch.no_grad()
    def of_row(self, engine: Engine, inputs: Tensor, x0: Tensor) -> tuple[int, int | None]:
        """Bytes per row without and with activation checkpointing (None if the denoiser does not support it); measured once."""
        if self._row is None:
            denoiser = engine.problem.denoiser
            sizes: list[int | None] = []
            moving = list(engine.source()[1])
            with torch.compiler.set_stance("force_eager"):
                condition = engine.task.condition(engine.plain_outputs(inputs[:1]), denoiser, {}, engine.config)
                for checkpointing in (False, True):
                    possible = denoiser.can_checkpoint or not checkpointing
                    sizes.append(memory.row_bytes(denoiser, x0[:1], condition, moving, checkpointing) if possible else None)
            self._row = sizes[0] or 1, sizes[1]
        return self._row

    @torch.no_grad()
    def of_image(self, engine: Engine, inputs: Tensor) -> int:
        """Bytes per image; measured once.

        Counts the model's activations and, if each image has its own weights, these weights, their gradients, the optimizer state and one
        temporary of an update.
        """
        if self._image is None:
            theta, phi = engine.source()
            with torch.compiler.set_stance("force_eager"):
                self._image = sum(memory.saved_bytes(engine.problem.model, list(theta), inputs[:1])) if theta else 0
            if engine.problem.per_image:
                moving = [torch.empty_like(p, dtype=torch.float32, device="meta") for own in (theta, phi) for p in own.values()]
                kept = optimizers.init_slots(engine.config.optimizer, moving)
                self._image += sum(3 * p.nbytes for p in moving) + sum(slot.nbytes for slots in kept for slot in slots)
        return self._image
