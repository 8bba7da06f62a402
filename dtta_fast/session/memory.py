"""Decides how many pairs run at once: measures the memory that a denoiser row keeps for its backward and compares it with a budget."""

from __future__ import annotations

import weakref
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dtta_fast.denoisers.base import Denoiser

ROWS_AT_ONCE = 64  # rows per denoiser forward without a budget; more did not run faster
GUARD_ROWS = {"cpu": ROWS_AT_ONCE, "cuda": 256}  # the same for a forward without gradient, by device
TRANSIENT = 3  # tensors of the largest size that are alive in addition to the saved ones while an operator runs, forward or backward


class Plan(NamedTuple):
    """rows: simultaneous denoiser rows. images: simultaneous images. checkpoint: whether activations are recomputed in the backward."""

    rows: int
    images: int
    checkpoint: bool = False


class Limit:
    """Limits the rows that run at once after memory has run out.

    The limit doubles after a number of successful calls, since the memory may have been freed. Each time memory runs out again, it waits
    for twice as many calls.
    """

    def __init__(self) -> None:
        self._rows: int | None = None
        self._wanted, self._successes, self._patience = 0, 0, 8

    def of(self, rows: int) -> int:
        """Returns how many of the `rows` in the plan may run at once."""
        self._wanted = rows
        return rows if self._rows is None else min(rows, self._rows)

    def lower(self, rows: int) -> None:
        """Lowers the limit to `rows` because more rows did not fit."""
        self._rows, self._successes = rows if self._rows is None else min(rows, self._rows), 0
        self._patience = min(2 * self._patience, 1024)

    def raise_after_successes(self) -> None:
        """Counts a call that succeeded."""
        if self._rows is None:
            return
        self._successes += 1
        if self._successes >= self._patience:
            self._successes, self._rows = 0, 2 * self._rows
            if self._rows >= self._wanted:
                self._rows = None


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
    x_t = x0.to(denoiser.dtype).expand(rows, *x0.shape[1:]).contiguous()
    timesteps = torch.zeros(rows, dtype=torch.int64, device=x0.device)
    leaf = condition.detach().clone().requires_grad_()
    before, denoiser.checkpointing = denoiser.checkpointing, checkpointing
    try:
        return saved_bytes(denoiser, moving, x_t, timesteps, leaf.expand(rows, *leaf.shape[1:]))
    finally:
        denoiser.checkpointing = before


def saved_bytes(module: nn.Module, moving: Collection[str], *inputs: Tensor) -> tuple[int, int]:
    """Returns the bytes of all activations that module(*inputs) saves for a backward to its weights `moving`, and of the largest one."""
    constants = {p.untyped_storage()._cdata for p in (*module.parameters(), *module.buffers())}
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
        functional_call(module, weights, inputs, tie_weights=False)
    return sum(sizes.values()), max(sizes.values(), default=0)


def forward_bytes(denoiser: Denoiser, x0: Tensor, condition: Tensor) -> int:
    """Measures the peak bytes needed for one more row in a forward without gradient, from runs with one and two rows.

    x0 [1, C, h, w], condition [1, ...].
    """
    peaks = []
    for rows in (1, 2):
        x_t = x0.to(denoiser.dtype).expand(rows, *x0.shape[1:]).contiguous()
        timesteps = torch.zeros(rows, dtype=torch.int64, device=x0.device)
        with torch.no_grad(), _LiveBytes() as alive:
            denoiser(x_t, timesteps, condition.expand(rows, *condition.shape[1:]))
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


def plan(budget: int, images: int, pairs: int, row: int, image: int, checkpointed_row: int | None) -> Plan:
    """Plans what fits into `budget` bytes: first as many images as have room for one row each, then as many rows as possible.

    row: bytes per row. image: bytes of an image's own weights, gradients and optimizer state. checkpointed_row: bytes per row if
    activations are recomputed; None if the denoiser does not support that.

    Raises:
        ValueError: not even one row of one image fits.
    """
    for size, checkpoint in ((row, False), (checkpointed_row, True)):
        if size is not None and image + size <= budget:
            together = min(images, budget // (image + size))
            return Plan(min((budget - together * image) // size, together * pairs), together, checkpoint)
    least = image + min(size for size in (row, checkpointed_row) if size is not None)
    remedy = "give more (on a GPU the default is four fifths of what is free)"
    raise ValueError(f"memory_budget is {budget} bytes; one (timestep, noise) pair of one image takes about {least}: {remedy}")


def out_of_memory(error: BaseException) -> bool:
    """Returns whether an allocation failed, on a GPU or on the CPU (where torch raises a plain RuntimeError)."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    # messages of the CPU allocator on Windows and Linux, of the C++ library, and of CUDA's libraries, which bypass torch's cache
    said = ("not enough memory", "can't allocate memory", "std::bad_alloc", "out of memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


def default_budget(device: torch.device) -> int | None:
    """Returns four fifths of a GPU's free memory, including torch's cache; None on the CPU, where other processes share the free memory."""
    if device.type != "cuda":
        return None
    free: Any = torch.cuda.mem_get_info(device)[0]
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (int(free) + cached) * 4 // 5
