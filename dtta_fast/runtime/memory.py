"""How many pairs run at once: what a row of the denoiser keeps for its backward, measured, against a budget."""

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

ROWS_AT_ONCE = 64  # rows of a denoiser's forward where no budget says otherwise; more did not run faster
GUARD_ROWS = {"cpu": ROWS_AT_ONCE, "cuda": 256}  # the same for a forward without gradient, by device
TRANSIENT = 3  # tensors of the largest size that live beside the saved ones while an operator runs, forward or backward


class Plan(NamedTuple):
    """rows: rows of the denoiser at once. images: images at once. checkpoint: whether activations are made again in the backward."""

    rows: int
    images: int
    checkpoint: bool = False


class Limit:
    """A bound on the rows that run at once, set when memory ran out.

    It doubles after some calls that succeed, since whatever took the memory may be gone. Each time memory runs out again, it waits for
    twice as many calls.
    """

    def __init__(self) -> None:
        self._rows: int | None = None
        self._wanted, self._successes, self._patience = 0, 0, 8

    def of(self, rows: int) -> int:
        """The rows to run, of the `rows` that the plan wants."""
        self._wanted = rows
        return rows if self._rows is None else min(rows, self._rows)

    def lower(self, rows: int) -> None:
        """Goes down to `rows`, since more of them did not fit."""
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
    """Bytes that one more row takes: its saved activations, measured on one and two rows, and the largest of them TRANSIENT times.

    x0 [1, C, h, w], condition [1, ...]. moving: names of the denoiser's weights that adapt, whose gradient takes activations too.
    """
    kept = {}
    for whether in {False, checkpointing}:
        (total, largest), (total2, largest2) = (_saved(denoiser, x0, condition, moving, rows, whether) for rows in (1, 2))
        kept[whether] = total2 - total + TRANSIENT * (largest2 - largest)
    # of a checkpointed denoiser one region's activations are there again while its backward runs
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
    """Bytes of the activations that module(*inputs) keeps for a backward to its weights `moving`, and of the largest of them."""
    constants = {p.untyped_storage()._cdata for p in (*module.parameters(), *module.buffers())}
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []  # as long as autograd would hold them, or an address would be counted once for two

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in constants:
            sizes[storage._cdata] = storage.nbytes()
            alive.append(tensor.detach())
        return tensor.detach()  # an output that its own node holds would keep the graph alive for ever

    own = dict(module.named_parameters())
    weights = {name: own[name].detach().requires_grad_() for name in moving}
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        functional_call(module, weights, inputs, tie_weights=False)
    return sum(sizes.values()), max(sizes.values(), default=0)


def forward_bytes(denoiser: Denoiser, x0: Tensor, condition: Tensor) -> int:
    """Bytes that one more row takes in a forward without gradient, at its highest; measured on one and two rows.

    x0 [1, C, h, w], condition [1, ...].
    """
    peaks = []
    for rows in (1, 2):
        x_t = x0.to(denoiser.dtype).expand(rows, *x0.shape[1:]).contiguous()
        timesteps = torch.zeros(rows, dtype=torch.int64, device=x0.device)
        with torch.no_grad(), _LiveBytes() as alive:
            denoiser(x_t, timesteps, condition.expand(rows, *condition.shape[1:]))
        peaks.append(alive.peak)
    return max(1, peaks[1] - peaks[0] + 2 * x0[0].numel() * x0.dtype.itemsize)  # x_t and the draws beside it


class _LiveBytes(TorchDispatchMode):
    """Adds up the memory that operators hand out, for as long as somebody holds it. What a kernel takes for itself is not seen."""

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
    """What fits `budget` bytes: as many images as leave room for a row each, then rows.

    row: bytes a row. image: bytes of an image's own weights, gradients and optimizer memory. checkpointed_row: bytes a row where
    activations are made again; None where the denoiser cannot.

    Raises:
        ValueError: not one row of one image fits.
    """
    for size, checkpoint in ((row, False), (checkpointed_row, True)):
        if size is not None and image + size <= budget:
            together = min(images, budget // (image + size))
            return Plan(min((budget - together * image) // size, together * pairs), together, checkpoint)
    least = image + min(size for size in (row, checkpointed_row) if size is not None)
    remedy = "give more (on a GPU the default is four fifths of what is free)"
    raise ValueError(f"memory_budget is {budget} bytes; one (timestep, noise) pair of one image takes about {least}: {remedy}")


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU (where torch raises a plain RuntimeError)."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    # the CPU's on Windows and Linux, the C++ library's, and those of CUDA's libraries, which take memory past torch's cache
    said = ("not enough memory", "can't allocate memory", "std::bad_alloc", "out of memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


def default_budget(device: torch.device) -> int | None:
    """Four fifths of what a GPU has free, torch's cache included; None on the CPU, where free memory is other processes' too."""
    if device.type != "cuda":
        return None
    free: Any = torch.cuda.mem_get_info(device)[0]
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (int(free) + cached) * 4 // 5
