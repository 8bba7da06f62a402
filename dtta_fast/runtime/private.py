"""The engine's own copies of the caller's modules: swapping, converting or compiling them never affects the originals."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from dtta_fast.runtime.rebinding import rebind

_OPTIMIZER_STEPS = [0]  # steps of all torch optimizers in this process


def _count_step(*_: Any) -> None:
    _OPTIMIZER_STEPS[0] += 1


register_optimizer_step_post_hook(_count_step)


class PrivateCopy:
    """Copies a module's structure in eval mode; its weights are constants that share the original's memory.

    If `dtype` is given, the tensors named in `converted` are stored in that dtype. Converted tensors and buffers belong to the copy;
    refresh() brings them up to date. Functions that were patched into the module refer to the copy. Gradient checkpointing is off, since
    it would run parts of the forward again in the backward, when the adapted weights are no longer in place.

    joined: groups of parameters; those of a group that are all converted become the rows of one tensor, in this order. The tensors are
    in the attribute of the same name, one for each group, or it is empty, if a parameter of a group is not converted.

    Raises:
        TypeError: the module cannot be copied, or contains something that still refers to the original module.
    """

    def __init__(
        self,
        source: nn.Module,
        dtype: torch.dtype | None = None,
        converted: Collection[str] = (),
        joined: Sequence[Sequence[str]] = (),
    ) -> None:
        self._source = source
        self._identity = _identity(named_tensors(source))
        # pairs of source tensor and copied tensor that do not share memory
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self._converted: list[tuple[Tensor, Tensor]] = []
        memo: dict[int, Any] = {}
        self.joined, places = _joined(source, dtype, converted, joined)
        for name, p in source.named_parameters():
            constant = p.detach()
            if p.is_inference():  # autograd refuses to save inference tensors
                constant = constant.clone()
                self._converted.append((p, constant))
            if dtype is not None and name in converted and p.dtype != dtype:
                constant = places[name].copy_(constant) if name in places else constant.to(dtype)
                self._converted = [pair for pair in self._converted if pair[0] is not p] + [(p, constant)]
            memo[id(p)] = nn.Parameter(constant, requires_grad=False) if is_plain(p) else p
        for name, buffer in source.named_buffers():
            own = buffer.detach().to(dtype if dtype is not None and name in converted else buffer.dtype, copy=True)
            memo[id(buffer)] = own
            self._buffers.append((buffer, own))
        try:
            self.module: nn.Module = copy.deepcopy(source, memo)
        except OSError:  # includes TimeoutError, which is the caller's
            raise
        except Exception as error:  # whatever a module's own __deepcopy__ raises
            hint = "give a module that copy.deepcopy accepts"
            if "created explicitly by the user" in str(error):  # a weight that a forward pre-hook computes from others
                hint = (
                    "it holds a tensor computed from its weights, as pruning and the old weight_norm leave it: make it permanent by "
                    "torch.nn.utils.prune.remove or remove_weight_norm, or use torch.nn.utils.parametrizations"
                )
            raise TypeError(f"{type(source).__name__} cannot be copied ({str(error).splitlines()[0]}); {hint}") from error
        shared = {id(part) for part in source.modules()} & {id(part) for part in self.module.modules()}
        if shared:
            kind = next(type(part).__name__ for part in source.modules() if id(part) in shared)
            raise TypeError(f"{kind} cannot be copied: copy.deepcopy gives the module itself; let its __deepcopy__ make a new one")
        without_checkpointing(evaluating(self.module))
        rebind(self.module, source, memo)
        self._versions: list[int | None] = self._counted()
        self._optimizer_steps = _OPTIMIZER_STEPS[0]
        self._written = _writes(named_tensors(source))

    def refresh(self) -> bool:
        """Takes over writes to the source's tensors; returns False if tensors were replaced and a new copy is needed.

        Buffers are copied every time. Casting all converted weights would take longer than a step of a small batch. A weight is therefore
        cast again only if torch has counted a write to it; all of them are if an optimizer in this process has made a step, since torch
        does not count the writes of fused optimizers. Writes through `.data` are not seen: see recast().
        """
        tensors = named_tensors(self._source)
        if _identity(tensors) != self._identity:
            return False
        if self._optimizer_steps != _OPTIMIZER_STEPS[0]:
            self.recast()
        self._optimizer_steps = _OPTIMIZER_STEPS[0]
        versions = self._counted()
        written = [pair for pair, now, then in zip(self._converted, versions, self._versions, strict=True) if now is None or now != then]
        if outdated := [*self._buffers, *written]:
            theirs, own = zip(*outdated, strict=True)
            torch._foreach_copy_(list(own), [tensor.detach() for tensor in theirs])
        self._versions, self._written = versions, _writes(tensors)
        return True

    def seal(self) -> None:
        """Records the tensors that the copy holds between calls, and on the copy what every call would look for in it."""
        vars(self.module)[NAMES] = Names.of(self.module)
        self._held = _held(self.module)

    def is_intact(self) -> bool:
        """Returns whether the copy still holds the tensors that it held at seal()."""
        return _held(self.module) == self._held

    def check_source(self) -> None:
        """Undoes writes to the source's buffers since refresh().

        Raises:
            RuntimeError: buffers were written to (and restored), or weights of the source were, which cannot be undone.
        """
        written = [name for name, count in _writes(named_tensors(self._source)).items() if count != self._written.get(name, count)]
        if not written:
            return
        with torch.no_grad():
            for buffer, own in self._buffers:
                if not buffer.is_inference():
                    buffer.copy_(own)
        self._written = _writes(named_tensors(self._source))
        buffers = {name for name, _ in self._source.named_buffers()}
        lost = [name for name in written if name not in buffers]
        state = f"{lost[0]} is a weight and stays as it was written" if lost else "they are again what they were"
        raise RuntimeError(
            f"{type(self._source).__name__} was written to during a call, in {', '.join(written[:3])}; {state}. Its forward may reach the "
            "module that you gave, past the copy, or another thread trains it: give adapt() a copy.deepcopy of it"
        )

    def recast(self) -> None:
        """Makes the next refresh() cast all converted weights again."""
        self._versions = [None] * len(self._converted)

    def _counted(self) -> list[int | None]:
        """Returns the write count of each converted weight; None for weights made under torch.inference_mode(), which have no count."""
        return [None if p.is_inference() else p._version for p, _ in self._converted]


def _joined(
    source: nn.Module, dtype: torch.dtype | None, converted: Collection[str], groups: Sequence[Sequence[str]]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Returns a new tensor for each group of parameters, and by name the rows of it that are to hold a parameter."""
    held = dict(source.named_parameters())
    fits = (name in held and name in converted and is_plain(held[name]) and held[name].dtype != dtype for names in groups for name in names)
    if dtype is None or not all(fits):
        return [], {}
    tensors, places = [], dict[str, Tensor]()
    for names in groups:
        parts = [held[name] for name in names]
        tensors.append(torch.empty((sum(map(len, parts)), *parts[0].shape[1:]), dtype=dtype, device=parts[0].device))
        places |= zip(names, tensors[-1].split([len(part) for part in parts]), strict=True)
    return tensors, places


