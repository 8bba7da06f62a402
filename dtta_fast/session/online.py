"""The state that an online session carries from batch to batch: loads it from a dictionary, and saves its adapters to files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dtta_fast.core import lora
from dtta_fast.core.step import State, initial_state
from dtta_fast.core.weights import anchor
from dtta_fast.session.engine import Engine
from dtta_fast.session.loop import finite

REMEDY = "give one that state_dict() gave under the same models and config"


def loaded(state: Any, engine: Engine) -> State:
    """Copies a state from Adapter.state_dict() for an engine with the same models and config.

    Weights are matched by name. Tensors are copied into the engine's own memory layout, since an update runs over weights and optimizer
    state in parallel.

    Raises:
        ValueError: the engine is episodic, or the state has other weights, another optimizer's state, or numbers that are not finite.
    """
    if engine.config.mode != "online":
        raise ValueError("state belongs to an online adapter, and this one is episodic")
    if not isinstance(state, Mapping) or set(state) != set(State._fields):
        found = ", ".join(map(str, state)) if isinstance(state, Mapping) else f"a {type(state).__name__}"
        raise ValueError(f"state has {found}; state_dict() gives {', '.join(State._fields)}")
    outputs = torch.empty(0, dtype=torch.float32, device=anchor(engine.model).device)
    new = initial_state(engine.program.problem, *engine.program.source(), outputs)
    for field in ("theta", "phi"):
        given, own = state[field], getattr(new, field)
        if not isinstance(given, Mapping) or set(given) != set(own):
            raise ValueError(f"state's {field} holds other weights than this adapter's; {REMEDY}")
        for name, target in own.items():
            _take(target, given[name], f"{field}'s {name}")
        slots, own_slots = state[f"{field}_slots"], getattr(new, f"{field}_slots")
        if not _are_lists(slots) or [len(part) for part in slots] != [len(part) for part in own_slots]:
            raise ValueError(f"state's {field}_slots holds another optimizer's memory than this adapter's; {REMEDY}")
        for i, (part, targets) in enumerate(zip(slots, own_slots, strict=True)):
            for j, (value, target) in enumerate(zip(part, targets, strict=True)):
                _take(target, value, f"{field}_slots[{i}][{j}]")
    _take(new.step, state["step"], "step")
    if not 0 <= int(new.step) < 2**31:
        raise ValueError(f"state's step is {int(new.step)}; {REMEDY}")
    if not finite(new):
        raise ValueError(f"state holds NaN or infinity; {REMEDY}")
    return new


def copied(state: State) -> State:
    """Returns a copy of the state."""
    with torch.no_grad():
        found: State = pytree.tree_map(torch.clone, state)
    return found


def _are_lists(slots: Any) -> bool:
    return isinstance(slots, (list, tuple)) and all(isinstance(part, (list, tuple)) for part in slots)


@torch.no_grad()
def _take(target: Tensor, value: Any, name: str) -> None:
    """Copies a tensor with the target's shape and dtype into the target.

    Raises:
        ValueError: value is anything else.
    """
    plain = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type != "meta" and not value.is_nested
    if not plain or value.shape != target.shape or value.dtype != target.dtype:
        found = f"{value.dtype} {tuple(value.shape)}" if plain else f"a {type(value).__name__} without numbers of its own"
        wanted = f"{target.dtype} {tuple(target.shape)}"
        raise ValueError(f"state's {name} is {found} and this adapter's is {wanted}, so it holds other weights; {REMEDY}")
    target.copy_(value)


def save_adapters(state: State | None, engine: Engine, folder: Path) -> None:
    """Implements Adapter.save_lora."""
    config = engine.config
    kinds = (config.parameters, config.denoiser_parameters)
    if state is None or "lora" not in kinds:
        raise ValueError(
            f"there are no adapters to save: parameters is {kinds[0]!r}, denoiser_parameters {kinds[1]!r}, mode "
            f"{config.mode!r}; an online adapter with 'lora' has some after its first batch"
        )
    if kinds[0] == "lora":
        lora.save(folder, engine.program.problem.model, state.theta, unet=False)
    if kinds[1] == "lora":
        lora.save(folder, engine.program.problem.denoiser, state.phi, unet=True)
