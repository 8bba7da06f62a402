"""torch's defaults while a library of others makes tensors: its dtype and its device, which a program may have set to anything."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

_ONE_AT_A_TIME = threading.RLock()  # or a second thread would take the first one's float32 for what was set


@contextmanager
def float32_on_cpu() -> Iterator[None]:
    """Makes float32 and the CPU torch's defaults for a block, or for a function that it decorates, and puts back what was set.

    The device is this thread's own; the dtype is one for the process, and is left alone where it is float32 already.
    """
    with _ONE_AT_A_TIME:
        before = torch.get_default_dtype()
        if before != torch.float32:
            torch.set_default_dtype(torch.float32)
        try:
            # only where another one is set: transformers asks for accelerate inside a device's context
            with nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"):
                yield
        finally:
            if before != torch.float32:
                torch.set_default_dtype(before)
