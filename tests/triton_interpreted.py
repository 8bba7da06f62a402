"""Run by test_triton.py under TRITON_INTERPRET=1: every Triton kernel against plain torch and float64. Prints "held"."""

import itertools
import json
from pathlib import Path

import torch
import triton
import triton.language as tl
from diffusers import DDPMScheduler

from dtta_fast.denoisers.noise_process import NoiseProcess
from dtta_fast.kernels import Pairs, reference
from dtta_fast.kernels import norm as autograd
from dtta_fast.kernels.triton import launchers, noise, norm, philox


@triton.jit
def words_kernel(counters, words, k0, k1):
    at = tl.arange(0, 1)
    c0, c1, c2, c3 = (tl.load(counters + 0 + at), tl.load(counters + 1 + at), tl.load(counters + 2 + at), tl.load(counters + 3 + at))
    w0, w1, w2, w3 = philox.philox(c0, c1, c2, c3, k0.to(tl.uint32), k1.to(tl.uint32))
    tl.store(words + 0 + at, w0)
    tl.store(words + 1 + at, w1)
    tl.store(words + 2 + at, w2)
    tl.store(words + 3 + at, w3)


empty = torch.empty


def unwritten(*sizes, **given):
    """What a kernel leaves unwritten shows."""
    made = empty(*sizes, **given)
    return made.fill_(float("nan") if made.is_floating_point() else -1)


torch.empty = unwritten
noise.WHOLE = 1024  # of the two shapes of latents below, one program computes the loss of the smaller; partial sums that of the other
table = NoiseProcess.from_scheduler(DDPMScheduler(1000, prediction_type="v_prediction")).table * torch.tensor([1, 1, 1, 1, 0.7])
generator = torch.Generator().manual_seed(0)


def rand(*shape):
    return torch.randn(*shape, generator=generator)


def rms(x, truth):
    return ((x.double() - truth).square().mean() / truth.square().mean().clamp_min(1e-30)).sqrt().item()


def held(name, found, plain, truth, floor=1e-7):
    assert found.dtype == plain.dtype, name
    assert found.shape == plain.shape, name
    # the interpreter truncates to bfloat16 where a GPU rounds: hold those to a unit in the last place
    allowed = 2**-7 if found.dtype == torch.bfloat16 else 2 * rms(plain, truth) + floor
    assert rms(found, truth) <= allowed, (name, rms(found, truth), rms(plain, truth))


draws = (torch.tensor([[0, 500, 999], [3, 250, 731]]), torch.tensor([4, 2**32 - 1]), 2**40 + 123, torch.tensor(2), 5)
for shape, dtype in itertools.product([(3, 5, 7), (4, 16, 24)], [torch.float32, torch.bfloat16, torch.float16]):
    if shape[0] == 4 and dtype == torch.float16:
        continue  # the interpreter is slow
    x0 = rand(2, *shape).to(dtype)
    for given in (None, rand(2, 3, *shape)):
        f64 = None if given is None else given.double()
        found, plain = (m.add_noise(Pairs(x0, table, *draws, given), dtype) for m in (launchers, reference))
        held("x_t", found, plain, reference.add_noise(Pairs(x0.double(), table, *draws, f64), torch.float64))
    for channels, l1 in itertools.product((1, 2), (False, True)):
        prediction, upstream = rand(6, channels * shape[0], *shape[1:]).to(dtype), rand(2, 3)
        found, plain = (m.denoising_loss(prediction, Pairs(x0, table, *draws), l1, upstream) for m in (launchers, reference))
        truth = reference.denoising_loss(prediction.double(), Pairs(x0.double(), table, *draws), l1, upstream.double())
        for name, a, b, c in zip(("loss", "gradient"), found, plain, truth, strict=False):
            held(name, a, b, c)
        alone = launchers.denoising_loss(prediction, Pairs(x0, table, *draws), l1, None)
        assert alone[1] is None
        assert torch.equal(alone[0], found[0])
bad = (torch.tensor([[0, 1000, -1], [3, 250, 731]]), *draws[1:])
rows = launchers.add_noise(Pairs(x0, table, *bad), torch.float32).isnan().flatten(1).all(1)
assert rows.tolist() == [False, True, True, False, False, False]

density = torch.rand(1000, generator=generator, dtype=torch.float64) ** 4
density[:30] = 0
cumulative = torch.cat([torch.zeros(1, dtype=torch.float64), density.cumsum(0)])
cumulative = (cumulative / cumulative[-1] * 2**32).round().long()
ids = torch.tensor([0, 7, 2**32 - 1])
for pairs, stratified, given in itertools.product((1, 4, 7, 180), (False, True), (None, cumulative)):
    for seed, step in ((0, 0), (2**40 + 123, 2**31 + 2)):
        arguments = ids, torch.tensor(step), given, seed, pairs, 20, 997, stratified
        found, plain = (m.draw_timesteps(*arguments) for m in (launchers, reference))
        assert torch.equal(found, plain), (pairs, stratified, given is None, seed)

