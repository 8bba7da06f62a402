"""Checks that a session makes when it runs a model for the first time."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dtta_fast.runtime.failures import is_the_callers
from dtta_fast.runtime.warn import warn

ROUNDING, HALF_ROUNDING = 0.01, 0.1  # largest difference by rounding, relative to the largest output
MIXED = ("should be the same", "must have the same dtype", "mixed dtype")  # what torch says of inputs and weights of two formats
Notice = tuple[Tensor, Callable[[], None]]  # whether all is well, a 0-dim bool tensor, and what to do if it is not
# names of what transformers' models return, which other modules take from them
OF_OUTPUTS = ("logits", "last_hidden_state", "pooler_output", "hidden_states", "predicted_depth")
SMALL = 1e-4  # a difference of logits that changes no probability by more; logits may be near 0 after a subtraction


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
    except (RuntimeError, AssertionError, AttributeError) as error:
        if isinstance(error, AttributeError):
            found = re.search(r"'tuple' object has no attribute '(\w+)'", str(error))
            if found is None or found[1] not in OF_OUTPUTS:
                raise
            raise ValueError(
                f"model's parts return tuples where its forward takes outputs with names ({error}); set return_dict = True in the config "
                "of the model and of its parts"
            ) from error
        said, first = str(error), next((part for part in module.modules() if isinstance(part, nn.Conv2d)), None)
        size = "x".join(map(str, inputs.shape[-2:]))
        if first is not None and first.in_channels != inputs.shape[1] and "channels" in said:
            remedy = "average the channels" if first.in_channels == 1 else "make those channels"
            raise ValueError(
                f"model's first layer takes images of {first.in_channels} channels, and images are RGB; {remedy} in "
                f"Classification(normalise=...) or in a module around the model: {said.splitlines()[0]}"
            ) from error
        if any(words in said for words in MIXED):
            raise ValueError(
                f"model mixes number formats, and adapt() runs without autocast ({said.splitlines()[0]}); convert it to one: model.float()"
            ) from error
        if "doesn't match model" in said:  # timm's patch embedding
            raise ValueError(
                f"model was built for another size than {size}, that of its crops ({said.splitlines()[0]}); let "
                "task=Classification(crop=...) or model.pretrained_cfg['input_size'] give the model's size"
            ) from error
        raise


def warn_of_foreign_config(module: nn.Module, images: Tensor, crop: Tensor) -> None:
    """Warns if a timm config cannot have come with a model's weights: it is of another number of classes, and enlarges the images."""
    config = getattr(module, "pretrained_cfg", None) or {}
    own, told = getattr(module, "num_classes", None), config.get("num_classes")
    if own is not None and told is not None and own != told and 2 * max(images.shape[-2:]) <= min(crop.shape[-2:]):
        sizes = ["x".join(map(str, found.shape[-2:])) for found in (images, crop)]
        warn(
            f"images of {sizes[0]} are enlarged to {sizes[1]} and normalised as the model's timm config says, which belongs to weights of "
            f"{told} classes, and the model has {own}; if it was trained on other sizes, set input_size, mean and std in "
            "model.pretrained_cfg, or give Classification(crop=..., normalise=...)"
        )


@contextmanager
def warning_of_random_numbers(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Warns if the module draws from torch's random generators in eval mode."""
    before = _random_states(device)
    yield
    if _random_states(device) != before:
        warn(
            f"model, a {type(module).__name__}, draws random numbers in eval mode, as F.dropout(x, p) does without training=self.training: "
            "its results do not repeat, and torch's random state moves"
        )


@torch.no_grad()
def are_logits(module: nn.Module, outputs: Tensor) -> Notice | None:
    """Looks whether a classifier's outputs [B, K] are probabilities: their softmax would be nearly uniform. None for maps."""
    if outputs.ndim != 2:
        return None

    def tell() -> None:
        warn(
            f"model, a {type(module).__name__}, seems to return probabilities, and logits are expected; take the softmax out of it, or "
            "return probabilities.log()"
        )

    return (outputs < 0).any() | ((outputs.double().sum(1) - 1).abs() >= SMALL).any(), tell


@torch.no_grad()
def are_bright(images: Tensor) -> Notice:
    """Looks whether the largest value of images [B, 3, H, W] in [0, 1] is at most 1/255 and above 0, as after a second division by 255 or
    a cast of values in [0, 1] to uint8."""

    def tell() -> None:
        warn(
            f"images are nearly black: their largest value is {float(images.amax()):.2g} of 1 (1/255 = 0.0039). Give floating point in "
            "[0, 1], or uint8 in 0 .. 255"
        )

    largest = images.amax()
    return (largest == 0) | (largest > 1.001 / 255), tell


def _random_states(device: torch.device) -> list[bytes]:
    on_gpu = device.type == "cuda" and torch.cuda.is_initialized()
    found = [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if on_gpu else [])]
    return [state.numpy().tobytes() for state in found]


