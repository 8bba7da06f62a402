"""torch.compile of the step's parts, with a cache that outlives the process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

F = TypeVar("F", bound=Callable[..., Any])
FAILURES = (TorchDynamoException,)  # what torch.compile raises where it cannot trace or build, Inductor's errors included
CACHE = "TORCHINDUCTOR_CACHE_DIR"


def keep_cache() -> None:
    """Compiled kernels go to the user's cache folder, unless TORCHINDUCTOR_CACHE_DIR names one: torch's default is the temporary folder."""
    if CACHE not in os.environ:
        home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        os.environ[CACHE] = str(Path(home) / "dtta_fast" / "inductor")


def compiled(function: F) -> F:
    """The function as one graph, a graph a shape. Gradients inside it are traced too."""
    keep_cache()
    traced = torch.compile(function, fullgraph=True, dynamic=False)

    def run(*arguments: Any, **keywords: Any) -> Any:
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            return traced(*arguments, **keywords)

    return run  # type: ignore[return-value]


def compile_regions(regions: list[nn.Module]) -> None:
    """Compiles each module in place: equal ones share a compilation."""
    keep_cache()
    for region in regions:
        region.compile(fullgraph=True, dynamic=False)