for classes, tail, dtype in itertools.product((11, 1500), ((37,), (3, 50)), [torch.float32, torch.bfloat16]):
    if classes == 1500 and (len(tail) == 2 or dtype == torch.bfloat16):
        continue  # the interpreter is slow
    for per_image, top_k, scale in itertools.product((False, True), (None, 4), (None, 3.0)):
        logits, upstream = rand(3, classes).to(dtype), rand(3, *tail).to(dtype)
        embeddings = rand(*((3,) if per_image else ()), classes, *tail).to(dtype)
        chosen = None if top_k is None else logits.topk(top_k, dim=1).indices
        given = (chosen, scale, per_image)
        found, plain = (m.mix_condition(logits, embeddings, *given) for m in (launchers, reference))
        truth = reference.mix_condition(logits.double(), embeddings.double(), *given)
        slopes = [
            m.mix_condition_backward(u, z, e, chosen, w, scale, per_image, classes == 11)
            for m, u, z, e, w in (
                (launchers, upstream, logits, embeddings, found[1]),
                (reference, upstream, logits, embeddings, plain[1]),
                (reference, upstream.double(), logits.double(), embeddings.double(), truth[1]),
            )
        ]
        names = ("mixed", "weights", "to_logits", "to_embeddings")
        for name, a, b, c in zip(names, (*found, *slopes[0]), (*plain, *slopes[1]), (*truth, *slopes[2]), strict=False):
            if b is not None:
                held((name, classes, tail, dtype, given[1:]), a, b, c, 2e-7)
norm.PROGRAMS = 8  # programs take several tokens of these few: 1, 15, 8 and 1
for (shape, dtype), gated in itertools.product(
    [((2, 5, 37), torch.float32), ((3, 40, 24), torch.float32), ((2, 33, 8), torch.bfloat16), ((2, 7, 1152), torch.float16)], (True, False)
):
    x, branch, to_total, to_normed = (scale * rand(*shape).to(dtype) for scale in (2, 1, 1, 1))
    wide = rand(shape[0], 5 * shape[2]).to(dtype)
    modulation = wide[:, shape[2] : (4 if gated else 3) * shape[2]]  # a slice of longer rows
    given = (x + 1, branch, modulation) if gated else (x + 1, modulation)

    def gated_norm(kind, given=given, gated=gated, slopes=(to_total, to_normed)):
        leaves = [tensor.to(kind).requires_grad_() for tensor in given]
        found = reference.gated_norm(leaves[0], leaves[1] if gated else None, leaves[-1], 1e-6)
        return [*(x.detach() for x in found), *torch.autograd.grad(found, leaves, [slope.to(kind) for slope in slopes])]

    total, normed, mean, rstd = launchers.gated_norm(given[0], branch if gated else None, modulation, 1e-6, True)
    slopes = launchers.gated_norm_backward(to_total, to_normed, total, branch if gated else None, modulation, mean, rstd, True)
    found = [total, normed, *(slope for slope in slopes if slope is not None)]
    for i, (a, b, c) in enumerate(zip(found, gated_norm(dtype), gated_norm(torch.float64), strict=True)):
        held(("gated_norm", shape, dtype, gated, i), a, b, c)
    without = launchers.gated_norm(given[0], branch if gated else None, modulation, 1e-6, False)
    assert torch.equal(without[1], normed)
    assert without[2] is None
    alone = launchers.gated_norm_backward(None, to_normed, total, branch if gated else None, modulation, mean, rstd, False)
    assert alone[0] is None
    leaves = [tensor.detach().requires_grad_() for tensor in given]
    through = autograd._GatedNorm.apply(leaves[0], leaves[1] if gated else None, leaves[-1], 1e-6)
    for a, b in zip([*through, *torch.autograd.grad(through, leaves, [to_total, to_normed])], found, strict=True):
        assert torch.equal(a, b)
    zero = launchers.gated_norm_backward(to_total * 0, to_normed, total, branch if gated else None, modulation, mean, rstd, True)
    assert torch.equal(alone[2], zero[2])
for counter, key, expected in json.loads((Path(__file__).parent / "philox_known_answers.json").read_text()):
    words = torch.zeros(4, dtype=torch.uint32)
    words_kernel[(1,)](torch.tensor(counter, dtype=torch.uint32), words, *key)
    assert words.tolist() == expected, (words.tolist(), expected)
print("held")
