"""Measures the memory in bytes that rows of the denoiser and images need."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dtta_fast.core import optimizers
from dtta_fast.core.problem import Problem
from dtta_fast.core.weights import Parameters
from dtta_fast.denoisers.base import Denoiser

TRANSIENT = 3  # tensors of the largest size that are alive in addition to the saved ones while an operator runs, forward or backward


def row_bytes(denoiser: Denoiser, x0: Tensor, condition: Tensor, moving: Collection[str], checkpointing: bool) -> int:
    """Measures the bytes needed for one more row: its saved activations, from runs with one and two rows, plus TRANSIENT times the largest.

    x0 [1, C, h, w], condition [1, ...]. moving: names of the denoiser weights that adapt; their gradients need activations too.
    """
    kept = {}
    for whether in {False, checkpointing}:
        (total, largest), (total2, largest2) = (_saved(denoiser, x0, condition, moving, rows, whether) for rows in (1, 2))
        kept[whether] = total2 - total + TRANSIENT * (largest2 - largest)
    # a checkpointed denoiser holds one region's activations again while that region's backward runs
    again = kept[False] // len(denoiser.regions()) if checkpointing else 0
    # x_t, the prediction and its gradient
    return max(1, kept[checkpointing] + again + 4 * x0[0].numel() * x0.dtype.itemsize)


def _saved(denoiser: Denoiser, x0: Tensor, condition: Tensor, moving: Collection[str], rows: int, checkpointing: bool) -> tuple[int, int]:
    x_t = x0.to(denoiser.dtype).repeat(rows, *(1,) * (x0.ndim - 1))  # a copy: some denoisers write to their input
    timesteps = torch.zeros(rows, dtype=torch.int64, device=x0.device)
    leaf = condition.detach().clone().requires_grad_()
    before, denoiser.checkpointing = denoiser.checkpointing, checkpointing
    try:
        return saved_bytes(denoiser, moving, x_t, timesteps, leaf.expand(rows, *leaf.shape[1:]))
    finally:
        denoiser.checkpointing = before


def saved_bytes(module: nn.Module, moving: Collection[str], *inputs: Tensor) -> tuple[int, int]:
    """Returns the bytes of all activations that module(*inputs) saves for a backward to its weights `moving`, and of the largest one.

    The module gets copies of its buffers, which some modules write to.
    """
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    constants = {p.untyped_storage()._cdata for p in (*module.parameters(), *buffers.values())}
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []  # held as long as autograd would hold them; otherwise two tensors at one address would count once

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in constants:
            sizes[storage._cdata] = storage.nbytes()
            alive.append(tensor.detach())
        return tensor.detach()  # an output held by its own node would keep the graph alive forever

    own = dict(module.named_parameters())
    weights = {name: own[name].detach().requires_grad_() for name in moving}
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        functional_call(module, {**buffers, **weights}, inputs, tie_weights=False)
    return sum(sizes.values()), max(sizes.values(), default=0)


def forward_bytes(denoiser: Denoiser, x0: Tensor, condition: Tensor) -> int:
    """Measures the peak bytes needed for one more row in a forward without gradient, from runs with one and two rows.

    x0 [1, C, h, w], condition [1, ...].
    """
    peaks = []
    for rows in (1, 2):
        x_t = x0.to(denoiser.dtype).repeat(rows, *(1,) * (x0.ndim - 1))
        timesteps = torch.zeros(rows, dtype=torch.int64, device=x0.device)
        buffers = {name: buffer.clone() for name, buffer in denoiser.named_buffers()}
        with torch.no_grad(), _LiveBytes() as alive:
            functional_call(denoiser, buffers, (x_t, timesteps, condition.expand(rows, *condition.shape[1:])), tie_weights=False)
        peaks.append(alive.peak)
    return max(1, peaks[1] - peaks[0] + 2 * x0[0].numel() * x0.dtype.itemsize)  # x_t and its noise


class _LiveBytes(TorchDispatchMode):
    """Tracks the memory of operator outputs for as long as they are referenced. Memory that a kernel uses internally is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, int] = {}
        self._now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self._alive:
                    self._alive[storage._cdata] = storage.nbytes()
                    self._now += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage._cdata)
        self.peak = max(self.peak, self._now)
        return out

    def _freed(self, storage: int) -> None:
        self._now -= self._alive.pop(storage, 0)


class Needs:
    """Measures the modules of a program on the first inputs it receives."""

    def __init__(self, problem: Problem, source: Callable[[], tuple[Parameters, Parameters]], forward: Callable[..., Tensor]) -> None:
        self._problem, self._source, self._forward = problem, source, forward
        self._row: tuple[int, int | None] | None = None
        self._forward_row: int | None = None
        self._image: int | None = None

    @torch.no_grad()
    def of_forward_row(self, inputs: Tensor, x0: Tensor) -> int:
        """Bytes per row of a forward pass without gradients; measured once."""
        if self._forward_row is None:
            denoiser = self._problem.denoiser
            with torch.compiler.set_stance("force_eager"):  # no step runs at these sizes, so do not compile
                condition = self._problem.task.condition(self._forward(self._problem, {}, inputs[:1]), denoiser, {}, self._problem.config)
                self._forward_row = forward_bytes(denoiser, x0[:1], condition)
        return self._forward_row

    @torch.no_grad()
    def of_row(self, inputs: Tensor, x0: Tensor) -> tuple[int, int | None]:
        """Bytes per row without and with activation checkpointing (None if the denoiser does not support it); measured once."""
        if self._row is None:
            denoiser = self._problem.denoiser
            sizes: list[int | None] = []
            moving = list(self._source()[1])
            with torch.compiler.set_stance("force_eager"):
                condition = self._problem.task.condition(self._forward(self._problem, {}, inputs[:1]), denoiser, {}, self._problem.config)
                for checkpointing in (False, True):
                    possible = denoiser.can_checkpoint or not checkpointing
                    sizes.append(row_bytes(denoiser, x0[:1], condition, moving, checkpointing) if possible else None)
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
                self._image = sum(saved_bytes(self._problem.model, list(theta), inputs[:1].clone())) if theta else 0
            if self._problem.per_image:
                moving = [torch.empty_like(p, dtype=torch.float32, device="meta") for own in (theta, phi) for p in own.values()]
                kept = optimizers.init_slots(self._problem.config.optimizer, moving)
                self._image += sum(3 * p.nbytes for p in moving) + sum(slot.nbytes for slots in kept for slot in slots)
        return self._image
