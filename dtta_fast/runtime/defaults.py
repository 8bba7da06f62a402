"""Fixes torch's default dtype and device while a third-party library creates tensors, since a program may have set them to anything."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

_ONE_AT_A_TIME = threading.RLock()  # otherwise a second thread would mistake the first one's float32 for the program's setting


@contextmanager
def float32_on_cpu() -> Iterator[None]:
    """Makes float32 and the CPU torch's defaults for a block or a decorated function, and then restores the previous settings.

    The default device is per thread; the default dtype is global to the process, and is not touched if it is already float32.
    """
    with _ONE_AT_A_TIME:
        before = torch.get_default_dtype()
        if before != torch.float32:
            torch.set_default_dtype(torch.float32)
        try:
            # only if another device is set, because transformers requires accelerate inside a device context
            with nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"):
                yield
        finally:
            if before != torch.float32:
                torch.set_default_dtype(before)
