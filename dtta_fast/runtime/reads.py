"""The only way in which a call reads values from its device, since each read makes the host wait for all preceding work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def read_one(mask: Tensor) -> Any:
    """Reads the values of one mask; see read()."""
    return read(mask)[0]


def read(*masks: Tensor) -> list[Any]:
    """Reads bool tensors in one transfer and returns them as nested lists of bools with the same shapes."""
    found = torch.cat([mask.flatten() for mask in masks]).cpu()
    parts = found.split([mask.numel() for mask in masks])
    return [part.view(mask.shape).tolist() for part, mask in zip(parts, masks, strict=True)]
