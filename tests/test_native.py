"""The CPU kernels on every instruction set that this processor has, against float64 and against plain torch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from dtta_fast.denoisers.noise_process import NoiseProcess
from dtta_fast.kernels import Pairs, native, reference
from dtta_fast.kernels.philox import normal

SETS = ("portable", "avx2", "avx512")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TABLE = NoiseProcess.from_scheduler(DDPMScheduler(1000, prediction_type="v_prediction")).table * torch.tensor([1, 1, 1, 1, 0.7])
DRAWS = (torch.tensor([[0, 500, 999], [3, 250, 731]]), torch.tensor([4, 2**32 - 1]), 2**40 + 123, torch.tensor(2), 5)


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    fastest = native.instruction_set()
    try:
        native.use_instruction_set(request.param)
    except ValueError:
        pytest.skip(f"this processor or build has no {request.param}")
    yield request.param
    native.use_instruction_set(fastest)


def held(found: Tensor, plain: Tensor, truth: Tensor) -> None:
    """RMS error against float64 at most twice plain torch's in the same precision; what underflows its type is exempt.

    Of few numbers, where a root mean square is chance (plain torch's may be 0): each within four units in the last place of 1, the
    size of the terms that are added up.
    """
    assert found.dtype == plain.dtype
    assert found.shape == plain.shape
    if truth.numel() < 16:
        assert (found.double() - truth).abs().max() <= 4 * torch.finfo(found.dtype).eps * max(1.0, float(truth.abs().max()))
        return
    found_error, plain_error = ((x.double() - truth).square().mean().sqrt() for x in (found, plain))
    tiny = torch.finfo(found.dtype).tiny * torch.finfo(found.dtype).eps
    assert found_error <= 2 * plain_error + 1e-7 * truth.square().mean().sqrt() + tiny


@settings(max_examples=15, deadline=None)
@given(st.tuples(*[st.integers(1, 9)] * 2, st.integers(1, 40)), st.sampled_from(DTYPES), st.booleans(), st.booleans(), st.booleans())
def check_noise_ops(shape, dtype, explicit, learned_variance, l1):
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(2, *shape, generator=generator).to(dtype)
    noise = torch.randn(2, 3, *shape, generator=generator) if explicit else None
    exact = None if noise is None else noise.double()
    prediction = torch.randn(6, (1 + learned_variance) * shape[0], *shape[1:], generator=generator).to(dtype)
    upstream = torch.rand(2, 3, generator=generator)
    x_t = [module.add_noise(Pairs(x0, TABLE, *DRAWS, noise), dtype) for module in (native, reference)]
    held(*x_t, reference.add_noise(Pairs(x0.double(), TABLE, *DRAWS, exact), torch.float64))
    ours, plain = (module.denoising_loss(prediction, Pairs(x0, TABLE, *DRAWS, noise), l1, upstream) for module in (native, reference))
    truth = reference.denoising_loss(prediction.double(), Pairs(x0.double(), TABLE, *DRAWS, exact), l1, upstream.double())
    held(ours[0], plain[0], truth[0])
    held(ours[1], plain[1], truth[1])
    assert torch.equal(native.denoising_loss(prediction, Pairs(x0, TABLE, *DRAWS, noise), l1, None)[0], ours[0])


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 3), st.sampled_from(DTYPES), st.booleans(), st.booleans(), st.booleans())
def check_mixture(classes, numbers, images, dtype, per_image, scaled, top):
    generator = torch.Generator().manual_seed(0)
    logits, upstream = (torch.randn(images, n, generator=generator).to(dtype) for n in (classes, numbers))
    embeddings = torch.randn(*((images,) if per_image else ()), classes, numbers, generator=generator).to(dtype)
    chosen = logits.topk((classes + 1) // 2, dim=1).indices if top else None
    scale = 3.0 if scaled else None
    results = []
    for module, double in ((native, False), (reference, False), (reference, True)):
        z, e, u = (x.double() if double else x for x in (logits, embeddings, upstream))
        mixed, weights = module.mix_condition(z, e, chosen, scale, per_image)
        results.append((mixed, weights, *module.mix_condition_backward(u, z, e, chosen, weights, scale, per_image, True)))
    for found, plain, truth in zip(*results, strict=True):
        held(found, plain, truth)


@pytest.mark.parametrize("check", [check_noise_ops, check_mixture])
def test_errors_are_those_of_the_precision(instruction_set, check, monkeypatch):
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):  # what is left unwritten shows
        allocate = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, allocate=allocate, **k: allocate(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(native, "_is_product", lambda *_: False)  # the kernel of ours, not torch's product
    check()


def test_several_images_under_a_float32_table_are_torch_s_product(monkeypatch):
    called = []
    monkeypatch.setattr(reference, "mix_condition", lambda *_: called.append(1))
    for images, dtype, product in ((1, torch.float32, 0), (2, torch.float32, 1), (2, torch.bfloat16, 0), (16, torch.bfloat16, 1)):
        called.clear()
        native.mix_condition(torch.randn(images, 5, dtype=dtype), torch.randn(5, 6, dtype=dtype), None, None, False)
        assert len(called) == product


def test_a_gradient_at_a_prediction_that_is_not_finite_is_nan(instruction_set):
    prediction, upstream = torch.full((6, 1, 3, 3), float("nan")), torch.ones(2, 3)
    for module in (native, reference):
        loss, gradient = module.denoising_loss(prediction, Pairs(torch.zeros(2, 1, 3, 3), TABLE, *DRAWS), True, upstream)
        assert loss.isnan().all()
        assert gradient.isnan().all()


@pytest.mark.parametrize("pool", ["openmp", "own"])
def test_same_bits_for_every_number_of_threads(instruction_set, pool):
    logits, table = torch.randn(1, 70), torch.randn(70, 1000)
    if pool == "own":
        native.library().dtta_use_thread_pool(None)
    x0, prediction, upstream = torch.randn(2, 4, 64, 64), torch.randn(6, 4, 64, 64), torch.ones(2, 3)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            loss = native.denoising_loss(prediction, Pairs(x0, TABLE, *DRAWS), False, upstream)
            mixed, weights = native.mix_condition(logits, table, None, 2.0, False)
            back = native.mix_condition_backward(mixed, logits, table, None, weights, 2.0, False, True)
            found.append((native.add_noise(Pairs(x0, TABLE, *DRAWS), torch.float32), *loss, mixed, *back))
    finally:
        native.library().dtta_use_thread_pool(native._openmp())
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_ten_million_normals_are_normal():
    """Kolmogorov-Smirnov, moments, and no correlation between pairs, images, steps and lanes; a noise of x0 = 0 is the draw itself."""
    table = torch.tensor([[0.0, 1, 0, 1, 1]])
    drawn = []
    for step in (0, 1):
        x0, ids = torch.zeros(4, 1, 500, 500), torch.tensor([0, 1, 7, 2**32 - 1])
        pairs = Pairs(x0, table, torch.zeros(4, 5, dtype=torch.int64), ids, 7, torch.tensor(step))
        drawn.append(native.add_noise(pairs, torch.float32))
    streams = torch.cat(drawn).flatten(1)
    flat = streams.flatten().numpy()
    assert flat.size == 10_000_000
    assert stats.kstest(flat, "norm").pvalue > 1e-3
    for moment, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):  # of normals, exactly
        assert abs((flat.astype("float64") ** moment).mean() - expected) < 5 * (variance / flat.size) ** 0.5
    for group in (streams, streams.reshape(-1, 4).T):
        correlation = torch.corrcoef(group.double()).fill_diagonal_(0).abs().max()
        assert correlation < 5 / group.shape[1] ** 0.5


def test_normals_agree_with_exact_arithmetic(instruction_set):
    table, ids = torch.tensor([[0.0, 1, 0, 1, 1]]), torch.tensor([3, 2**32 - 1])
    timesteps, step = torch.zeros(2, 3, dtype=torch.int64), torch.tensor(2**31)
    found = native.add_noise(Pairs(torch.zeros(2, 1, 100, 101), table, timesteps, ids, 2**62 + 5, step, 9), torch.float32)
    exact = normal(10_100, torch.arange(9, 12), ids, 2**62 + 5, step, torch.float64).view(6, 1, 100, 101)
    assert float((found - exact).abs().max()) < 1e-6
