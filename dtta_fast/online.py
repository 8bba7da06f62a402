"""The state that an online session carries from batch to batch, as a dictionary."""

from __future__ import annotations

from typing import Any

import torch

from dtta_fast.engine import Engine, anchor
from dtta_fast.step import State, initial_state


def loaded(state: dict[str, Any], engine: Engine) -> State:
    """The state that Adapter.state_dict() gave, for an engine with the same models and config.

    Raises:
        ValueError: the engine is episodic, or the state holds other weights, another optimizer's memory, or numbers that are not finite.
    """
    if engine.config.mode != "online":
        raise ValueError("state belongs to an online adapter, and this one is episodic")
    if set(state) != set(State._fields):
        raise ValueError(f"state has {', '.join(state)}; state_dict() gives {', '.join(State._fields)}")
    new = State(**state)
    outputs = torch.empty(0, dtype=torch.float32, device=anchor(engine.model).device)
    expected = initial_state(engine.problem, *engine.source(), outputs)
    for field in ("theta", "phi"):
        shapes = [{name: p.shape for name, p in getattr(s, field).items()} for s in (new, expected)]
        slots = [[[(p.shape, p.dtype) for p in tensors] for tensors in getattr(s, f"{field}_slots")] for s in (new, expected)]
        if shapes[0] != shapes[1] or slots[0] != slots[1]:
            raise ValueError(f"state's {field} holds other weights, or another optimizer's memory, than this adapter's")
    if not engine.finite(new):
        raise ValueError("state holds NaN or infinity; give one that state_dict() gave")
    return new
