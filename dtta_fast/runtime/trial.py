"""Checks that a session makes when it runs a model for the first time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dtta_fast.runtime.warn import warn


@contextmanager
def refusing_recomputation(module: nn.Module) -> Iterator[None]:
    """Raises ValueError if a part of the module runs again in a backward, when the adapted weights are no longer in place."""

    def check(part: nn.Module, _: Any) -> None:
        if torch._C._current_graph_task_id() != -1:  # inside a backward; torch.utils.checkpoint uses the same test
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
def explaining_misfits(module: nn.Module, inputs: Tensor) -> Iterator[None]:
    """Turns the error of a model that does not take its inputs [B, 3, H, W] into a ValueError that names a remedy."""
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        said, first = str(error), next((part for part in module.modules() if isinstance(part, nn.Conv2d)), None)
        size = "x".join(map(str, inputs.shape[-2:]))
        if first is not None and first.in_channels != inputs.shape[1] and "channels" in said:
            remedy = "average the channels" if first.in_channels == 1 else "make those channels"
            raise ValueError(
                f"model's first layer takes images of {first.in_channels} channels, and images are RGB; {remedy} in "
                f"Classification(normalise=...) or in a module around the model: {said.splitlines()[0]}"
            ) from error
        if "doesn't match model" in said:  # timm's patch embedding
            raise ValueError(
                f"model was built for another size than {size}, which its timm config gives ({said.splitlines()[0]}); "
                "give task=Classification(crop=...), or set the size in model.pretrained_cfg['input_size']"
            ) from error
        raise


@contextmanager
def warning_of_random_numbers(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Warns if the module draws from torch's random generators in eval mode."""
    on_gpu = device.type == "cuda" and torch.cuda.is_initialized()

    def states() -> list[bytes]:
        found = [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if on_gpu else [])]
        return [state.numpy().tobytes() for state in found]

    before = states()
    yield
    if states() != before:
        warn(
            f"model, a {type(module).__name__}, draws random numbers in eval mode, as F.dropout(x, p) does without training=self.training: "
            "its results do not repeat, and torch's random state moves"
        )


@contextmanager
def refusing_kept_tensors(module: nn.Module) -> Iterator[None]:
    """Raises RuntimeError if a forward under vmap leaves tensors in attributes of the module or in its hooks.

    Such tensors are unusable outside the vmap and are removed.
    """
    places = [(part, vars(part)) for part in module.modules()]
    places += [(part, held) for part in module.modules() for hook in _hooks(part) for held in _reached(hook)]
    before = [dict(held) for _, held in places]
    kept: list[str] = []
    try:
        yield
    finally:
        for (part, held), attributes in zip(places, before, strict=True):
            for name, value in [item for item in held.items() if _holds_wrapped(item[1])]:
                kept.append(f"{type(part).__name__}.{name}" if held is vars(part) else f"a hook of {type(part).__name__}")
                _take_out(held, attributes, name, value)
    if kept:
        raise RuntimeError(f"{kept[0]} keeps a tensor of the forward")


def _hooks(part: nn.Module) -> list[Any]:
    return [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]


def _reached(hook: Any) -> list[dict[str, Any]]:
    """Returns where a hook may keep tensors: the variables of its closure and the attributes of the object that it is bound to."""
    function = getattr(hook, "__func__", hook)
    names, cells = getattr(getattr(function, "__code__", None), "co_freevars", ()), getattr(function, "__closure__", None) or ()
    found = {name: cell.cell_contents for name, cell in zip(names, cells, strict=False) if isinstance(cell.cell_contents, (list, dict))}
    owner = getattr(hook, "__self__", None)
    return [found, *([vars(owner)] if hasattr(owner, "__dict__") and not isinstance(owner, nn.Module) else [])]


def warn_of_weights_elsewhere(module: nn.Module) -> None:
    """Warns about weights that a module also keeps in a list or dictionary: a forward that reads them there gets the old values."""
    weights = {id(p) for p in module.parameters()}
    for name, part in module.named_modules():
        if isinstance(part, nn.RNNBase):  # it rebuilds its list for each forward
            continue
        for attribute, value in vars(part).items():
            parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
            if not attribute.startswith("_") and any(isinstance(p, nn.Parameter) and id(p) in weights for p in parts):
                where = f"{name}.{attribute}" if name else attribute
                warn(
                    f"model keeps weights in {where} as well as in its parameters; if its forward reads them from there, they do not adapt"
                )


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
    """Returns whether a value is, or directly contains, a tensor that belongs to a vmap."""
    if isinstance(value, (list, tuple, dict)):
        return any(_holds_wrapped(part) for part in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value)
