"""Stage 6, ceilings: how fast the DiT's matrix products, its attention, its gated normalisation and a copy are, each on its own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.gpu_stages.recording import Record, Setting, first_line
from bench.gpu_stages.timing import of_kernels, summary
from dtta_fast.kernels import gated_norm, reference

LINEARS = ((1152, 3456), (1152, 1152), (1152, 4608), (4608, 1152))  # inputs and outputs of a block's layers: qkv, projection, fc1, fc2
ROWS = (6144, 16384, 1024)  # tokens of a guard with 24 pairs, of 64 pairs, and of a step with 4 pairs
HEADS, HEAD, TOKENS = 16, 72, 256
BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
COPY = 2**30  # bytes; more than any cache holds


def run(setting: Setting, record: Record) -> None:
    """Measures everything on random numbers, because products of zeros run faster than products of data."""
    torch.manual_seed(0)
    device, small = setting.device, setting.tiny
    record.measure("copy", "1 GiB" if not small else "64 KiB", lambda: copy(2**16 if small else COPY, device))
    for dtype in ("bf16", "fp8"):
        for rows in (32,) if small else ROWS:
            for k, n in LINEARS:
                label = f"{dtype}, {k} -> {n}, {rows} rows"
                if dtype == "fp8" and device.type != "cuda":
                    record.needs_gpu("products", label)
                else:
                    record.measure("products", label, lambda given=(dtype, k, n, rows): product(*given, device))
    for images in (1,) if small else (64, 24, 4):
        for name in BACKENDS:
            record.measure("attention", f"{name}, {images} rows", lambda given=(name, images): attention(*given, device))
    for rows in (1,) if small else (64, 4):
        for form in ("plain", "compiled", "op"):
            for backward in (False, True):
                label = f"{form}, {rows} rows, forward{' and backward' if backward else ''}"
                if small and form == "compiled":
                    record.put("gated normalisation", label, {"left out": "takes a minute on a CPU"})
                else:
                    given = (form, backward, rows, device)
                    record.measure("gated normalisation", label, lambda given=given: normalisation(*given))


def copy(size: int, device: torch.device) -> dict[str, Any]:
    """Times a copy. Both the bytes read and the bytes written count."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return {"bytes": 2 * source.nbytes, "seconds": summary(of_kernels(lambda: target.copy_(source), device))}


def product(dtype: str, k: int, n: int, rows: int, device: torch.device) -> dict[str, Any]:
    """Times the product of rows of k numbers and a weight [n, k]: a linear layer without bias. In fp8, the cast of x is not timed."""
    x, weight = torch.randn(rows, k, device=device).bfloat16(), torch.randn(n, k, device=device).bfloat16()
    work: Callable[[], Tensor]
    if dtype == "bf16":
        work = lambda: F.linear(x, weight)  # noqa: E731
    else:
        low, weights = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
        one = torch.ones((), device=device)
        work = lambda: torch._scaled_mm(low, weights.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)  # noqa: E731
    seconds = summary(of_kernels(work, device))
    return {"dtype": dtype, "k": k, "n": n, "rows": rows, "flops": 2 * rows * k * n, "seconds": seconds}


def heads(rows: int, device: torch.device) -> list[Tensor]:
    """Returns queries, keys and values [rows, heads, tokens, head size], which are views of one qkv tensor as in the DiT."""
    qkv = torch.randn(rows, TOKENS, 3, HEADS, HEAD, device=device).bfloat16()
    return [part.detach() for part in qkv.permute(2, 0, 3, 1, 4)]


def refused(error: RuntimeError) -> bool:
    """Tells whether the error says that no allowed backend supports these tensors."""
    return str(error).startswith(("No available kernel", "No viable backend"))


def attention(name: str, rows: int, device: torch.device) -> dict[str, Any]:
    """Times attention with one backend, or returns why the backend refuses."""
    q, k, v = heads(rows, device)
    flops = 4 * rows * HEADS * TOKENS * TOKENS * HEAD
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    upstream = torch.randn_like(q)

    def forward() -> Tensor:
        with torch.no_grad():
            return F.scaled_dot_product_attention(q, k, v)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(F.scaled_dot_product_attention(*leaves), leaves, upstream)

    with sdpa_kernel(BACKENDS[name]):
        try:
            both()
        except RuntimeError as error:
            if not refused(error):
                raise
            return {"refused": first_line(error)}
        return {
            "forward": {"flops": flops, "seconds": summary(of_kernels(forward, device))},
            "forward and backward": {"flops": 7 * flops // 2, "seconds": summary(of_kernels(both, device))},
        }


def normalisation(form: str, backward: bool, rows: int, device: torch.device) -> dict[str, Any]:
    """Times the sum of tokens and gated branch with its normalisation, as plain operators, as compiled operators, or as the kernel.

    The bytes are the minimum. The forward reads the tokens and the branch, and writes the sum and the normalised tokens. The backward reads
    the gradients of both, the sum and the branch, and writes two gradients.
    """
    x, branch = (torch.randn(rows, TOKENS, HEADS * HEAD, device=device).bfloat16() for _ in range(2))
    modulation = torch.randn(rows, 3 * HEADS * HEAD, device=device).bfloat16()
    plain = functools.partial(reference.gated_norm, eps=1e-6)
    function = {"op": gated_norm, "plain": plain, "compiled": torch.compile(plain, fullgraph=True, dynamic=False)}[form]
    leaves = [tensor.requires_grad_(backward) for tensor in (x, branch, modulation)]
    upstream = [torch.randn_like(x) for _ in range(2)]

    def work() -> Any:
        with torch.set_grad_enabled(backward):
            found = function(*leaves)
            return torch.autograd.grad(found, leaves, upstream) if backward else found

    return {"bytes": (10 if backward else 4) * x.nbytes, "seconds": summary(of_kernels(work, device))}
