"""Which weights move, as dictionaries of tensors beside the caller's modules, which are never written to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Literal

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
    names = {
        "all": lambda: [name for name, _ in model.named_parameters()],
        "norm": lambda: [f"{name}.{own}".lstrip(".") for name, module in model.named_modules() if _is_norm(module) for own, _ in module.named_parameters(recurse=False)],
        "head": lambda: _head_names(model),
        "logits": list,
    }[which]()
    own = dict(model.named_parameters())
    chosen = {name: own[name] for name in names if name in own}  # a tied weight has one name in `own`
    if not chosen and which != "logits":
        raise ValueError(f"parameters is {which!r}, and {type(model).__name__} has none of that kind; choose all, norm, head or logits")
    for name, parameter in chosen.items():
        if not parameter.is_floating_point():
            raise ValueError(f"model parameter {name} has dtype {parameter.dtype}, which no gradient reaches")
    return chosen


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and any(True for _ in module.parameters(recurse=False))


def _head_names(model: nn.Module) -> list[str]:
    """The classifier layer: timm's own answer where it has one, the last Linear otherwise."""
    if hasattr(model, "get_classifier"):
        heads = model.get_classifier()
        modules = [heads] if isinstance(heads, nn.Module) else [head for head in heads if isinstance(head, nn.Module)]
    else:
        modules = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    ids = {id(p) for module in modules for p in module.parameters()}
    return [name for name, p in model.named_parameters() if id(p) in ids]


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
    if not per_image or not moving:
        if per_image:
            images, inputs = len(inputs[0]), tuple(x.flatten(0, 1) for x in inputs)
        output: Tensor = functional_call(module, {**frozen, **moving}, inputs)
        return output.unflatten(0, (images, -1)) if per_image else output
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
