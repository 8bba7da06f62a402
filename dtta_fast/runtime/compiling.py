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
    """Returns whether operators are being traced into a graph, by torch.compile or an export, instead of being run."""
    if torch.compiler.is_compiling():
        return True
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return get_proxy_mode() is not None


ANCHOR = torch.zeros((), dtype=torch.float32, device="cpu", requires_grad=True)
TRACES_REQUIRES_GRAD = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 14)


def leaf(tensor: Tensor) -> Tensor:
    """Detaches the tensor from its graph and makes it require a gradient. torch.autograd.grad() stops at it, so nothing else is affected.

    torch.compile in torch 2.11 cannot trace requires_grad_(). There, adding a zero that requires a gradient has the same effect.
    """
    if torch.compiler.is_compiling() and not TRACES_REQUIRES_GRAD:
        return tensor.detach() + ANCHOR
    return tensor.detach().requires_grad_()


def is_failure(error: BaseException) -> bool:
    """Returns whether the error means that torch.compile failed to trace or build, including Inductor's errors."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException  # imported here, since the import takes seconds

    return isinstance(error, (TorchDynamoException, FailOnRecompileLimitHit))


def keep_cache() -> None:
    """Stores compiled kernels in the user's cache folder unless TORCHINDUCTOR_CACHE_DIR is set; torch's default is the temporary folder."""
    if CACHE not in os.environ:
        home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        os.environ[CACHE] = str(Path(home) / "dtta_fast" / "inductor")


def compiled(function: F) -> F:
    """Compiles the function into a single graph, with one graph per input shape. Call the result under tracing()."""
    keep_cache()
    return cast(F, torch.compile(function, fullgraph=True, dynamic=False))


@contextmanager
def tracing() -> Iterator[None]:
    """Enables tracing of gradients inside a compiled function, and allows many sessions per process.

    Torch counts compilations per function, not per session, so with its default limit of 8 a ninth model would not compile.
    """
    with torch._dynamo.config.patch(trace_autograd_ops=True, recompile_limit=COMPILATIONS, accumulated_recompile_limit=COMPILATIONS):
        yield


def compile_regions(regions: list[nn.Module]) -> None:
    """Compiles each module in place; identical modules share a compilation."""
    keep_cache()
    for region in regions:
        region.compile(fullgraph=True, dynamic=False)
