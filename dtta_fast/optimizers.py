"""SGD, Adam and AdamW on plain tensors, with torch.optim's formulas.

Elementwise, so parameters stacked over images are updated as if each image had an optimizer of its own.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Optimizer = Literal["sgd", "adam", "adamw"]
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # torch.optim's defaults

Tensors = list[Tensor]
Slots = list[Tensors]


def init_slots(optimizer: Optimizer, parameters: Tensors) -> Slots:
    """The optimizer's memory at step 0: momentum for SGD, first and second moments for Adam and AdamW."""
    return [[torch.zeros_like(p) for p in parameters] for _ in range(slots(optimizer))]


def slots(optimizer: Optimizer) -> int:
    """Tensors of memory that it keeps for each parameter."""
    return 1 if optimizer == "sgd" else 2


@torch.no_grad()
def update_(
    optimizer: Optimizer,
    parameters: Tensors,
    gradients: Tensors,
    slots: Slots,
    step: Tensor,
    lr: Tensor,
    momentum: float,
    weight_decay: float,
) -> None:
    """One update of parameters and slots in place; `step` is a 0-dim tensor, 0 at the first call, `lr` a 0-dim float64 tensor: exact,
    and no reason for PyTorch to promote the parameters.

    In place since, with weights of their own for 50 images, making new tensors took half of an adaptation's time on a CPU.
    """
    if weight_decay and optimizer == "adamw":
        torch._foreach_mul_(parameters, 1 - lr * weight_decay)
    elif weight_decay:
        gradients = list(torch._foreach_add(gradients, parameters, alpha=weight_decay))
    if optimizer == "sgd":
        (velocity,) = slots
        torch._foreach_mul_(velocity, momentum)
        torch._foreach_add_(velocity, gradients)
        torch._foreach_sub_(parameters, torch._foreach_mul(velocity, lr))
        return
    first, second = slots
    torch._foreach_lerp_(first, gradients, 1 - BETA1)
    torch._foreach_mul_(second, BETA2)
    torch._foreach_addcmul_(second, gradients, gradients, 1 - BETA2)
    count = step.double() + 1
    denominator = torch._foreach_sqrt(second)
    torch._foreach_div_(denominator, (1 - BETA2**count).sqrt())
    torch._foreach_add_(denominator, EPSILON)
    torch._foreach_div_(denominator, -lr / (1 - BETA1**count))
    torch._foreach_addcdiv_(parameters, first, denominator)