NAMES = "_dtta_names"  # attribute of a private copy that holds its Names


class Names(NamedTuple):
    """The names that every call of a module looks up: walking through a module's parts takes a millisecond.

    tied: as in tied_names(). dtypes: of the parameters. buffers: the name of each, with the dictionary that holds it and its key.
    """

    tied: dict[str, list[str]]
    dtypes: dict[str, torch.dtype]
    buffers: list[tuple[str, dict[str, Any], str]]

    @classmethod
    def of(cls, module: nn.Module) -> Names:
        """Returns those that were recorded, on a private copy between its calls, or else looks for them."""
        known: Names | None = vars(module).get(NAMES)
        if known is not None:
            return known
        parts = dict(module.named_modules())
        places = [(name, *name.rpartition(".")[::2]) for name, _ in module.named_buffers()]
        buffers = [(name, parts[prefix]._buffers, leaf) for name, prefix, leaf in places]
        return cls(tied_names(module), {name: p.dtype for name, p in module.named_parameters()}, buffers)


CHECKPOINTING = ("grad_checkpointing", "gradient_checkpointing", "use_checkpoint", "with_cp", "memory_efficient")  # timm, transformers, ...


def without_checkpointing(module: nn.Module) -> nn.Module:
    """Turns off the gradient-checkpointing switches of common libraries in the module and returns it."""
    for part in module.modules():
        for name in CHECKPOINTING:
            if vars(part).get(name) is True:
                setattr(part, name, False)
    return module


def is_plain(parameter: nn.Parameter) -> bool:
    """Returns whether a parameter is plain, and not of a special class such as a quantised weight, which is shared unchanged."""
    return type(parameter) is nn.Parameter


def evaluating(module: nn.Module) -> nn.Module:
    """Puts the module into eval mode and returns it. bitsandbytes' 4-bit layers stay in training mode.

    In eval mode these layers would repack their weights, which are the caller's, for a CPU without gradients.
    """
    for part in module.modules():
        part.training = any(kind.__name__ == "Linear4bit" for kind in type(part).__mro__)
    return module


def named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Lists named_parameters() and named_buffers(), those of a module one behind the other, in a fraction of their time."""
    found: list[tuple[str, Tensor]] = []
    seen: set[int] = set()
    parts: list[tuple[str, nn.Module]] = [("", module)]
    while parts:
        prefix, part = parts.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        for own in (part._parameters, part._buffers):
            for name, tensor in own.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    found.append((prefix + name, tensor))
        parts += [(f"{prefix}{name}.", inner) for name, inner in reversed(part._modules.items()) if inner is not None]
    return found


def _writes(tensors: list[tuple[str, Tensor]]) -> dict[str, int]:
    """Returns torch's write count of each weight and buffer. Inference tensors are left out, since torch does not count their writes."""
    return {name: tensor._version for name, tensor in tensors if not tensor.is_inference()}


def tied_names(module: nn.Module) -> dict[str, list[str]]:
    """Maps the first name of each tensor that several modules hold to its other names."""
    places: dict[int, dict[tuple[int, str], str]] = {}
    for prefix, part in module.named_modules():
        for own in (part._parameters, part._buffers):
            for leaf, tensor in own.items():
                if tensor is not None:
                    places.setdefault(id(tensor), {})[id(part), leaf] = f"{prefix}.{leaf}" if prefix else leaf
    names = ([*found.values()] for found in places.values())
    return {first: others for first, *others in names if others}


def _held(module: nn.Module) -> list[int]:
    """Returns the ids of all weights and buffers, under all of their names."""
    return [id(tensor) for part in module.modules() for own in (part._parameters, part._buffers) for tensor in own.values()]


def _identity(tensors: list[tuple[str, Tensor]]) -> list[tuple[Any, ...]]:
    """Lists the name, id and memory location of each tensor."""
    return [(name, id(tensor), *_place(tensor)) for name, tensor in tensors]


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Returns where a tensor's elements lie in memory; empty for layouts that are not strided, such as sparse ones."""
    if tensor.layout != torch.strided:
        return ()
    memory = tensor.untyped_storage()._cdata, tensor.storage_offset()
    return *memory, tuple(tensor.shape), tensor.stride(), tensor.dtype
