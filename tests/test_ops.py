"""The ops against plain float64 formulas, torch's own operator checks, and bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

from dtta_fast.denoisers.noise_process import NoiseProcess
from dtta_fast.kernels import Pairs, add_noise, denoising_loss, gated_norm, mix_condition, norm
from dtta_fast.kernels.philox import normal

pytestmark = pytest.mark.quick

TYPES = ["epsilon", "sample", "v_prediction"]


def setting(device: str, kind: str = "epsilon", dtype: torch.dtype = torch.float64) -> dict:
    generator = torch.Generator().manual_seed(0)
    process = NoiseProcess.from_scheduler(DDPMScheduler(1000, prediction_type=kind)).to(device)
    return {
        "x0": torch.randn(2, 3, 5, 7, dtype=dtype, generator=generator).to(device),
        "table": process.table * torch.tensor([1, 1, 1, 1, 0.7], device=device),  # a weight that is not 1
        "timesteps": torch.tensor([[0, 500, 999], [3, 250, 731]], device=device),
        "image_ids": torch.tensor([4, 2**32 - 1], device=device),
        "seed": 123,
        "step": torch.tensor(2, device=device),
    }


def coefficients(given: dict) -> list[torch.Tensor]:
    return [c[..., None, None, None].double() for c in given["table"][given["timesteps"]].unbind(2)]


def drawn_noise(given: dict, pair0: int = 0) -> torch.Tensor:
    pairs = torch.arange(pair0, pair0 + 3, device=given["x0"].device)
    return normal(3 * 5 * 7, pairs, given["image_ids"], given["seed"], given["step"], given["x0"].dtype).view(2, 3, 3, 5, 7).double()


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_add_noise(device, dtype, explicit):
    given = setting(device, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    noise = torch.randn(2, 3, 3, 5, 7, device=device) if explicit else None
    a, s, *_ = coefficients(given)
    expected = (a * given["x0"].double()[:, None] + s * (noise.double() if explicit else drawn_noise(given, 4))).flatten(0, 1)
    found = add_noise(Pairs(**given, pair0=4, noise=noise), dtype)
    assert found.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("l1", [False, True])
@pytest.mark.parametrize("learned_variance", [False, True])
@pytest.mark.parametrize("kind", TYPES)
def test_denoising_loss_and_gradient(device, kind, learned_variance, l1):
    given = setting(device, kind)
    prediction = torch.randn(6, 6 if learned_variance else 3, 5, 7, dtype=torch.float64, device=device, requires_grad=True)
    _, _, u, v, w = coefficients(given)
    target = (u * given["x0"][:, None] + v * drawn_noise(given)).flatten(0, 1)
    measure = F.l1_loss if l1 else F.mse_loss
    expected = w.flatten() * measure(prediction[:, :3], target, reduction="none").mean((1, 2, 3))
    upstream = torch.rand(2, 3, dtype=torch.float64, device=device)
    found = denoising_loss(prediction, Pairs(**given), l1)
    torch.testing.assert_close(found, expected.view(2, 3))
    torch.testing.assert_close(*(torch.autograd.grad((x.view(2, 3) * upstream).sum(), prediction)[0] for x in (found, expected)))


def test_noise_of_the_loss_is_the_noise_of_x_t(device):
    given = setting(device)
    a, s, *_ = (c.flatten()[:, None, None, None] for c in coefficients(given))
    x_t = add_noise(Pairs(**given, pair0=9))
    noise = (x_t - a * given["x0"].repeat_interleave(3, 0)) / s
    assert float(denoising_loss(noise, Pairs(**given, pair0=9)).max()) < 1e-9
    assert float(denoising_loss(noise, Pairs(**given, pair0=8)).min()) > 0.5


@pytest.mark.parametrize("shape", [(11, 4), (11, 3, 4)])
@pytest.mark.parametrize("top_k", [None, 1, 4])
@pytest.mark.parametrize("logit_scale", [None, 3.0])
def test_mix_condition(device, shape, top_k, logit_scale):
    logits = torch.randn(5, 11, dtype=torch.float64, device=device, requires_grad=True)
    table = torch.randn(*shape, dtype=torch.float64, device=device, requires_grad=True)
    z = logits if logit_scale is None else logit_scale * logits / logits.norm(dim=1, keepdim=True)
    if top_k is not None:
        z = torch.where(z >= z.topk(top_k, dim=1).values[:, -1:], z, -torch.inf)
    expected = (z.softmax(1) @ table.flatten(1)).view(5, *shape[1:])
    found = mix_condition(logits, table, top_k, logit_scale)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(expected)
    gradients = [torch.autograd.grad(x, [logits, table], upstream) for x in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_mix_condition_gradient_numerically():
    logits = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    table = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: mix_condition(a, b, 3, 2.0), (logits, table))


@pytest.mark.parametrize("gated", [True, False])
def test_gated_norm(device, gated):
    """Against its formula, spelled out, and its gradient numerically (on a GPU too, since float64 takes plain operators there)."""
    x, branch = (torch.randn(2, 3, 5, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))
    modulation = torch.randn(2, 15 if gated else 10, dtype=torch.float64, device=device, requires_grad=True)
    given = (x, branch if gated else None, modulation)
    total, normed = gated_norm(*given, eps=1e-3)
    *gate, shift, scale = modulation[:, None].split(5, dim=2)
    expected = x + gate[0] * branch if gated else x
    centred = expected - expected.mean(2, keepdim=True)
    unit = centred / (centred.square().mean(2, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close((total, normed), (expected, unit * (1 + scale) + shift))
    assert torch.autograd.gradcheck(lambda *tensors: gated_norm(*tensors, eps=1e-3)[0 if gated else 1], given)
    assert torch.autograd.gradcheck(lambda *tensors: gated_norm(*tensors, eps=1e-3)[1], given)
    with torch.no_grad():
        torch.testing.assert_close(gated_norm(*given, eps=1e-3), (total.detach(), normed.detach()))


@pytest.mark.parametrize("gated", [True, False])
def test_gated_norm_s_kernel_is_called_with_what_it_takes(gated, monkeypatch):
    """The way that a GPU takes, on tensors without values: contiguous tokens, rows of a modulation, and gradients where they are wanted."""
    monkeypatch.setattr(norm.backends, "choose", lambda *_: norm)

    def given(shape: tuple[int, ...], wanted: bool) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=wanted)

    for tokens_wanted in (True, False):
        x, branch = given((2, 5, 3), tokens_wanted).transpose(1, 2), given((2, 3, 5), True)
        modulation = given((2, 20), True)[:, 5 : 20 if gated else 15]
        total, normed = gated_norm(x, branch if gated else None, modulation)
        assert total.shape == normed.shape == (2, 3, 5)
        assert total.requires_grad == (gated or tokens_wanted)
        leaves = [tensor for tensor in (x, branch if gated else None, modulation) if tensor is not None and tensor.requires_grad]
        for outputs in ([total, normed], [normed]):
            chosen = [output for output in outputs if output.requires_grad]
            found = torch.autograd.grad(chosen, leaves, [torch.empty_like(output) for output in chosen], retain_graph=True)
            assert [(slope.shape, slope.dtype) for slope in found] == [(leaf.shape, leaf.dtype) for leaf in leaves]
        with torch.no_grad():
            total, normed = gated_norm(x, branch if gated else None, modulation.mT.contiguous().mT)
        assert (total.shape, normed.shape, normed.is_contiguous()) == ((2, 3, 5), (2, 3, 5), True)


@pytest.mark.parametrize("dims", [(0, 0, 0), (0, 1, None), (None, None, 0)])
def test_gated_norm_of_a_batch_is_one_call(dims):
    """The form that a GPU takes under vmap, whose kernel has no rule of its own: rows of all calls together, with their gradients."""
    shapes = [(2, 4, 5), (2, 4, 5), (2, 15)]
    tensors = []
    for shape, dim in zip(shapes, dims, strict=True):
        whole = shape if dim is None else (*shape[:dim], 3, *shape[dim:])
        tensors.append(torch.randn(whole, dtype=torch.float64, requires_grad=True))
    found = torch.vmap(lambda *given: norm._Unbatched.apply(*given, 1e-6), dims)(*tensors)
    each = [[tensor if dim is None else tensor.select(dim, i) for tensor, dim in zip(tensors, dims, strict=True)] for i in range(3)]
    expected = [torch.stack(parts) for parts in zip(*(gated_norm(*given) for given in each), strict=True)]
    torch.testing.assert_close(list(found), expected)
    slopes = [torch.randn_like(part) for part in expected]
    torch.testing.assert_close(torch.autograd.grad(found, tensors, slopes), torch.autograd.grad(expected, tensors, slopes))


def test_gated_norm_takes_the_types_of_autocast():
    """Under torch.autocast products are bfloat16, and the sums of tokens float32."""
    x, branch, modulation = torch.randn(2, 3, 4), torch.randn(2, 3, 4).bfloat16(), torch.randn(2, 12).bfloat16()
    total, normed = gated_norm(x, branch, modulation)
    expected = gated_norm(x, branch.float(), modulation.float())
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, expected[0], rtol=2**-6, atol=2**-6)
    torch.testing.assert_close(normed.float(), expected[1], rtol=2**-5, atol=2**-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert bool(gated_norm(x, branch, modulation)[1].isfinite().all())


def test_bad_tokens_are_named():
    x = torch.zeros(2, 3, 4)
    for given, message in (
        ((x[0], None, x[0]), "x is torch.float32 "),
        ((x, x[:, :2], torch.zeros(2, 12)), "branch has shape "),
        ((x, x, torch.zeros(2, 8)), r"modulation has shape \(2, 8\); give \(2, 12\)"),
        ((x, None, torch.zeros(2, 12)), r"modulation has shape \(2, 12\); give \(2, 8\)"),
        ((x, x.long(), torch.zeros(2, 12)), "branch is torch.int64 on cpu"),
        ((x, x, torch.zeros(2, 12, device="meta")), "modulation is torch.float32 on meta; give a floating-point one on that of x, cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            gated_norm(*given)


def test_operator_checks(device):
    given = setting(device, dtype=torch.float32)
    ops = torch.ops.dtta_fast
    draws = [given["table"], given["timesteps"], given["image_ids"], 5, given["step"], 1]
    torch.library.opcheck(ops.add_noise, (given["x0"], *draws, torch.bfloat16, None))
    prediction = torch.randn(6, 6, 5, 7, device=device, requires_grad=True)
    torch.library.opcheck(ops.denoising_loss, (prediction, given["x0"], *draws, False, None))
    logits, table = torch.randn(2, 7, device=device, requires_grad=True), torch.randn(7, 3, device=device, requires_grad=True)
    torch.library.opcheck(ops.mix_condition, (logits, table, 3, 2.0, False))


def test_ops_compile_without_a_graph_break(device):
    given = setting(device, dtype=torch.float32)

    def f(x0, weight, step):
        here = Pairs(**{**given, "x0": x0, "step": step})
        return denoising_loss(F.conv2d(add_noise(here), weight, padding=1), here).mean()

    weight = torch.randn(3, 3, 3, 3, device=device, requires_grad=True)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    gradients = [torch.autograd.grad(g(given["x0"], weight, given["step"]), weight) for g in (f, compiled)]
    torch.testing.assert_close(*gradients)


BAD = {
    "x0": ({"x0": torch.zeros(2, 3, 5)}, "x0 has shape"),
    "empty x0": ({"x0": torch.zeros(0, 3, 5, 7)}, "x0 has shape"),
    "integer x0": ({"x0": torch.zeros(2, 3, 5, 7, dtype=torch.int64)}, "x0 has dtype"),
    "table": ({"table": torch.zeros(10, 4)}, "table has shape"),
    "timesteps": ({"timesteps": torch.zeros(3, 2, dtype=torch.int64)}, "timesteps has shape"),
    "timesteps' dtype": ({"timesteps": torch.zeros(2, 3)}, "timesteps has dtype"),
    "image_ids": ({"image_ids": torch.zeros(3, dtype=torch.int64)}, "image_ids has shape"),
    "step": ({"step": torch.zeros(1, dtype=torch.int64)}, "step has shape"),
    "seed": ({"seed": -1}, "seed is -1"),
    "pair0": ({"pair0": -1}, "pair0 is -1"),
    "a timestep": ({"timesteps": torch.full((2, 3), 1000)}, "timesteps has values"),
    "an image id": ({"image_ids": torch.tensor([0, 2**32])}, "image_ids has values"),
    "a step": ({"step": torch.tensor(-1)}, "step has values -1"),
    "noise": ({"noise": torch.zeros(2, 3, 3, 5, 6)}, "noise has shape"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # the native library's and plain torch's
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case, dtype):
    change, message = BAD[case]
    given = {**setting("cpu", dtype=dtype), **change}
    with pytest.raises(ValueError, match=message):
        add_noise(Pairs(**given))
    with pytest.raises(ValueError, match=message):
        denoising_loss(torch.zeros(6, 3, 5, 7), Pairs(**given))


def test_bad_predictions_and_logits_are_named():
    with pytest.raises(ValueError, match="prediction has shape"):
        denoising_loss(torch.zeros(6, 4, 5, 7), Pairs(**setting("cpu")))
    with pytest.raises(ValueError, match="logits has shape"):
        mix_condition(torch.zeros(0, 3), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="embeddings has shape"):
        mix_condition(torch.zeros(1, 3), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="top_k is 4"):
        mix_condition(torch.zeros(1, 3), torch.zeros(3, 2), top_k=4)
    with pytest.raises(ValueError, match="logit_scale is 0"):
        mix_condition(torch.zeros(1, 3), torch.zeros(3, 2), logit_scale=0)
