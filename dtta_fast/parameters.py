"""Which weights move, as dictionaries of tensors beside the caller's modules, which are never written to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

ParameterSet = Literal["all", "norm", "head", "logits"]
Parameters = dict[str, Tensor]


def select(model: nn.Module, which: ParameterSet) -> Parameters:
    """The model's own parameter tensors, by name: all of them, the normalisation layers' or the last layer's.

    "logits" selects none: the logits themselves are the parameter (the free-logits ablation of the paper).

    Raises:
        ValueError: the model has no parameter of that kind, or parameters that are no floating-point numbers.
    """
    modules: Iterable[nn.Module] = {
        "all": [model],
        "norm": [module for module in model.modules() if _is_norm(module)],
        "head": _heads(model),
        "logits": [],
    }[which]
    wanted = {id(p) for module in modules for p in module.parameters()}
    chosen: Parameters = {name: p for name, p in model.named_parameters() if id(p) in wanted}
    if not chosen and which != "logits":
        raise ValueError(f"parameters is {which!r}, and {type(model).__name__} has none of that kind; choose all, norm, head or logits")
    for name, parameter in chosen.items():
        if not parameter.is_floating_point():
            raise ValueError(f"model parameter {name} has dtype {parameter.dtype}, which no gradient reaches")
    return chosen


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not list(module.children())


def _heads(model: nn.Module) -> Sequence[nn.Module]:
    """The classifier layer: timm's own answer where it has one (some models have two), the last Linear otherwise."""
    if hasattr(model, "get_classifier"):
        heads: Any = model.get_classifier()  # type: ignore[operator]
        return [head for head in (heads if isinstance(heads, tuple) else (heads,)) if isinstance(head, nn.Module)]
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]


def copies(parameters: Mapping[str, Tensor], images: int | None) -> Parameters:
    """Detached copies: one shared, or `images` of them stacked along a new first dimension."""
    if images is None:
        return {name: p.detach().clone() for name, p in parameters.items()}
    return {name: p.detach().expand(images, *p.shape).clone() for name, p in parameters.items()}


def call(module: nn.Module, moving: Mapping[str, Tensor], *inputs: Tensor, per_image: bool) -> Tensor:
    """module(*inputs) with `moving` in place of its own parameters of those names; all others are constants.

    per_image: `moving` and every input carry a leading image dimension, and image i is computed with its own weights.
    """
    frozen = {name: p.detach() for name, p in module.named_parameters() if name not in moving}
    if not per_image:
        output: Tensor = functional_call(module, {**frozen, **moving}, inputs)
        return output
    if not moving:  # one set of weights after all: one batch
        flat: Tensor = functional_call(module, frozen, tuple(x.flatten(0, 1) for x in inputs))
        return flat.unflatten(0, inputs[0].shape[:2])
    # PyTorch's fused CPU attention has no batching rule: vmap would run it image by image.
    on_cpu = inputs[0].device.type == "cpu"
    with sdpa_kernel(SDPBackend.MATH) if on_cpu else nullcontext():
        stacked: Tensor = torch.vmap(lambda own, *x: functional_call(module, {**frozen, **own}, x))(dict(moving), *inputs)
    return stacked


@contextmanager
def evaluation_mode(*modules: nn.Module) -> Iterator[None]:
    """eval() on all of them, and every submodule's own flag back at the end, whatever happens."""
    flags = {part: part.training for module in modules for part in module.modules()}
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for part, training in flags.items():
            part.training = training
