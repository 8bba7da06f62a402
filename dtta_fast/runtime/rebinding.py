"""Rebinds functions of a copied module that still refer to the original module.

copy.deepcopy() copies modules, bound methods and partials, but shares plain functions and weak references. A forward that was patched with
a closure, a hook or a tool would therefore call the original, whose weights are not adapted and whose buffers belong to the caller.
"""

from __future__ import annotations

import copy
import dis
import functools
import types
import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

DEPTH = 8  # maximum length of a chain of references to follow
LIBRARIES = {"torch", "torchvision", "timm", "transformers", "diffusers", "open_clip", "peft", "accelerate", "bitsandbytes", "dtta_fast"}
SKIPPED = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}  # deepcopy() copies these


def rebind(module: nn.Module, source: nn.Module, memo: dict[int, Any]) -> None:
    """Makes the functions and weak references in `module`, a deep copy of `source`, refer to the copy instead of the source.

    memo: the memo of the deepcopy() call.

    Raises:
        TypeError: something still refers to the source, such as a function that accesses it as a global variable.
    """
    originals = {id(part) for part in (*source.modules(), *source.parameters(), *source.buffers())}
    # weights of special classes are shared and belong to both modules
    originals -= {id(part) for part in (*module.modules(), *module.parameters(), *module.buffers())}
    classes: dict[type, bool] = {}
    for name, part in module.named_modules():
        for attribute, value in [item for item in vars(part).items() if item[0] not in SKIPPED]:
            if not _reaches(value, originals, set()):
                continue
            rebound = _Rebinding(originals, memo).of(value)
            if _reaches(rebound, originals, set()):
                where = f"{name}.{attribute}" if name else attribute
                raise TypeError(_refusal(source, where, value))
            vars(part)[attribute] = rebound
        kind = type(part)
        if kind not in classes:
            classes[kind] = _reaches(kind.forward, originals, set())
        if classes[kind]:
            raise TypeError(_refusal(source, f"{name}.forward" if name else "forward", kind.forward))


def _refusal(source: nn.Module, where: str, value: Any) -> str:
    named = getattr(value, "__qualname__", type(value).__name__)
    return (
        f"{type(source).__name__}.{where} ({named}) reaches the module that you gave and not its copy, so nothing would adapt; "
        "let it go through `self` or its arguments"
    )


def _reaches(value: Any, originals: set[int], seen: set[int], depth: int = DEPTH) -> bool:
    """Returns whether following the references of `value` leads to an object whose id is in `originals`."""
    if id(value) in originals:
        return True
    if id(value) in seen or not depth:
        return False
    seen.add(id(value))
    return any(_reaches(part, originals, seen, depth - 1) for part in _parts(value))


def _parts(value: Any) -> Iterator[Any]:
    """Yields the objects that a value refers to."""
    if isinstance(value, (str, bytes, int, float, complex, type(None), type, types.ModuleType, Tensor)):
        return
    if isinstance(value, types.FunctionType):
        yield from (cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell))
        yield from value.__defaults__ or ()
        yield from (value.__kwdefaults__ or {}).values()
        yield from vars(value).values()
        if value.__module__ is None or value.__module__.partition(".")[0] not in LIBRARIES:
            yield from (value.__globals__[name] for name in _global_names(value.__code__) if name in value.__globals__)
    elif isinstance(value, types.MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, weakref.ref):
        yield value()
    elif isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from value
    elif isinstance(value, nn.Module):
        yield from value.modules()
    elif hasattr(value, "__dict__"):
        yield from vars(value).values()


@functools.lru_cache(maxsize=4096)
def _global_names(code: types.CodeType) -> frozenset[str]:
    """Returns the names of the global variables that a function's code reads, including those of nested functions."""
    own = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return frozenset(own.union(*(_global_names(inner) for inner in code.co_consts if isinstance(inner, types.CodeType))))


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


class _Rebinding:
    """Recreates functions, partials, bound methods, weak references and containers so that they refer to copies instead of originals."""

    def __init__(self, originals: set[int], memo: dict[int, Any]) -> None:
        self._originals, self._memo = originals, memo
        self._made: dict[int, Any] = {}  # a closure may contain itself

    def of(self, value: Any) -> Any:
        if not _reaches(value, self._originals, set()):
            return value
        if id(value) in self._made:
            return self._made[id(value)]
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            return types.MethodType(self.of(value.__func__), self.of(value.__self__))
        if isinstance(value, functools.partial):
            return functools.partial(self.of(value.func), *map(self.of, value.args), **{k: self.of(v) for k, v in value.keywords.items()})
        if isinstance(value, weakref.ref):
            return weakref.ref(self._memo.get(id(value()), value()))
        if isinstance(value, dict):
            rebound = copy.copy(value)
            rebound.update({key: self.of(inner) for key, inner in value.items()})
            return rebound
        if type(value) in (list, tuple):
            return type(value)(map(self.of, value))
        return copy.deepcopy(value, self._memo)

    def _function(self, value: types.FunctionType) -> types.FunctionType:
        cells = tuple(types.CellType() for _ in value.__closure__ or ())
        made = types.FunctionType(value.__code__, value.__globals__, value.__name__, None, cells or None)
        self._made[id(value)] = made
        for cell, old in zip(cells, value.__closure__ or (), strict=True):
            if _is_filled(old):
                cell.cell_contents = self.of(old.cell_contents)
        made.__defaults__ = None if value.__defaults__ is None else tuple(map(self.of, value.__defaults__))
        if value.__kwdefaults__ is not None:
            made.__kwdefaults__ = {name: self.of(inner) for name, inner in value.__kwdefaults__.items()}
        made.__qualname__, made.__doc__, made.__module__ = value.__qualname__, value.__doc__, value.__module__
        vars(made).update({name: self.of(inner) for name, inner in vars(value).items()})
        return made
