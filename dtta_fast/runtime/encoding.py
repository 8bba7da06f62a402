"""The state in which something is computed once, for all later calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def as_in_evaluation(*modules: nn.Module) -> Iterator[None]:
    """Puts modules in eval mode, without gradients and outside of the caller's autocast; each part's mode is restored at the end."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    kinds = {p.device.type for module in modules for p in module.parameters()} or {"cpu"}
    try:
        for part, _ in modes:
            part.training = False
        with torch.no_grad(), torch.autocast(kinds.pop(), enabled=False):
            yield
    finally:
        for part, mode in modes:
            part.training = mode