@torch.no_grad()
def is_its_own(module: nn.Module, run: Callable[[Tensor], Tensor], inputs: Tensor, outputs: Tensor) -> Notice | None:
    """Looks whether a model's answer to an image changes with the images beside it, or from run to run.

    run: gives outputs [B, ...] for inputs [B, 3, H, W]. outputs: what it gave for `inputs`. The first image is run once more: alone, or if
    it was alone, beside another one. None if that fails, or if the model draws random numbers, which warning_of_random_numbers() tells.
    """
    first = inputs[:1].clone()
    both = torch.cat([first, first.flip(-1) / 2])  # with other statistics too
    before, outer = _random_states(inputs.device), sys.exc_info()[1]
    try:
        again = run(first if len(inputs) > 1 else both)
    except Exception as error:  # such as too little memory: the call itself will tell
        if is_the_callers(error, outer):
            raise
        return None
    if again.shape[1:] != outputs.shape[1:]:
        raise ValueError(
            f"model returns shape {tuple(outputs.shape)} for {len(inputs)} images and {tuple(again.shape)} for {3 - min(len(inputs), 2)}; "
            "keep the images' dimension, by flatten(1) or squeeze(dim) in place of squeeze()"
        )
    again = again[:1]
    if _random_states(inputs.device) != before:
        return None

    def tell() -> None:
        name = type(module).__name__
        with torch.no_grad():
            if not bool(_alike(run(first)[:1], run(first)[:1])):
                warn(f"model, a {name}, gives two answers to the same image: its results do not repeat")
                return
            layer = _first_difference(module, run, first, both)
        warn(
            f"model, a {name}, answers an image differently with other images beside it{layer and f' (first seen in {layer})'}: results "
            "depend on the batch; statistics over the batch, as batch norm takes in training mode, have to be fixed before"
        )

    return _alike(outputs[:1], again), tell


def _alike(outputs: Tensor, others: Tensor) -> Tensor:
    """Returns whether two outputs of one shape differ by no more than rounding does, as a 0-dim tensor. Infinity is a masked class."""
    share = ROUNDING if outputs.dtype in (torch.float32, torch.float64) else HALF_ROUNDING
    outputs, others = (torch.nan_to_num(found.double(), posinf=0.0, neginf=0.0) for found in (outputs, others))
    return (outputs - others).abs().amax() <= (share * outputs.abs().amax()).clamp(min=SMALL)


def _first_difference(module: nn.Module, run: Callable[[Tensor], Tensor], first: Tensor, both: Tensor) -> str:
    """Returns the name and type of the first layer without parts that gives another output for the first row; empty if none does."""
    records = list[list[Tensor]]()
    names = {part: name for name, part in module.named_modules() if not list(part.children())}
    order = list[nn.Module]()

    def note(part: nn.Module, _: Any, found: Any) -> None:
        if isinstance(found, Tensor) and found.ndim:
            records[-1].append(found[:1].clone())
            order.append(part)

    handles = [part.register_forward_hook(note) for part in names]
    try:
        for images in (first, both):
            records.append([])
            order.clear()
            run(images)
    finally:
        for handle in handles:
            handle.remove()
    for part, alone, beside in zip(order, *records, strict=False):
        if alone.shape != beside.shape or not bool(_alike(alone, beside)):
            return f"{names[part]}, {type(part).__name__}" if names[part] else ""
    return ""


@contextmanager
def first_run(module: nn.Module, inputs: Tensor) -> Iterator[None]:
    """Checks the first forward pass of a model."""
    with explaining_misfits(module, inputs), warning_of_random_numbers(module, inputs.device):
        yield


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


def have_moved(module: nn.Module, adapted: Mapping[str, Tensor], source: Mapping[str, Tensor], parameters: str, lr: float) -> Notice | None:
    """Looks whether the weights after the first step, of one set or [B, ...] of each image, differ from the source weights."""
    if not adapted or adapted.keys() != source.keys():
        return None

    def tell() -> None:
        warn(
            f"the first step changed none of the {parameters!r} parameters of the model, a {type(module).__name__}: their gradient is "
            f"zero, as behind round() or a saturated output, or lr={lr:g} is too small; the answers are the unadapted model's"
        )

    return torch.stack([(adapted[name] != own).any() for name, own in source.items()]).any(), tell


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
