"""SGD, Adam and AdamW as functions: tensors in, tensors out, with torch.optim's formulas.

Elementwise, so parameters stacked over images are updated as if each image had an optimizer of its own.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Optimizer = Literal["sgd", "adam", "adamw"]
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # torch.optim's defaults

Tensors = tuple[Tensor, ...] | list[Tensor]
Slots = list[Tensors]


def init_slots(optimizer: Optimizer, parameters: Tensors) -> Slots:
    """The optimizer's memory at step 0: momentum for SGD, first and second moments for Adam and AdamW."""
    return [[torch.zeros_like(p) for p in parameters] for _ in range(1 if optimizer == "sgd" else 2)]


def update(
    optimizer: Optimizer,
    parameters: Tensors,
    gradients: Tensors,
    slots: Slots,
    step: Tensor,
    lr: Tensor,
    momentum: float,
    weight_decay: float,
) -> tuple[Tensors, Slots]:
    """One update; `step` (0-dim, 0 at the first call) and `lr` (0-dim) are tensors so that neither is baked into a graph."""
    if weight_decay and optimizer == "adamw":
        parameters = torch._foreach_mul(parameters, 1 - lr * weight_decay)
    elif weight_decay:
        gradients = torch._foreach_add(gradients, parameters, alpha=weight_decay)
    if optimizer == "sgd":
        velocity = torch._foreach_add(torch._foreach_mul(slots[0], momentum), gradients)
        return torch._foreach_sub(parameters, torch._foreach_mul(velocity, lr)), [velocity]
    first = torch._foreach_lerp(slots[0], gradients, 1 - BETA1)
    second = torch._foreach_addcmul(torch._foreach_mul(slots[1], BETA2), gradients, gradients, 1 - BETA2)
    count = (step + 1).to(lr.dtype)
    denominator = torch._foreach_div(torch._foreach_sqrt(second), (1 - BETA2**count).sqrt())
    change = torch._foreach_div(first, torch._foreach_add(denominator, EPSILON))
    return torch._foreach_sub(parameters, torch._foreach_mul(change, lr / (1 - BETA1**count))), [first, second]
