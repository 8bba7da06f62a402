"""The ops on the device are held against float64: their error is at most twice that of plain torch in the same precision.

On a GPU the Triton kernels serve them. The cases cover every branch of the kernels with few compilations, which take half a second each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from dtta_fast.kernels import Pairs, add_noise, backends, denoising_loss, denoising_loss_and_gradient, gated_norm, mix_condition, reference

pytestmark = pytest.mark.gpu
FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
ODD, RAGGED, EVEN = (3, 5, 7), (3, 37, 41), (4, 16, 24)  # a tenth of a block of 1024, four and a half blocks, one and a half


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def setting(x0: Tensor, device: str) -> dict[str, Any]:
    """Draws with a v-prediction's target, a weight that is not 1, and seed, ids and pairs that need all their bits."""
    angle = torch.linspace(0.05, 1.5, 1000)
    table = torch.stack([angle.cos(), angle.sin(), -angle.sin(), angle.cos(), torch.full_like(angle, 0.7)], dim=1)
    return {
        "x0": x0.to(device),
        "table": table.to(device),
        "timesteps": torch.tensor([[0, 500, 999], [3, 250, 731]], device=device),
        "image_ids": torch.tensor([4, 2**32 - 1], device=device),
        "seed": 2**40 + 123,
        "step": torch.tensor(2, device=device),
        "pair0": 2**31 + 5,
    }


def in_float64(given: dict[str, Any]) -> dict[str, Any]:
    """The same arguments on the CPU. Floating-point tensors are float64, except the table."""
    moved = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in given.items()}
    floats = {name: value.double() for name, value in moved.items() if isinstance(value, Tensor) and value.is_floating_point()}
    return {**moved, **floats, "table": moved["table"]} if "table" in moved else {**moved, **floats}


@contextmanager
def poisoned() -> Iterator[None]:
    """Fills new memory with NaN, so that elements that a kernel leaves unwritten show."""
    deterministic, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert bool(torch.empty(7).isnan().all())
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def error(found: Tensor, truth: Tensor) -> float:
    """Root mean square, relative."""
    return float(((found.double().cpu() - truth).square().mean() / truth.square().mean()).sqrt())


def assert_as_exact(found: Tensor, plain: Tensor, truth: Tensor) -> None:
    assert found.dtype == plain.dtype
    assert found.shape == plain.shape
    floor = 2e-7  # float32's rounding, where plain torch happens to be exact
    assert error(found, truth) <= 2 * error(plain, truth) + floor


def test_triton_serves_the_gpu(gpu):
    assert backends.serving("cuda")[0] == "triton"


NOISINGS = [(FLOAT, FLOAT, ODD, False), (FLOAT, BF16, RAGGED, False), (HALF, HALF, EVEN, False), (FLOAT, FLOAT, RAGGED, True)]


@pytest.mark.parametrize(("kind", "dtype", "shape", "explicit"), NOISINGS)
def test_add_noise(device, kind, dtype, shape, explicit):
    given = setting(rand(2, *shape).to(kind), device)
    noise = rand(2, 3, *shape, seed=1).to(device) if explicit else None
    with poisoned():
        found = add_noise(Pairs(**given, noise=noise), dtype)
    plain = reference.add_noise(Pairs(**given, noise=noise), dtype)
    truth = reference.add_noise(Pairs(**in_float64({**given, "noise": noise})), torch.float64)
    assert_as_exact(found, plain, truth)


LOSSES = [
    (FLOAT, FLOAT, ODD, False, False, False),
    (BF16, FLOAT, RAGGED, True, False, False),
    (HALF, HALF, RAGGED, True, True, False),
    (BF16, FLOAT, EVEN, False, True, True),
]


@pytest.mark.parametrize(("dtype", "kind", "shape", "learned_variance", "l1", "explicit"), LOSSES)
def test_denoising_loss_and_gradient(device, dtype, kind, shape, learned_variance, l1, explicit):
    given = setting(rand(2, *shape).to(kind), device)
    noise = rand(2, 3, *shape, seed=1).to(device) if explicit else None
    channels = shape[0] * (2 if learned_variance else 1)
    prediction = rand(6, channels, *shape[1:], seed=2).to(device, dtype).requires_grad_()
    upstream, pairs = rand(2, 3, seed=3).to(device), Pairs(**given, noise=noise)
    with poisoned():
        loss = denoising_loss(prediction, pairs, l1)
        (gradient,) = torch.autograd.grad(loss, prediction, upstream)
        both = denoising_loss_and_gradient(prediction.detach(), upstream, pairs, l1)
    plain = reference.denoising_loss(prediction.detach(), pairs, l1, upstream)
    exact = Pairs(**in_float64({**given, "noise": noise}))
    truth = reference.denoising_loss(prediction.detach().double().cpu(), exact, l1, upstream.double().cpu())
    assert_as_exact(loss.detach(), plain[0], truth[0])
    assert_as_exact(gradient, plain[1], truth[1])
    torch.testing.assert_close(both[0], loss, rtol=1e-6, atol=0)  # two compilations, with and without a gradient
    assert torch.equal(both[1], gradient)
    assert not gradient[:, shape[0] :].any()  # the learned variance takes no part


def test_a_timestep_outside_the_table_gives_nan(device, gpu):
    """The kernels cannot raise: the host would have to wait for the value."""
    given = setting(rand(2, *ODD), device) | {"timesteps": torch.tensor([[0, 1000, -1], [3, 250, 731]], device=device)}
    outside = [False, True, True, False, False, False]
    x_t = add_noise(Pairs(**given), FLOAT)
    assert x_t.isnan().flatten(1).all(1).tolist() == outside
    assert x_t.isnan().flatten(1).any(1).tolist() == outside
    prediction = rand(6, *ODD).to(device)
    loss, gradient = denoising_loss_and_gradient(prediction, torch.ones(2, 3, device=device), Pairs(**given))
    assert loss.isnan().flatten().tolist() == outside
    assert gradient.isnan().flatten(1).all(1).tolist() == outside


