"""Selects the weights to adapt, as dictionaries of tensors kept outside the caller's modules, which are never written to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dtta_fast.config import AdaptConfig, ParameterSet
from dtta_fast.core import lora
from dtta_fast.denoisers.base import Denoiser
from dtta_fast.runtime.attention import vmappable_attention
from dtta_fast.runtime.private import Names

Parameters = dict[str, Tensor]


def anchor(model: nn.Module) -> Tensor:
    """Returns a tensor with the model's device and dtype."""
    return next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0, dtype=torch.float32, device="cpu"))


def select(model: nn.Module, which: ParameterSet) -> Parameters:
    """Selects the model's own parameter tensors by name: all of them, those of the normalisation layers, or those of the classifier head.

    "logits" selects none: the logits themselves are the parameter (the paper's free-logits ablation). "lora" selects the weights of the
    model's adapters.

    Raises:
        ValueError: the model has no parameters of that kind, or some of them are complex or sparse.
    """
    parts: Iterable[nn.Module | nn.Parameter] = {
        "all": [model],
        "norm": [module for module in model.modules() if "norm" in type(module).__name__.lower()],
        "head": _heads(model),
        "logits": [],
        "lora": [],
    }[which]
    held = ([part] if isinstance(part, nn.Parameter) else part.parameters(recurse=which != "norm") for part in parts)
    wanted = {id(p) for own in held for p in own}
    if which == "lora":
        named = set(lora.weight_names(model))
        wanted = {id(p) for name, p in model.named_parameters() if name in named}
    chosen: Parameters = {name: p for name, p in model.named_parameters() if id(p) in wanted}
    if chosen and not any(p.is_floating_point() or p.is_complex() for p in chosen.values()):
        name = next(iter(chosen))
        raise ValueError(f"model parameter {name} has dtype {chosen[name].dtype}, which no gradient reaches")
    if not chosen and which != "logits":
        raise ValueError(
            f"parameters is {which!r}, and {type(model).__name__} has none of that kind; choose all, norm, head, lora or logits"
        )
    for name, parameter in chosen.items():
        if parameter.is_complex() or parameter.layout != torch.strided:
            kind = parameter.dtype if parameter.is_complex() else parameter.layout
            raise ValueError(f"model parameter {name} is {kind}, which is not adapted; choose parameters='head' or 'norm'")
    # no gradient reaches whole numbers, such as counters
    return {name: parameter for name, parameter in chosen.items() if parameter.is_floating_point()}


def source_weights(
    config: AdaptConfig, model: nn.Module, denoiser: Denoiser, own_model: nn.Module, own_denoiser: Denoiser
) -> tuple[Parameters, Parameters]:
    """Returns the caller's weights to adapt: those of the model and those of the denoiser.

    own_model, own_denoiser: the private copies. New adapters exist only there, and share memory with the adapters a module already had.
    """
    theta, phi = select(own_model if config.parameters == "lora" else model, config.parameters), Parameters()
    if config.denoiser_parameters == "lora":
        phi = select(own_denoiser, "lora")
    elif config.denoiser_parameters == "all":
        weights = dict(denoiser.named_parameters())
        phi = {name: weights[name] for name in denoiser.adaptable()}
    return theta, phi


def _heads(model: nn.Module) -> Sequence[nn.Module | nn.Parameter]:
    """Returns the classifier layers: those of get_classifier() if it exists (timm; some have two), else the last Linear or Conv2d."""
    if hasattr(model, "get_classifier"):
        heads: Any = model.get_classifier()  # type: ignore[operator]
        return [head for head in (heads if isinstance(heads, tuple) else (heads,)) if isinstance(head, (nn.Module, nn.Parameter))]
    return [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1:]


def copies(parameters: Mapping[str, Tensor], images: int | None, batched: bool = False) -> Parameters:
    """Makes detached copies: one shared copy, or `images` of them stacked along a new first dimension; half precision becomes float32.

    An update of 1e-5 is lost in a bfloat16 weight, so the adapted weights are kept in float32 and cast for each forward pass.
    batched: store matrices transposed in memory, the layout in which vmap's products return their gradients, so that updates need not
    transpose them.
    """
    own: Parameters = {}
    for name, p in parameters.items():
        stacked = p.detach() if images is None else p.detach().expand(images, *p.shape)
        turned = batched and images not in (None, 1) and p.ndim == 2
        laid = (stacked.mT if turned else stacked).to(torch.promote_types(p.dtype, torch.float32), copy=True).contiguous()
        own[name] = laid.mT if turned else laid
    return own


def in_dtypes_of(module: nn.Module, moving: Mapping[str, Tensor]) -> Parameters:
    """Casts the tensors to the dtypes of the module's own parameters of the same names."""
    dtypes = Names.of(module).dtypes
    return {name: p.to(dtypes[name]) for name, p in moving.items()}


def under_all_names(module: nn.Module, tensors: Mapping[str, Tensor]) -> Parameters:
    """Returns the tensors, repeated under the names of other modules that hold the same weight, as a tied head does.

    A module that is registered twice holds its weights once, so it is listed under one name only: torch's
    functional_call(tie_weights=True) would swap its weights twice and leave the second swap in place.
    """
    others = Names.of(module).tied  # recorded on a private copy, since a trace cannot compute them
    return {name: tensor for first, tensor in tensors.items() for name in (first, *others.get(first, ()))}


class _Running(nn.Module):
    """A wrapper around a module whose forward runs a given function."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, run: Callable[[], None]) -> None:
        run()


def with_weights(module: nn.Module, moving: Mapping[str, Tensor], run: Callable[[], None]) -> None:
    """Runs a function, including any backward passes in it, while `moving` replaces the module's own parameters of the same names."""
    inner = {f"module.{name}": p for name, p in under_all_names(module, moving).items()}
    functional_call(_Running(module), inner, (run,), tie_weights=False)


def of_image(moving: Mapping[str, Tensor], i: int) -> Parameters:
    """Returns the weights of image i. For a single image they are views whose gradient needs no copy."""
    return {name: p.squeeze(0) if len(p) == 1 else p[i] for name, p in moving.items()}


def call(module: nn.Module, moving: Mapping[str, Tensor], *inputs: Tensor, per_image: bool, loop: bool = False) -> Tensor:
    """Calls module(*inputs) with `moving` in place of its own parameters of the same names; module is a private copy.

    per_image: `moving` and every input have a leading image dimension, and image i is computed with its own weights: one after the
    other with `loop`, all at once otherwise. If the module writes to its buffers, it writes to copies.
    """
    constants = {name: held[leaf].clone() for name, held, leaf in Names.of(module).buffers if held[leaf] is not None}
    if not per_image:
        output: Tensor = functional_call(module, under_all_names(module, {**constants, **moving}), inputs, tie_weights=False)
        return output
    images = len(inputs[0])
    if loop or images == 1:  # plain operators are faster than batched ones
        each = [call(module, of_image(moving, i), *(x[i] for x in inputs), per_image=False) for i in range(images)]
        return torch.stack(each) if images > 1 else each[0][None]
    with vmappable_attention():
        stacked: Tensor = torch.vmap(
            lambda weights, *x: functional_call(module, under_all_names(module, {**constants, **weights}), x, tie_weights=False)
        )(dict(moving), *inputs)
    return stacked
