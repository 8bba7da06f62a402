"""CUDA graphs: records the kernels that a function of tensors launches, and launches them all at once from then on."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dtta_fast.runtime.warn import warn

T = TypeVar("T")
# runs a function once and returns its result, and what computes the result again, in the same memory, from what the inputs then hold
Recorder = Callable[[Callable[[], Any]], tuple[Any, Callable[[], None]]]
SHAPES = 24  # recordings that are kept: a recording holds all the memory that its function needs


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


def cuda_graph(function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """Captures a function's kernels in a CUDA graph, with memory of its own. Capturing does not run them.

    A graph holds addresses, not tensors, so the result of this function keeps every tensor that the kernels use alive.
    """
    graph, inputs = torch.cuda.CUDAGraph(), _Inputs()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"), inputs:
        found = function()
    held = inputs.tensors

    def replay(held: dict[int, Tensor] = held) -> None:
        graph.replay()

    return found, replay


class Graphs:
    """The recordings of a session, each for one function with tensors at fixed addresses.

    A recording's results lie in the same memory each time: they are valid until the function runs again.
    """

    def __init__(self, record: Recorder = cuda_graph) -> None:
        self._record = record
        self._recordings: dict[Hashable, tuple[Any, Callable[[], None]]] = {}
        self._fixed: dict[Hashable, Tensor] = {}
        self.failed = False

    def place(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns an unwritten tensor, at an address that is the same for each name, shape and dtype."""
        key = name, torch.Size(shape), dtype
        if key not in self._fixed:
            self._fixed[key] = torch.empty(shape, dtype=dtype, device=device)
        return self._fixed[key]

    @torch.no_grad()
    def fixed(self, name: str, tensor: Tensor, device: torch.device | None = None) -> Tensor:
        """Returns the tensor's values at an address that is the same for every tensor of this name, shape and dtype.

        device: where to; None is the tensor's own.
        """
        held = self.place(name, tensor.shape, tensor.dtype, device or tensor.device)
        if held.data_ptr() != tensor.data_ptr() or held.stride() != tensor.stride():
            held.copy_(tensor, non_blocking=True)
        return held

    def run(self, key: Hashable, function: Callable[[], T], *tensors: Tensor) -> T:
        """Computes function(): as it is the first time, which loads and compiles what it needs, and is then recorded; later by a replay.

        key: the function's name, and whatever else its recording depends on. tensors: what it reads and writes; a recording is for
        their shapes and addresses. If a function cannot be recorded, all of them run as they are from then on, with one warning.
        """
        if self.failed:
            return function()
        signature = (key, *((tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors))
        if signature in self._recordings:
            found, replay = self._recordings[signature]
            replay()
            known: T = found
            return known
        first = function()
        while len(self._recordings) >= SHAPES:
            del self._recordings[next(iter(self._recordings))]
        try:
            self._recordings[signature] = self._record(function)
        except torch.OutOfMemoryError:
            raise  # fewer images at once may fit
        except Exception as error:  # whatever an operator raises that waits for the device, or allocates on the host
            self.clear()
            self.failed = True
            warn(f"compile asks for CUDA graphs, and recording one failed: {str(error).strip().splitlines()[0]} Going on without graphs")
            return first
        found = self._recordings[signature][0]
        with torch.no_grad():  # at the addresses that the other functions' recordings are to read
            for own, values in zip(_tensors(found), _tensors(first), strict=True):
                if own.data_ptr() != values.data_ptr():
                    own.copy_(values)
        result: T = found
        return result

    def forget(self) -> None:
        """Frees all recordings."""
        self._recordings.clear()

    def clear(self) -> None:
        """Frees all recordings and the tensors at fixed addresses."""
        self.forget()
        self._fixed.clear()


def there_are_on(device: torch.device) -> bool:
    """Returns whether functions can be recorded on a device, with a warning if they cannot."""
    if device.type == "cuda":
        return True
    warn(f"compile asks for CUDA graphs, and the model is on {device}: its operators run as they are")
    return False