def test_a_prediction_that_is_nan_shows_in_loss_and_gradient(device):
    prediction = rand(6, *ODD).to(device)
    prediction[2, 1, 3, 4] = torch.nan
    for l1 in (False, True):
        given = setting(rand(2, *ODD), device)
        loss, gradient = denoising_loss_and_gradient(prediction, torch.ones(2, 3, device=device), Pairs(**given), l1)
        assert loss.isnan().flatten().tolist() == [row == 2 for row in range(6)]
        assert int(gradient.isnan().sum()) == 1


MIXTURES = [
    (FLOAT, FLOAT, 11, (37,), None, None, False),
    (FLOAT, FLOAT, 1500, (37,), None, 3.0, False),
    (BF16, BF16, 1500, (3, 50), 4, 3.0, False),
    (FLOAT, HALF, 11, (3, 50), 4, None, True),
    (FLOAT, FLOAT, 11, (3, 50), None, 3.0, True),
]


@pytest.mark.parametrize(("kind", "dtype", "classes", "tail", "top_k", "logit_scale", "per_image"), MIXTURES)
def test_mix_condition(device, kind, dtype, classes, tail, top_k, logit_scale, per_image):
    logits = rand(3, classes)
    logits[:, 3:11:2] += torch.tensor([6.0, 7.0, 8.0, 9.0])  # the four highest, whatever ties there are among the others in bfloat16
    logits = logits.to(device, kind).requires_grad_()
    table = rand(*((3,) if per_image else ()), classes, *tail, seed=1).to(device, dtype).requires_grad_()
    upstream = rand(3, *tail, seed=2).to(device, dtype)
    with poisoned():
        mixed = mix_condition(logits, table, top_k, logit_scale, per_image)
        gradients = torch.autograd.grad(mixed, [logits, table], upstream)
    results = []
    for own in ((upstream, logits, table), tuple(value.double().cpu() for value in (upstream, logits, table))):
        slope, z, embeddings = (value.detach() for value in own)
        chosen = None if top_k is None else z.topk(top_k, dim=1).indices
        found, weights = reference.mix_condition(z, embeddings, chosen, logit_scale, per_image)
        slopes = reference.mix_condition_backward(slope, z, embeddings, chosen, weights, logit_scale, per_image, True)
        results.append((found, *slopes))
    for found, plain, truth in zip((mixed.detach(), *gradients), *results, strict=True):
        assert_as_exact(found, plain, truth)


NORMS = [(FLOAT, (2, 5, 37), True), (BF16, (3, 700, 24), True), (HALF, (2, 7, 1152), False), (BF16, (64, 256, 1152), True)]


def normalised(
    x: Tensor, branch: Tensor | None, modulation: Tensor, slopes: list[Tensor], run: Callable[..., tuple[Tensor, Tensor]]
) -> list[Tensor]:
    """The sum, the normalised tokens, and the gradients of all that is given."""
    leaves = [tensor.detach().requires_grad_() for tensor in (x, branch, modulation) if tensor is not None]
    found = run(leaves[0], None if branch is None else leaves[1], leaves[-1], 1e-6)
    return [*(tensor.detach() for tensor in found), *torch.autograd.grad(found, leaves, slopes)]


@pytest.mark.parametrize(("kind", "shape", "gated"), NORMS)
def test_gated_norm(device, kind, shape, gated):
    if device == "cpu" and shape[0] == 64:
        shape = (2, *shape[1:])
    x, branch, *slopes = (rand(*shape, seed=seed).to(device, kind) for seed in range(4))
    x = 2 * x + 1
    wide = rand(shape[0], 5 * shape[2], seed=4).to(device, kind)
    given = (x, branch if gated else None, wide[:, shape[2] : (4 if gated else 3) * shape[2]])  # a slice of longer rows
    with poisoned():
        found = normalised(*given, slopes, gated_norm)
    plain = normalised(*given, slopes, reference.gated_norm)
    exact = [None if tensor is None else tensor.double().cpu() for tensor in given]
    truth = normalised(*exact, [slope.double().cpu() for slope in slopes], reference.gated_norm)
    for one, other, right in zip(found, plain, truth, strict=True):
        assert_as_exact(one, other, right)
    with torch.no_grad():
        for one, other, right in zip(gated_norm(*given), plain, truth, strict=False):
            assert_as_exact(one, other, right)


def test_kernels_add_up_in_a_fixed_order(device):
    """The same call gives the same bits: no sum is made by atomics."""
    prediction, upstream = rand(6, *RAGGED).to(device), rand(2, 3).to(device)
    given = setting(rand(2, *RAGGED), device)
    logits, table = rand(3, 1500).to(device).requires_grad_(), rand(1500, 37, seed=1).to(device).requires_grad_()
    tokens = [rand(*shape, seed=2).to(device) for shape in ((3, 700, 24), (3, 700, 24), (3, 72))]
    runs = []
    for _ in range(3):
        mixed = mix_condition(logits, table, None, 3.0)
        slopes = torch.autograd.grad(mixed, [logits, table], torch.ones_like(mixed))
        normed = normalised(*tokens, [tokens[1], tokens[0]], gated_norm)
        runs.append((*denoising_loss_and_gradient(prediction, upstream, Pairs(**given)), mixed, *slopes, *normed))
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))
