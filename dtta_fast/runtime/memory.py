"""How many pairs run at once: what a row of the denoiser keeps for its backward, measured, against a budget."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dtta_fast.denoisers.base import Denoiser

ROWS_AT_ONCE = 64  # rows of a denoiser's forward where no budget says otherwise; more did not run faster
TRANSIENT = 3  # tensors of the largest size that live beside the saved ones while an operator runs, forward or backward


class Plan(NamedTuple):
    """rows: rows of the denoiser at once. images: images at once. checkpoint: whether activations are made again in the backward."""

    rows: int
    images: int
    checkpoint: bool = False


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
    constants = {p.untyped_storage().data_ptr() for p in (*module.parameters(), *module.buffers())}
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []  # as long as autograd would hold them, or an address would be counted once for two

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in constants:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor.detach())
        return tensor.detach()  # an output that its own node holds would keep the graph alive for ever

    own = dict(module.named_parameters())
    weights = {name: own[name].detach().requires_grad_() for name in moving}
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        functional_call(module, weights, inputs)
    return sum(sizes.values()), max(sizes.values(), default=0)


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
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and "not enough memory" in str(error))


def default_budget(device: torch.device) -> int | None:
    """Four fifths of what a GPU has free, torch's cache included; None on the CPU, where free memory is other processes' too."""
    if device.type != "cuda":
        return None
    free: Any = torch.cuda.mem_get_info(device)[0]
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (int(free) + cached) * 4 // 5
