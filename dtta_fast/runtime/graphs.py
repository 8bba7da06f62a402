"""CUDA graphs: records the kernels that a function of tensors launches, and launches them all at once from then on."""

from __future__ import annotations

import itertools
import sys
import threading
import warnings
from collections.abc import Callable, Hashable, Iterable
from contextlib import nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dtta_fast.runtime.constants import noting
from dtta_fast.runtime.failures import is_not_of_the_trial, reason
from dtta_fast.runtime.warn import warn

T = TypeVar("T")
# takes a function that writes its results to tensors that exist already, and returns one that launches the same kernels again
Recorder = Callable[[Callable[[], Any]], Callable[[], None]]
RECORDINGS, PLACES, TOKENS = 64, 1024, 4096  # that a session keeps
_CAPTURING = threading.Lock()  # a capture waits for the whole device, which would break another one


class CudaGraphs:
    """A Recorder of CUDA graphs on one device, which share memory: none of them runs while another does.

    Capturing runs no kernel. The stream is the session's own: cuBLAS keeps a workspace for each stream, which kernels of two sessions
    must not share.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._made: tuple[torch.cuda.Stream, Any] | None = None

    def __call__(self, function: Callable[[], Any]) -> Callable[[], None]:
        with _CAPTURING, torch.cuda.device(self._device), warnings.catch_warnings():
            warnings.filterwarnings("error", message="The CUDA Graph is empty")
            if self._made is None:
                self._made = torch.cuda.Stream(self._device), torch.cuda.graph_pool_handle()
            (stream, pool), graph = self._made, torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                function()
        return graph.replay


class Recording(NamedTuple):
    """found: the results, in the same memory each time. held: every tensor that the kernels read: a graph knows only addresses."""

    found: Any
    replay: Callable[[], None]
    held: list[Any]


class _Inputs(TorchDispatchMode):
    """Collects the tensors that operators read or write without another operator having made them."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[int, Tensor] = {}  # by storage
        self._made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            storage = tensor.untyped_storage()._cdata
            if storage not in self._made:
                self.tensors.setdefault(storage, tensor)
        found = func(*args, **(kwargs or {}))
        self._made |= {storage for tensor in _tensors(found) if (storage := tensor.untyped_storage()._cdata) not in self.tensors}
        return found


def _tensors(tree: Any) -> Iterable[Tensor]:
    return (leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.layout == torch.strided)


class Graphs:
    """The recordings of a session. Each is for one function, and tensors at fixed addresses.

    compiled: whether torch.compile compiled parts of the functions. Compiled code keeps its own constants alive, and does not run while
    operators are watched.
    """

    def __init__(self, device: torch.device, compiled: bool, record: Recorder | None = None) -> None:
        self._device, self._compiled = device, compiled
        self._record = CudaGraphs(device) if record is None else record
        self._recordings: dict[Hashable, Recording] = {}  # the one used last is last
        self._places: dict[Hashable, Tensor] = {}
        self._tokens: dict[Hashable, int] = {}
        self._next = itertools.count()
        self.failed = False

    def place(self, name: str, shape: Iterable[int], dtype: torch.dtype) -> Tensor:
        """Returns an unwritten tensor, at an address that is the same for each name, shape and dtype."""
        key = name, tuple(shape), dtype
        if key not in self._places:
            if len(self._places) >= PLACES:
                self.clear()
            self._places[key] = torch.empty(key[1], dtype=dtype, device=self._device)
        return self._places[key]

    @torch.no_grad()
    def placed(self, name: str, tensor: Tensor) -> Tensor:
        """Copies a tensor, of any device, to the place() of this name."""
        held = self.place(name, tensor.shape, tensor.dtype)
        if held.data_ptr() != tensor.data_ptr() or held.stride() != tensor.stride():
            held.copy_(tensor, non_blocking=True)
        return held

    def token(self, tensors: Iterable[Tensor]) -> int:
        """Returns a number that stands for the shapes and addresses of tensors: for many of them, run() would take a millisecond."""
        key = tuple((tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors)
        if key not in self._tokens:
            if len(self._tokens) >= TOKENS:
                self._tokens.clear()
            self._tokens[key] = next(self._next)
        return self._tokens[key]

    def run(self, name: str, function: Callable[[], T], *tensors: Tensor, given: Hashable = ()) -> T:
        """Computes function(): as it is the first time, which loads and compiles what it needs, and is then recorded; later by a replay.

        Its results are copied to places of the function's name: they are valid until a function of this name runs again. If a function
        cannot be recorded, all of them run as they are from then on, with a warning.

        tensors: what the function reads and writes; a recording is for their shapes and addresses. given: whatever else it depends on.
        """
        if self.failed:
            return function()
        signature = name, given, self.token(tensors)
        if signature in self._recordings:
            recording = self._recordings[signature] = self._recordings.pop(signature)
            recording.replay()
            known: T = recording.found
            return known

        def recorded() -> T:
            leaves, form = pytree.tree_flatten(function())
            found: T = pytree.tree_unflatten([self._result(f"{name} {i}", leaf) for i, leaf in enumerate(leaves)], form)
            return found

        first = recorded()
        while len(self._recordings) >= RECORDINGS:
            del self._recordings[next(iter(self._recordings))]
        held: list[Any] = [function, *tensors]
        inputs, outer = _Inputs(), sys.exc_info()[1]
        try:
            with noting(held), nullcontext() if self._compiled else inputs:
                replay = self._record(recorded)
        except Exception as error:  # whatever an operator raises that waits for the device, or allocates on the host
            if is_not_of_the_trial(error, outer):
                raise
            self.forget()
            self.failed = True
            warn(f"compile asks for CUDA graphs, and recording one failed: {reason(error)} Going on without graphs")
            return first
        self._recordings[signature] = Recording(first, replay, [*held, *inputs.tensors.values()])
        return first

    def _result(self, name: str, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or any(leaf is place for place in self._places.values()):
            return leaf
        return self.placed(name, leaf)

    def forget(self) -> bool:
        """Frees all recordings; returns whether there were any."""
        found = bool(self._recordings)
        self._recordings.clear()
        return found

    def clear(self) -> None:
        """Frees all recordings and places."""
        self.forget()
        self._places.clear()


def there_are_on(device: torch.device) -> bool:
    """Returns whether functions can be recorded on a device, with a warning if they cannot."""
    if device.type == "cuda":
        return True
    warn(f"compile asks for CUDA graphs, and the model is on {device}: its operators run as they are")
    return False
