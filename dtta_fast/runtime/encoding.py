"""The state in which something is computed once, for all later calls."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from dtta_fast.runtime.private import evaluating

_ONE_AT_A_TIME = threading.RLock()  # a second thread would take the first one's eval mode for the module's own


@contextmanager
def as_in_evaluation(*modules: nn.Module) -> Iterator[None]:
    """Puts modules in eval mode, without gradients and outside of the caller's autocast; each part's mode is restored at the end."""
    with _ONE_AT_A_TIME, ExitStack() as stack:
        modes = [(part, part.training) for module in modules for part in module.modules()]
        stack.enter_context(torch.no_grad())
        for kind in {"cpu", *(p.device.type for module in modules for p in module.parameters() if p.device.type != "meta")}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        try:
            for module in modules:
                evaluating(module)
            yield
        finally:
            for part, mode in modes:
                part.training = mode
