"""The ladder of precisions, the dtype that "auto" chooses, and torch's process-wide switches for float32 products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from dtta_fast import AdaptConfig, Adapter, adapt

pytestmark = pytest.mark.gpu
CONFIG = AdaptConfig(steps=1, pairs=6, optimizer="sgd", lr=0.02)
matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn

# Largest difference from float32 on the CPU, as a share of one step's effect on the logits. On a CPU, cutting the inputs of products to
# TF32's 11 bits gave 0.0035 and bfloat16 gave 0.019; the tolerances are about three times that. More steps would measure how chaotic a
# random model is.
LADDER = {"fp32": 1e-3, "tf32": 0.01, "bf16": 0.05, "fp16": 0.01, "auto": 0.05}


@pytest.mark.parametrize("precision", LADDER)
@pytest.mark.parametrize("architecture", ["model", "vit"])
def test_ladder(request, denoiser, images, moved, device, difference, precision, architecture):
    parts = (request.getfixturevalue(architecture), denoiser, images)
    expected = adapt(*moved("cpu", torch.float32, *parts), config=CONFIG.replace(precision="fp32"))
    *modules, there = moved(device, torch.float32, *parts)
    session = Adapter(*modules, CONFIG.replace(precision=precision))
    found = session.adapt(there)
    assert difference(found, expected) < LADDER[precision]
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16, "auto": torch.bfloat16 if device == "cuda" else torch.float32}
    private = session.engine.program.problem
    assert private.denoiser.dtype == wanted.get(precision, torch.float32)
    assert next(private.model.parameters()).dtype == torch.float32
    assert modules[1].dtype == torch.float32  # the caller's own


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_auto_leaves_what_is_not_float32(mlp, small_denoiser, device, dtype):
    session = Adapter(mlp.to(device), small_denoiser.to(device, dtype), CONFIG)
    assert session.engine.program.problem.denoiser.dtype == dtype


def _read(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except RuntimeError:  # old and new switches contradict each other
        return "contradiction"


def switches() -> dict[str, Any]:
    readers: dict[str, Callable[[], Any]] = {
        "float32_matmul_precision": torch.get_float32_matmul_precision,
        "matmul.allow_tf32": lambda: matmul.allow_tf32,
        "cudnn.allow_tf32": lambda: cudnn.allow_tf32,
        "matmul.fp32_precision": lambda: matmul.fp32_precision,
        "conv.fp32_precision": lambda: cudnn.conv.fp32_precision,
        "rnn.fp32_precision": lambda: cudnn.rnn.fp32_precision,
    }
    return {name: _read(read) for name, read in readers.items()}


def as_torch_starts() -> None:
    pass


def old_switches_on() -> None:
    matmul.allow_tf32 = cudnn.allow_tf32 = True


def old_switches_off() -> None:
    matmul.allow_tf32 = cudnn.allow_tf32 = False


def new_switches_on() -> None:
    matmul.fp32_precision = cudnn.conv.fp32_precision = "tf32"


CALLERS = [as_torch_starts, old_switches_on, old_switches_off, new_switches_on]


@pytest.fixture(params=CALLERS, ids=lambda caller: caller.__name__)
def caller(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """The switches as a caller may have set them."""
    before = switches()
    request.param()
    yield switches()
    torch.set_float32_matmul_precision(before["float32_matmul_precision"])
    cudnn.allow_tf32 = before["cudnn.allow_tf32"]
    matmul.fp32_precision, cudnn.conv.fp32_precision = before["matmul.fp32_precision"], before["conv.fp32_precision"]
    cudnn.rnn.fp32_precision = before["rnn.fp32_precision"]
    assert switches() == before


@pytest.mark.parametrize("precision", ["auto", "fp32", "tf32"])
def test_switches_are_set_for_the_call_alone(caller, mlp, small_denoiser, images, moved, device, precision):
    """After a call and after an exception in it they are the caller's again; on a CPU they are never touched."""
    model, denoiser, there = moved(device, torch.float32, mlp, small_denoiser, images)
    seen: list[tuple[str, str]] = []
    failing = False

    def look(*_: object) -> None:
        seen.append((matmul.fp32_precision, cudnn.conv.fp32_precision))
        if failing and len(seen) > 2:
            raise RuntimeError("injected")

    model[1].register_forward_pre_hook(look)
    session = Adapter(model, denoiser, CONFIG.replace(precision=precision))
    session.adapt(there)
    assert switches() == caller
    if device == "cuda":
        assert set(seen) == {("ieee", "ieee") if precision == "fp32" else ("tf32", "tf32")}
    seen.clear()
    failing = True
    with pytest.raises(RuntimeError, match="injected"):
        session.adapt(there)
    assert switches() == caller


def test_fp32_is_the_same_whatever_the_caller_set(model, denoiser, images, moved, device, monkeypatch):
    monkeypatch.setattr(cudnn, "deterministic", True)  # some of cuDNN's convolutions add up in any order
    *modules, there = moved(device, torch.float32, model, denoiser, images)
    before, results = (matmul.allow_tf32, cudnn.allow_tf32), []
    try:
        for allowed in (True, False):
            matmul.allow_tf32 = cudnn.allow_tf32 = allowed
            results.append(adapt(*modules, there, config=CONFIG.replace(precision="fp32")))
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
    assert torch.equal(results[0].outputs, results[1].outputs)


def test_a_model_in_half_precision_moves_in_float32(vit, denoiser, images, moved, device, difference):
    """An update of 1e-5 would be lost in a bfloat16 weight. Rounding model and denoiser to bfloat16 changes the effect by 0.02 on a CPU,
    and each device rounds in its own way."""
    config = CONFIG.replace(precision="bf16")
    expected = adapt(*moved("cpu", torch.bfloat16, vit, denoiser), images.float(), config=config)
    model, there = moved(device, torch.bfloat16, vit, denoiser)
    session = Adapter(model, there, config.replace(mode="online"))
    session.adapt(images[:1].float().to(device))
    assert {p.dtype for p in session.state_dict()["theta"].values()} == {torch.float32}
    found = adapt(model, there, images.float().to(device), config=config)
    assert found.outputs.dtype == torch.bfloat16
    assert difference(found, expected) < 0.06
