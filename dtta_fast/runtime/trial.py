"""What a session finds out about a model the first time that it runs it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def refusing_recomputation(module: nn.Module) -> Iterator[None]:
    """Raises ValueError where a part of the module runs again in a backward, by which time adapted weights are no longer in place."""

    def check(part: nn.Module, _: Any) -> None:
        if torch._C._current_graph_task_id() != -1:  # inside of a backward, as torch.utils.checkpoint asks
            raise ValueError(
                f"model's {type(part).__name__} runs again in the backward, by gradient checkpointing, where its weights are "
                "not the adapted ones; switch checkpointing off in the model"
            )

    handles = [part.register_forward_pre_hook(check) for part in module.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def warning_of_random_numbers(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Warns where the module draws from torch's generators in eval mode."""
    on_gpu = device.type == "cuda" and torch.cuda.is_initialized()

    def states() -> list[bytes]:
        found = [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if on_gpu else [])]
        return [state.numpy().tobytes() for state in found]

    before = states()
    yield
    if states() != before:
        warnings.warn(
            f"model, a {type(module).__name__}, draws random numbers in eval mode, as F.dropout(x, p) does without training=self.training: "
            "its results do not repeat, and torch's random state moves",
            stacklevel=6,
        )


@contextmanager
def refusing_kept_tensors(module: nn.Module) -> Iterator[None]:
    """Raises RuntimeError where a forward under vmap leaves tensors in attributes of the module. They are of no use outside of the vmap,
    and are taken out."""
    before = [(part, dict(vars(part))) for part in module.modules()]
    kept: list[str] = []
    try:
        yield
    finally:
        for part, attributes in before:
            for name, value in [item for item in vars(part).items() if _holds_wrapped(item[1])]:
                kept.append(f"{type(part).__name__}.{name}")
                _take_out(vars(part), attributes, name, value)
    if kept:
        raise RuntimeError(f"{kept[0]} keeps a tensor of the forward")


def _take_out(now: dict[str, Any], before: dict[str, Any], name: str, value: Any) -> None:
    same = value is before.get(name)
    if same and isinstance(value, list):
        value[:] = [part for part in value if not _holds_wrapped(part)]
    elif same and isinstance(value, dict):
        for key in [key for key, part in value.items() if _holds_wrapped(part)]:
            del value[key]
    elif name in before:
        now[name] = before[name]
    else:
        del now[name]


def _holds_wrapped(value: Any) -> bool:
    """Tells whether it is, or directly holds, a tensor that belongs to a vmap."""
    if isinstance(value, (list, tuple, dict)):
        return any(_holds_wrapped(part) for part in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value)
