"""torch's default dtype and device change nothing: every tensor that the package makes says its own."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import dtta_fast
from dtta_fast import AdaptConfig, adapt, metrics, presets, zoo
from dtta_fast.data.corruptions import corrupt
from dtta_fast.denoisers.noise_process import NoiseProcess
from dtta_fast.kernels import Pairs, add_noise, denoising_loss, mix_condition, native

MAKERS = {
    *("empty", "zeros", "ones", "full", "tensor", "as_tensor", "arange", "linspace", "logspace", "rand", "randn", "randint", "randperm"),
    *("eye", "empty_strided", "scalar_tensor", "normal", "tril_indices", "triu_indices", "hann_window", "fftfreq", "rfftfreq"),
}
DTYPES = [torch.float64, torch.bfloat16, torch.float16]


@contextmanager
def default(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Iterator[None]:
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def unsaid(call: ast.Call) -> set[str]:
    """What a call that makes a tensor leaves to torch's defaults."""
    function = call.func
    if not (isinstance(function, ast.Attribute) and function.attr in MAKERS and ast.unparse(function.value) in ("torch", "torch.fft")):
        return set()
    # as_tensor() leaves a tensor where it is
    needed = {"dtype"} if function.attr == "as_tensor" else {"dtype", "device"}
    return needed - {keyword.arg for keyword in call.keywords if keyword.arg}


def test_the_source_leaves_no_dtype_and_no_device_to_torch():
    folders = {Path(module.__file__).parent for module in (dtta_fast, dtta_fast.kernels)}
    files = sorted(file for folder in folders for file in folder.rglob("*.py"))
    assert len(files) > 60
    found = [
        f"{file.name}:{call.lineno} {ast.unparse(call)} without {', '.join(sorted(missing))}"
        for file in files
        for call in ast.walk(ast.parse(file.read_text()))
        if isinstance(call, ast.Call) and (missing := unsaid(call))
    ]
    assert not found, "\n".join(found)


def test_the_scan_sees_what_it_looks_for():
    calls = [
        node for node in ast.walk(ast.parse("torch.empty(3); torch.ones(2, dtype=x, device=y); x.empty(2)")) if isinstance(node, ast.Call)
    ]
    assert [unsaid(call) for call in calls] == [{"dtype", "device"}, set(), set()]


def every_op(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator("cpu").manual_seed(0)
    cpu = {"device": "cpu", "generator": generator}
    signal = torch.linspace(0.9, 0.1, 10, dtype=torch.float64, device="cpu")
    table = NoiseProcess(torch.stack([signal, (1 - signal**2).sqrt(), signal * 0, signal * 0 + 1, signal * 0 + 1], dim=1)).table
    x0 = torch.randn(2, 3, 8, 8, dtype=torch.float32, **cpu).to(dtype)
    given = {
        "x0": x0,
        "table": table,
        "timesteps": torch.tensor([[0, 5, 9], [3, 2, 7]], dtype=torch.int64, device="cpu"),
        "image_ids": torch.tensor([4, 11], dtype=torch.int64, device="cpu"),
        "seed": 3,
        "step": torch.tensor(1, dtype=torch.int64, device="cpu"),
    }
    noised = add_noise(Pairs(**given))
    prediction = torch.randn(6, 3, 8, 8, dtype=torch.float32, **cpu).to(dtype).requires_grad_()
    loss = denoising_loss(prediction, Pairs(**given))
    (to_prediction,) = torch.autograd.grad(loss.sum(), prediction)
    logits = torch.randn(2, 9, dtype=torch.float32, **cpu).to(dtype).requires_grad_()
    found = [noised, loss.detach(), to_prediction]
    for per_image, top_k in ((False, None), (False, 4), (True, None)):
        shape = (2, 9, 5) if per_image else (9, 5)
        embeddings = torch.randn(shape, dtype=torch.float32, **cpu).to(dtype).requires_grad_()
        mixed = mix_condition(logits, embeddings, top_k, 7.0, per_image)
        found += [mixed.detach(), *torch.autograd.grad(mixed.sum(), (logits, embeddings))]
    return found


@pytest.mark.parametrize("standing", [*DTYPES, "meta"], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_op_under_every_default(dtype, standing):
    expected = every_op(dtype)
    with default(device="meta") if standing == "meta" else default(standing):
        found = every_op(dtype)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_the_native_library_is_given_no_memory_of_another_size():
    if native.library() is None:
        pytest.skip("the native library was not built")
    table = torch.ones(4, 5, dtype=torch.float32)
    words = torch.zeros(1, 1, dtype=torch.int64)
    x0 = torch.zeros(1, 1, 2, 2, dtype=torch.float32)
    fine = {"x0": x0, "table": table, "timesteps": words, "image_ids": words[0], "seed": 0, "step": torch.tensor(0), "pair0": 0}
    native.add_noise(Pairs(**fine), torch.float32)
    for name, value in (
        ("table", table.bfloat16()),
        ("timesteps", words.int()),
        ("image_ids", words[0].short()),
        ("x0", x0.double()),
        ("x0", torch.zeros(1, 1, 2, 4, dtype=torch.float32)[..., ::2]),
        ("x0", x0.to("meta")),
    ):
        with pytest.raises(TypeError, match="takes contiguous ones on the CPU"):
            native.add_noise(Pairs(**{**fine, name: value}), torch.float32)
    prediction = torch.zeros(1, 1, 2, 2, dtype=torch.float32)
    with pytest.raises(TypeError, match="takes contiguous"):
        native.denoising_loss(prediction, Pairs(**fine), False, torch.ones(1, 1, dtype=torch.float16))


CONFIGS = {
    "a large guard": AdaptConfig(steps=2, pairs=64, guard=64, lr=1e-3),
    "FAST": presets.FAST.replace(guard=6),
    "free logits": AdaptConfig(steps=2, pairs=4, parameters="logits", lr=0.1, antithetic=True, guard=4),
    "noise mixing, online": AdaptConfig(steps=2, pairs=2, objective="noise_mix", top_k=3, mode="online", guard=4),
    "diffusion classifier": AdaptConfig(method="diffusion_classifier", steps=1, pairs=2),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_adaptation_under_every_default(name):
    model, denoiser = zoo.load("digits")
    pale = corrupt(zoo.example("digits")[0][:2], "contrast", 3)
    expected = adapt(model, denoiser, pale, config=CONFIGS[name])
    for standing in (*DTYPES, "meta"):
        with default(device="meta") if standing == "meta" else default(standing):
            found = adapt(model, denoiser, pale, config=CONFIGS[name])
        for field in ("outputs", "outputs_before", "loss", "accepted", "evaluations", "predictions"):
            one, other = getattr(found, field), getattr(expected, field)
            assert one.dtype == other.dtype, (standing, field)
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=f"{field} under {standing}")


@pytest.mark.parametrize("standing", DTYPES, ids=str)
def test_images_are_read_and_intervals_are_drawn_under_every_default(standing):
    values = torch.arange(20, dtype=torch.int64) % 2
    expected = metrics.bootstrap_interval(values), metrics.calibration_error(values.double() * 0.4, values > 0)
    images = zoo.example("digits")[0]
    with default(standing):
        assert torch.equal(zoo.example("digits")[0], images)
        assert (metrics.bootstrap_interval(values), metrics.calibration_error(values.double() * 0.4, values > 0)) == expected
