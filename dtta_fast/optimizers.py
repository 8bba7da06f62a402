"""SGD, Adam and AdamW on plain tensors, by torch.optim's kernels, and Adam with moments of 8 bits by bitsandbytes'.

Parameters stacked over images are updated as if each image had an optimizer of its own.
"""

from __future__ import annotations

import math
import os
from typing import Literal

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from dtta_fast import adam8bit
from dtta_fast.runtime import demands
from dtta_fast.runtime.compiling import is_tracing

Optimizer = Literal["sgd", "adam", "adamw", "adam8bit"]
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # torch.optim's defaults

Tensors = list[Tensor]
Slots = list[Tensors]


def rate(value: float, device: torch.device) -> Tensor:
    """A learning rate as the 0-dim tensor that update_() takes: float64, but float32 on CUDA, whose kernels read no other. There a rate
    beyond float32's range is its largest number."""
    if device.type != "cuda":
        return torch.full((), value, dtype=torch.float64, device=device)
    return torch.full((), min(value, torch.finfo(torch.float32).max), dtype=torch.float32, device=device)


def init_slots(optimizer: Optimizer, parameters: Tensors, images: int = 1) -> Slots:
    """The optimizer's memory at step 0: momentum for SGD, first and second moments for Adam, and their scales where they are of 8 bits.

    images: how many stand along the parameters' first dimension.
    """
    if optimizer != "adam8bit":
        return [[torch.zeros_like(p) for p in parameters] for _ in range(1 if optimizer == "sgd" else 2)]
    dtypes = [torch.uint8 if adam8bit.fits(p, images) else p.dtype for p in parameters]
    moments = [[torch.zeros_like(p, dtype=dtype) for p, dtype in zip(parameters, dtypes, strict=True)] for _ in range(2)]
    return moments + [[adam8bit.init_scales(p, images) for p in parameters] for _ in range(2)]


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
    """One update in place, of dense parameters, each laid out in memory as its slots are.

    `step` is a 0-dim int64 tensor, 0 at the first call; `lr` is what rate() gives.

    By torch's fused optimizers, one pass over memory, where one operator after the other took a third of an adaptation of 16 images on a
    CPU. torch.compile has no form of them (SGD's has no meta kernel), and fuses the operators itself.
    """
    if is_tracing():
        _by_operators_(optimizer, parameters, gradients, slots, step, lr, momentum, weight_decay)
        return
    if optimizer == "adam8bit":
        _with_8_bits_(parameters, gradients, slots, step, lr, weight_decay)
        return
    # the kernels walk memory, whatever the strides
    gradients = [g if g.stride() == p.stride() else torch.empty_like(p).copy_(g) for g, p in zip(gradients, parameters, strict=True)]
    # Adam counts up in each of them
    steps = [] if optimizer == "sgd" else list(step.float().expand(len(parameters)).clone().unbind())
    if os.environ.get("DTTA_FAST_STRICT") == "1":  # the checks take longer than the update
        demands.fused_optimizer(parameters, gradients, slots, steps, lr)
    if optimizer == "sgd":
        velocity: list[Tensor | None] = list(slots[0]) if momentum else [None] * len(parameters)
        sgd(
            parameters, gradients, velocity, fused=True, lr=lr,
            weight_decay=weight_decay, momentum=momentum, dampening=0.0, nesterov=False, maximize=False,
        )  # fmt: skip
        return
    adam(
        parameters, gradients, slots[0], slots[1], [], steps, fused=True, decoupled_weight_decay=optimizer == "adamw",
        amsgrad=False, beta1=BETA1, beta2=BETA2, lr=lr, weight_decay=weight_decay, eps=EPSILON, maximize=False,
    )  # fmt: skip


def _with_8_bits_(parameters: Tensors, gradients: Tensors, slots: Slots, step: Tensor, lr: Tensor, weight_decay: float) -> None:
    """Decoupled weight decay, as in bitsandbytes. Its kernel takes the step as a number, so a GPU is waited for."""
    small = [i for i, first in enumerate(slots[0]) if first.dtype != torch.uint8]
    if small:
        chosen = [[tensors[i] for i in small] for tensors in (parameters, gradients, *slots[:2])]
        update_("adamw", chosen[0], chosen[1], chosen[2:], step, lr, 0.0, weight_decay)
    count, rate = int(step) + 1, float(lr)
    for p, gradient, first, second, scale1, scale2 in zip(parameters, gradients, *slots, strict=True):
        if first.dtype == torch.uint8:
            adam8bit.update_(p, gradient.contiguous(), [first, second], [scale1, scale2], count, rate, weight_decay)


def _by_operators_(
    optimizer: Optimizer,
    parameters: Tensors,
    gradients: Tensors,
    slots: Slots,
    step: Tensor,
    lr: Tensor,
    momentum: float,
    weight_decay: float,
) -> None:
    # exported, lr is a constant, and Inductor's foreach operators take none that is a tensor
    if weight_decay and optimizer == "adamw":
        for p in parameters:
            p.mul_(1 - lr * weight_decay)
    elif weight_decay:
        gradients = list(torch._foreach_add(gradients, parameters, alpha=weight_decay))
    if optimizer == "sgd":
        (velocity,) = slots
        torch._foreach_mul_(velocity, momentum)
        torch._foreach_add_(velocity, gradients)
        torch._foreach_sub_(parameters, [v * lr for v in velocity])
        return
    first, second = slots
    torch._foreach_lerp_(first, gradients, 1 - BETA1)
    torch._foreach_mul_(second, BETA2)
    torch._foreach_addcmul_(second, gradients, gradients, 1 - BETA2)
    count = step.double() + 1
    # by exp, which Inductor computes once for all weights; a power it would put into the loop over each of them
    correction1, correction2 = (1 - (count * math.log(beta)).exp() for beta in (BETA1, BETA2))
    denominator = torch._foreach_sqrt(second)
    torch._foreach_div_(denominator, correction2.sqrt())
    torch._foreach_add_(denominator, EPSILON)
    torch._foreach_div_(denominator, -lr / correction1)
    torch._foreach_addcdiv_(parameters, first, denominator)
