"""The optimizers against torch.optim, in the precisions that models come in."""

from __future__ import annotations

import bitsandbytes
import pytest
import torch

from dtta_fast.core.optimizers import _by_operators_, init_slots, update_

CASES = [
    ("sgd", 0.0, 0.0),
    ("sgd", 0.9, 0.0),
    ("sgd", 0.9, 0.1),
    ("adam", 0.0, 0.0),
    ("adam", 0.0, 0.1),
    ("adamw", 0.0, 0.0),
    ("adamw", 0.0, 0.1),
]


@pytest.mark.parametrize(("name", "momentum", "weight_decay"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("update", [update_, _by_operators_])
def test_as_torch_optim(device, dtype, name, momentum, weight_decay, update):
    generator = torch.Generator().manual_seed(0)
    own = [torch.randn(7, 3, dtype=dtype, generator=generator).to(device), torch.randn(5, dtype=dtype, generator=generator).to(device)]
    theirs = [p.clone().requires_grad_() for p in own]
    if name == "sgd":
        optimizer = torch.optim.SGD(theirs, 1e-2, momentum=momentum, weight_decay=weight_decay)
    else:
        optimizer = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name](theirs, 1e-2, weight_decay=weight_decay)
    slots, lr = init_slots(name, own), torch.tensor(1e-2, dtype=torch.float64, device=device)
    for step in range(6):
        gradients = [
            torch.randn(p.shape[::-1], dtype=dtype, generator=generator).to(device).permute(*reversed(range(p.ndim))) for p in own
        ]  # of other strides
        for p, gradient in zip(theirs, gradients, strict=True):
            p.grad = gradient.clone()
        optimizer.step()
        update(name, own, gradients, slots, torch.tensor(step, device=device), lr, momentum, weight_decay)
        tolerance = 1e-7 if update is update_ else 1e-12  # the fused kernels count steps in float32
        if dtype == torch.float32:
            tolerance = 2e-6
        for mine, other in zip(own, theirs, strict=True):
            torch.testing.assert_close(mine, other.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("images", [1, 3])
def test_8_bits_as_bitsandbytes(images):
    """Large and small tensors, sizes that no block divides; images side by side as if each had an optimizer of its own."""
    generator = torch.Generator().manual_seed(0)
    own = [torch.randn(images, *shape, generator=generator) for shape in ((67, 111), (4096,), (31, 5))]
    theirs = [[p[i].clone().requires_grad_() for p in own] for i in range(images)]
    optimizers = [bitsandbytes.optim.AdamW8bit(parameters, 1e-2, weight_decay=0.1) for parameters in theirs]
    slots, lr = init_slots("adam8bit", own, images), torch.tensor(1e-2, dtype=torch.float64)
    assert [slot.dtype for slot in slots[0]] == [torch.uint8, torch.uint8, torch.float32]
    for step in range(6):
        gradients = [torch.randn(p.shape, generator=generator) * 10 ** torch.randn(len(p), *[1] * (p.ndim - 1)) for p in own]
        for i in range(images):
            for p, gradient in zip(theirs[i], gradients, strict=True):
                p.grad = gradient[i].clone()
            optimizers[i].step()
        update_("adam8bit", own, gradients, slots, torch.tensor(step), lr, 0.0, 0.1)
        for i in range(images):
            for mine, other in zip(own, theirs[i], strict=True):
                torch.testing.assert_close(mine[i], other.detach(), rtol=2e-6, atol=2e-6)
