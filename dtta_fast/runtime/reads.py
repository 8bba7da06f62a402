"""Reads values from the device. A call reads in no other way, since each read makes the host wait for all preceding work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def read(*masks: Tensor) -> list[Any]:
    """Reads bool tensors in one transfer and returns them as nested lists of bools with the same shapes."""
    found = torch.cat([mask.flatten() for mask in masks]).cpu()
    parts = found.split([mask.numel() for mask in masks])
    return [part.view(mask.shape).tolist() for part, mask in zip(parts, masks, strict=True)]


class Checks:
    """A call's pending value checks. On a CPU reading a value costs nothing, so they are made immediately."""

    def __init__(self) -> None:
        self._owed: list[tuple[Tensor, Callable[[], str]]] = []

    def require(self, fine: Tensor, error: Callable[[], str]) -> None:
        """Requires `fine`, a 0-dim bool tensor, to be true; error() returns the message if it is not.

        Raises:
            ValueError: `fine` is false and on a CPU.
        """
        self._owed.append((fine, error))
        if fine.device.type == "cpu":
            self.settle()

    def settle(self, *wanted: Tensor) -> list[Any]:
        """Makes the pending checks, and reads the `wanted` bool tensors in the same transfer; see runtime.reads.read().

        Raises:
            ValueError: a check fails.
        """
        owed, self._owed = self._owed, []
        if not owed and not wanted:
            return []
        found = read(*(fine for fine, _ in owed), *wanted)
        for (_, error), fine in zip(owed, found, strict=False):
            if not fine:
                raise ValueError(error())
        return found[len(owed) :]
