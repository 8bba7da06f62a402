"""SGD, Adam and AdamW on plain tensors with the kernels of torch.optim, and Adam with 8-bit moments with the kernels of bitsandbytes.

Parameters stacked over images are updated as if each image had its own optimizer.
"""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from dtta_fast.config import Optimizer
from dtta_fast.core import adam8bit
from dtta_fast.runtime import demands
from dtta_fast.runtime.compiling import is_tracing

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # torch.optim's defaults

Tensors = list[Tensor]
Slots = list[Tensors]


def rate(value: float, device: torch.device) -> Tensor:
    """Converts a learning rate to the 0-dim tensor that update_() takes: float64, but float32 on CUDA, whose kernels read nothing else.

    On CUDA, a rate beyond the range of float32 becomes the largest float32 number.
    """
    if device.type != "cuda":
        return torch.full((), value, dtype=torch.float64, device=device)
    return torch.full((), min(value, torch.finfo(torch.float32).max), dtype=torch.float32, device=device)


def init_slots(optimizer: Optimizer, parameters: Tensors, images: int = 1) -> Slots:
    """Initial optimizer state: momentum for SGD, first and second moments for Adam, and the scales of 8-bit moments.

    images: number of images stacked along the first dimension of the parameters.
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
    """Updates dense parameters once in place; each parameter has the same memory layout as its slots.

    `step` is a 0-dim int64 tensor, 0 at the first call; `lr` is a tensor from rate().

    Uses torch's fused optimizers, which make one pass over memory; separate operators took a third of the time of adapting to 16 images on
    a CPU. torch.compile does not support the fused optimizers (SGD's has no meta kernel), and fuses the separate operators itself.
    """
    if is_tracing():
        _by_operators_(optimizer, parameters, gradients, slots, step, lr, momentum, weight_decay)
        return
    if optimizer == "adam8bit":
        _with_8_bits_(parameters, gradients, slots, step, lr, weight_decay)
        return
    # the kernels run linearly over memory and ignore strides
    gradients = [g if g.stride() == p.stride() else torch.empty_like(p).copy_(g) for g, p in zip(gradients, parameters, strict=True)]
    # Adam increments each of these
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
    """Updates with 8-bit Adam and decoupled weight decay, as in bitsandbytes.

    The kernel takes the step as a Python number, so the host waits for a GPU.
    """
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
    # in an exported graph lr is a constant, and Inductor's foreach operators accept no constant tensor
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
    # use exp, which Inductor computes once for all weights; it would move a power into the loop over each weight
    correction1, correction2 = (1 - (count * math.log(beta)).exp() for beta in (BETA1, BETA2))
    denominator = torch._foreach_sqrt(second)
    torch._foreach_div_(denominator, correction2.sqrt())
    torch._foreach_add_(denominator, EPSILON)
    torch._foreach_div_(denominator, -lr / correction1)
    torch._foreach_addcdiv_(parameters, first, denominator)
