"""The ops against eager torch and against torch.compile of their reference, on every device here; ratios hold within one run.

pytest bench/kernels --benchmark-json=bench/results/kernels_cpu.json --benchmark-save-data --benchmark-disable-gc

180 pairs of one latent, float32, the noise drawn anew in every round. extra_info has the bytes that must move (each tensor read or
written once), the elements, and for the copy what the machine reaches: bench/readme.py divides.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dtta_fast.kernels import Pairs, add_noise, denoising_loss, denoising_loss_and_gradient, mix_condition, reference
from dtta_fast.runtime.environment import describe

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
PAIRS = 180


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[32, 64], ids=["4x32x32", "4x64x64"])
def setting(request: pytest.FixtureRequest, device: str) -> dict[str, object]:
    size = request.param
    table = torch.rand(1000, 5, device=device) + 0.5
    table[:, 2:] = torch.tensor([0.0, 1, 1])  # ε-prediction, as in eager torch below
    return {
        "x0": torch.randn(1, 4, size, size, device=device),
        "table": table,
        "timesteps": torch.randint(0, 1000, (1, PAIRS), device=device),
        "image_ids": torch.zeros(1, dtype=torch.int64, device=device),
        "seed": 1,
        "step": torch.zeros((), dtype=torch.int64, device=device),
    }


def measure(benchmark, device: str, run: Callable[[], object], tensors: int, elements: int) -> None:
    def round() -> None:
        run()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info.update(device=device, elements=elements, bytes=4 * tensors * elements, environment=describe())
    benchmark.pedantic(round, rounds=40, iterations=1, warmup_rounds=5)


def test_copy(benchmark, device, setting):
    source = torch.randn(PAIRS, *setting["x0"].shape[1:], device=device)
    target = torch.empty_like(source)
    measure(benchmark, device, lambda: target.copy_(source), 2, source.numel())


def eager_noise(x0: Tensor, table: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    noise = torch.randn(PAIRS, *x0.shape[1:], device=x0.device)
    a, s = table[timesteps[0]][:, :2, None, None, None].unbind(1)
    return a * x0 + s * noise, noise


@pytest.mark.parametrize("form", ["eager", "compiled reference", "op"])
def test_add_noise(benchmark, device, setting, form):
    compiled = torch.compile(reference.add_noise, fullgraph=True)
    pairs = Pairs(**setting)
    run = {
        "eager": lambda: eager_noise(setting["x0"], setting["table"], setting["timesteps"]),
        "compiled reference": lambda: compiled(pairs, torch.float32),
        "op": lambda: add_noise(pairs, torch.float32),
    }[form]
    measure(benchmark, device, run, 1, PAIRS * setting["x0"].numel())


@pytest.mark.parametrize("form", ["eager", "compiled reference", "op", "op, one pass"])
def test_add_noise_and_loss_with_gradient(benchmark, device, setting, form):
    """From x0 and a prediction to x_t, the loss and its gradient to the prediction."""
    prediction = torch.randn(PAIRS, *setting["x0"].shape[1:], device=device, requires_grad=True)
    upstream = torch.full((1, PAIRS), 1 / PAIRS, device=device)
    pairs = Pairs(**setting)

    def eager() -> Tensor:
        _, noise = eager_noise(setting["x0"], setting["table"], setting["timesteps"])
        return torch.autograd.grad(F.mse_loss(prediction, noise), prediction)[0]

    def plain(predicted: Tensor) -> object:
        return reference.add_noise(pairs, torch.float32), reference.denoising_loss(predicted, pairs, False, upstream)

    compiled = torch.compile(plain, fullgraph=True)

    def op() -> Tensor:
        add_noise(pairs)
        return torch.autograd.grad(denoising_loss(prediction, pairs).mean(), prediction)[0]

    run = {
        "eager": eager,
        "compiled reference": lambda: compiled(prediction.detach()),
        "op": op,
        "op, one pass": lambda: (add_noise(pairs, torch.float32), denoising_loss_and_gradient(prediction.detach(), upstream, pairs)),
    }[form]
    measure(benchmark, device, run, 3, prediction.numel())


@pytest.mark.parametrize("top_k", [None, 5], ids=["all classes", "top 5"])
@pytest.mark.parametrize("form", ["eager", "compiled", "op"])
def test_mix_condition(benchmark, device, form, top_k):
    """Forward and backward to the logits for 16 images, 1000 classes and embeddings of 1152 numbers, those of DiT-XL."""
    logits = torch.randn(16, 1000, device=device, requires_grad=True)
    table, upstream = torch.randn(1000, 1152, device=device), torch.randn(16, 1152, device=device)

    def eager(logits: Tensor) -> Tensor:
        z = 6 * F.normalize(logits, dim=1)
        if top_k is None:
            return z.softmax(1) @ table
        chosen, classes = z.topk(top_k, dim=1)
        return torch.einsum("bk,bkd->bd", chosen.softmax(1), table[classes])

    mix = {"eager": eager, "compiled": torch.compile(eager), "op": lambda logits: mix_condition(logits, table, top_k, 6.0)}[form]
    measure(
        benchmark, device, lambda: torch.autograd.grad(mix(logits), logits, upstream), 2, table.numel() if top_k is None else 16 * 5 * 1152
    )
