"""torch.compile of the step's parts, with a cache that outlives the process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

F = TypeVar("F", bound=Callable[..., Any])
COMPILATIONS = 1024
CACHE = "TORCHINDUCTOR_CACHE_DIR"


def is_tracing() -> bool:
    """Whether operators become a graph, by torch.compile or by an export, and do not run."""
    if torch.compiler.is_compiling():
        return True
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return get_proxy_mode() is not None


ANCHOR = torch.zeros((), dtype=torch.float32, device="cpu", requires_grad=True)
TRACES_REQUIRES_GRAD = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 14)


def leaf(tensor: Tensor) -> Tensor:
    """The tensor cut off from what it was computed by, requiring a gradient. torch.autograd.grad() ends at it, so it changes nothing else.

    torch.compile of torch 2.11 does not trace requires_grad_(). There, a sum with a zero that requires a gradient does the same.
    """
    if torch.compiler.is_compiling() and not TRACES_REQUIRES_GRAD:
        return tensor.detach() + ANCHOR
    return tensor.detach().requires_grad_()


def is_failure(error: BaseException) -> bool:
    """Whether torch.compile could not trace or build; Inductor's errors included."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException  # here, since its import takes seconds

    return isinstance(error, (TorchDynamoException, FailOnRecompileLimitHit))


def keep_cache() -> None:
    """Compiled kernels go to the user's cache folder, unless TORCHINDUCTOR_CACHE_DIR names one: torch's default is the temporary folder."""
    if CACHE not in os.environ:
        home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        os.environ[CACHE] = str(Path(home) / "dtta_fast" / "inductor")


def compiled(function: F) -> F:
    """The function as one graph, a graph a shape; to be called under tracing()."""
    keep_cache()
    return cast(F, torch.compile(function, fullgraph=True, dynamic=False))


@contextmanager
def tracing() -> Iterator[None]:
    """Gradients inside a compiled function are traced, and a process may hold many sessions.

    Torch counts compilations by function, not by session, and with its limit of 8 the ninth model would not compile.
    """
    with torch._dynamo.config.patch(trace_autograd_ops=True, recompile_limit=COMPILATIONS, accumulated_recompile_limit=COMPILATIONS):
        yield


def compile_regions(regions: list[nn.Module]) -> None:
    """Compiles each module in place: equal ones share a compilation."""
    keep_cache()
    for region in regions:
        region.compile(fullgraph=True, dynamic=False)
