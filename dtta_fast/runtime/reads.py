"""The one way in which a call reads values from its device, since every read makes the host wait for all the work before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def read_one(mask: Tensor) -> Any:
    """The values of one mask; see read()."""
    return read(mask)[0]


def read(*masks: Tensor) -> list[Any]:
    """The values of bool tensors as nested lists of bools in their shapes, in one transfer."""
    found = torch.cat([mask.flatten() for mask in masks]).cpu()
    parts = found.split([mask.numel() for mask in masks])
    return [part.view(mask.shape).tolist() for part, mask in zip(parts, masks, strict=True)]
