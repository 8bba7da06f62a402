"""The optimizers on the device against torch.optim's plain loops on the CPU, with weights as the engine lays them out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dtta_fast.core.optimizers import init_slots, rate, update_
from dtta_fast.core.weights import copies, in_dtypes_of

pytestmark = pytest.mark.gpu
LR = 2**-7  # float32 holds it exactly, and the GPU's optimizers take float32 rates
CASES = [
    ("sgd", 0.0, 0.0),
    ("sgd", 0.9, 0.0),
    ("sgd", 0.9, 0.1),
    ("adam", 0.0, 0.0),
    ("adam", 0.0, 0.1),
    ("adamw", 0.0, 0.0),
    ("adamw", 0.0, 0.1),
]


class Weights(nn.Module):
    """Matrices, a convolution, a vector and a single number, large enough for several blocks of a kernel."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in {"matrix": (65, 257), "small": (7, 3), "convolution": (8, 3, 3, 3), "vector": (129,), "number": ()}.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))


def torch_optim(name: str, parameters: list[Tensor], momentum: float, weight_decay: float) -> torch.optim.Optimizer:
    plain = {"lr": LR, "weight_decay": weight_decay, "foreach": False, "fused": False}
    if name == "sgd":
        return torch.optim.SGD(parameters, momentum=momentum, **plain)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name](parameters, **plain)


def laid_otherwise(gradient: Tensor) -> Tensor:
    """The same numbers in memory in the opposite order of dimensions, as a backward may give them."""
    order = tuple(reversed(range(gradient.ndim)))
    return gradient.permute(order).contiguous().permute(order)


@pytest.mark.parametrize("images", [None, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("name", "momentum", "weight_decay"), CASES)
def test_as_torch_optim(device, name, momentum, weight_decay, dtype, images):
    """For one set of weights, and for images side by side, each as if it had an optimizer of its own. The weights of a bfloat16 module move
    in float32."""
    module = Weights(dtype).to(device)
    own = copies(dict(module.named_parameters()), images, batched=True)
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    assert {p.dtype for p in own.values()} == {kept}
    slots, lr = init_slots(name, list(own.values()), images or 1), rate(LR, torch.device(device))
    each = [[p.detach().cpu().to(kept).clone().requires_grad_() for p in module.parameters()] for _ in range(images or 1)]
    references = [torch_optim(name, weights, momentum, weight_decay) for weights in each]
    generator = torch.Generator().manual_seed(1)
    for step in range(3):
        gradients = [torch.randn(p.shape, dtype=kept, generator=generator) * 10.0 ** (step - 1) for p in own.values()]
        for i, (weights, optimizer) in enumerate(zip(each, references, strict=True)):
            for p, gradient in zip(weights, gradients, strict=True):
                p.grad = (gradient if images is None else gradient[i]).clone()
            optimizer.step()
        there = [laid_otherwise(gradient.to(device)) for gradient in gradients]
        update_(name, list(own.values()), there, slots, torch.tensor(step, device=device), lr, momentum, weight_decay)
    # in float32 the kernel's bias correction 1 - 0.999^t is off by 3e-5, and so is a step of 0.008
    tolerance = 2e-6 if kept == torch.float32 else 1e-10
    for i, weights in enumerate(each):
        for (label, found), expected in zip(own.items(), weights, strict=True):
            mine = (found if images is None else found[i]).cpu()
            torch.testing.assert_close(mine, expected.detach(), rtol=tolerance, atol=tolerance, msg=lambda text, at=label: f"{at}: {text}")
    assert {p.dtype for p in in_dtypes_of(module, own).values()} == {dtype}


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_the_storage_of_fewer_images(device, name):
    """A batch that is smaller than the last one takes the first images of the storage, and leaves the others alone."""
    own = copies(dict(Weights(torch.float32).to(device).named_parameters()), 3, batched=True)
    before = {label: p.clone() for label, p in own.items()}
    slots = init_slots(name, list(own.values()), 3)
    gradients = [torch.ones_like(p) for p in own.values()]
    part = [p[:2] for p in own.values()], [g[:2] for g in gradients], [[slot[:2] for slot in kind] for kind in slots]
    update_(name, *part, torch.tensor(0, device=device), rate(LR, torch.device(device)), 0.9, 0.0)
    for label, p in own.items():
        assert torch.equal(p[2], before[label][2])
        torch.testing.assert_close(p[:2], before[label][:2] - LR, rtol=0, atol=1e-6)  # a gradient of ones makes every first step the rate
