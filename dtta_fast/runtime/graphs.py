"""CUDA graphs: records the kernels that a function of tensors launches, and launches them all at once from then on."""

from __future__ import annotations

import itertools
import os
import sys
import threading
import warnings
from collections.abc import Callable, Hashable, Iterable
from contextlib import nullcontext, suppress
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dtta_fast.runtime.constants import noting
from dtta_fast.runtime.failures import is_the_callers, out_of_memory, reason
from dtta_fast.runtime.float32 import Switches
from dtta_fast.runtime.warn import warn

T = TypeVar("T")
RECORDINGS, PLACES, TOKENS = 64, 1024, 4096  # that a session keeps
_CAPTURING = threading.RLock()  # a capture waits for the whole device, which would break another one


class Recorder(Protocol):
    """Records functions that write their results to tensors which exist already."""

    def __call__(self, function: Callable[[], Any]) -> Callable[[], None]:
        """Returns a function that launches the same kernels on the same memory. Recording itself changes no tensor."""

    def fresh(self) -> None:
        """Begins anew, after all recordings are gone."""


class CudaGraphs(Recorder):
    """Records CUDA graphs on one device. They share memory, since none of them runs while another does."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    def __call__(self, function: Callable[[], Any]) -> Callable[[], None]:
        # if a capture fails, torch leaves its stream in place: the outer context puts the caller's back
        with _CAPTURING, torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.current_stream(self._device)):
            self._stream = self._stream or torch.cuda.Stream(self._device)
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            torch._C._cuda_clearCublasWorkspaces()  # so that this graph uses one in its own memory, and not another session's
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("error", message="The CUDA Graph is empty")
                    with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                        function()
            except BaseException:
                with suppress(Exception):  # torch 2.11 goes on allocating to the pool of a capture that failed
                    torch._C._cuda_endAllocateToPool(self._device.index or 0, self._pool)
                raise
            finally:
                torch._C._cuda_clearCublasWorkspaces()
        return graph.replay

    def fresh(self) -> None:
        torch.cuda.synchronize(self._device)  # the last replay may be running
        self._pool = None  # torch refuses a pool that no graph uses any more


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

    compiled: whether torch.compile compiled parts of the functions. Compiled code does not run while operators are watched, so the tensors
    that it reads are those given to run().
    """

    def __init__(self, device: torch.device, compiled: bool, record: Recorder | None = None) -> None:
        self._device, self._compiled, self._given = device, compiled, record
        self._record: Recorder = CudaGraphs(device) if record is None else record
        self._recordings: dict[Hashable, Recording] = {}  # the one used last is last
        self._places: dict[Hashable, Tensor] = {}
        self._tokens: dict[Hashable, int] = {}
        self._next = itertools.count()
        self._switches = Switches.now()  # which kernels compute float32 products; another thread's session may have changed them
        self.failed = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Graphs:
        return Graphs(self._device, self._compiled, self._given)  # a graph is of its own tensors

    def begin(self) -> None:
        """Begins a call: frees everything if many shapes have left their places behind, and looks at torch's switches."""
        if len(self._places) > PLACES:
            self.clear()
        self._switches = Switches.now()

    def place(self, name: str, shape: Iterable[int], dtype: torch.dtype) -> Tensor:
        """Returns an unwritten tensor, at an address that is the same for each name, shape and dtype."""
        key = name, tuple(shape), dtype
        if key not in self._places:
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

    def run(
        self, name: str, function: Callable[[], T], *tensors: Tensor, given: Hashable = (), held: Callable[[], Iterable[Tensor]] = tuple
    ) -> T:
        """Computes function(): as it is the first time, which loads and compiles what it needs, and is then recorded; later by a replay.

        Its results are copied to places of the function's name: they are valid until a function of this name runs again. If a function
        cannot be recorded, all of them run as they are from then on, with a warning. With DTTA_FAST_STRICT=1 the error is raised.

        Args:
            tensors: what the function reads and writes; a recording is for their shapes and addresses.
            given: whatever else it depends on.
            held: returns other tensors that it reads. They are kept alive.
        """
        if self.failed:
            return function()
        signature = name, given, self.token(tensors), self._switches
        if signature in self._recordings:
            recording = self._recordings[signature] = self._recordings.pop(signature)
            recording.replay()
            known: T = recording.found
            return known
        leaves, form = pytree.tree_flatten(function())
        results = [self._result(f"{name} {i}", leaf) for i, leaf in enumerate(leaves)]
        first: T = pytree.tree_unflatten(results, form)

        def recorded() -> None:
            found = pytree.tree_leaves(function())
            with torch.no_grad():
                for place, leaf in zip(results, found, strict=True):
                    if isinstance(leaf, Tensor) and leaf is not place:
                        place.copy_(leaf)

        while len(self._recordings) >= RECORDINGS:
            del self._recordings[next(iter(self._recordings))]
        kept: list[Any] = [*tensors, *held()]
        outer = sys.exc_info()[1]
        try:
            try:
                replay = self._recorded(recorded, kept)
            except Exception as error:
                if not out_of_memory(error) or not self.forget():
                    raise
                replay = self._recorded(recorded, kept)  # without the memory of the others
        except Exception as error:  # whatever an operator raises that waits for the device, or allocates on the host
            if is_the_callers(error, outer) or os.environ.get("DTTA_FAST_STRICT") == "1":
                raise
            self.forget()
            self.failed = True
            warn(f"compile asks for CUDA graphs, and recording one failed: {reason(error)} Going on without graphs")
            return first
        self._recordings[signature] = Recording(first, replay, kept)
        return first

    def _recorded(self, function: Callable[[], None], kept: list[Any]) -> Callable[[], None]:
        inputs = _Inputs()
        with noting(kept), nullcontext() if self._compiled else inputs:
            replay = self._record(function)
        kept += inputs.tensors.values()
        return replay

    def _result(self, name: str, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or any(leaf is place for place in self._places.values()):
            return leaf
        return self.placed(name, leaf)

    def forget(self) -> bool:
        """Frees all recordings; returns whether there were any."""
        found = bool(self._recordings)
        self._recordings.clear()
        if found:
            self._record.fresh()
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
