"""Stage 7, the project's kernels: compares their rate with that of a copy, and their time with the prediction from the machine code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.gpu_stages.recording import Record, Setting
from bench.gpu_stages.timing import of_kernels, summary
from dtta_fast.kernels import Pairs, add_noise, backends, mix_condition

PAIRS, SIDE = 180, 64  # the size of the predictions in kernels/compile.py: 180 pairs of one latent 4x64x64
SIZES = ((PAIRS, SIDE), (4, 32), (24, 32))  # pairs, and side of the latents; the last two are FAST's with DiT-XL/2 at 256
CLASSES, NUMBERS = 1000, 1152  # the shape of DiT-XL/2's label table
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# variant in kernels/compile.py, its op, the dtype of x_t or of the prediction, whether there is a gradient
NOISE = (
    ("add_noise fp32 -> bf16", "add_noise", "bf16", False),
    ("denoising_loss bf16, x0 fp32, gradient", "denoising_loss", "bf16", True),
    ("denoising_loss bf16, x0 fp32", "denoising_loss", "bf16", False),
    ("add_noise fp32 -> fp32", "add_noise", "fp32", False),
    ("denoising_loss fp32, x0 fp32, gradient", "denoising_loss", "fp32", True),
)


def run(setting: Setting, record: Record) -> None:
    """Measures the kernels by their launchers, one op through torch's dispatcher as in the engine, and mix_condition beside plain torch."""
    torch.manual_seed(0)
    device = setting.device
    backend: Any = backends.choose(torch.float32, torch.empty(0, device=device))
    record.put("models", "backend", backends.serving(device.type))
    for pairs, side in ((4, 8),) if setting.tiny else SIZES:
        given = {"pairs": pairs, "side": side}
        record.measure("copy", f"{pairs} pairs of 4x{side}x{side}", lambda given=given: copied(**given, device=device))
        for name, op, dtype, gradient in NOISE:
            label = f"{name}; {pairs} pairs of 4x{side}x{side}"
            values = (backend, op, DTYPES[dtype], gradient, pairs, side, device)
            record.measure("noise", label, lambda name=name, values=values: {"variant": name, **noised(*values)})
    record.measure("dispatched", "add_noise fp32 -> bf16", lambda: dispatched(4, 8 if setting.tiny else 32, device))
    for images in (1, 16, 64):
        for form in ("op", "matrix product"):
            label = f"{form}, {images} images, forward and backward"
            record.measure("mix_condition", label, lambda form=form, images=images: mixed(form, images, device))
    if device.type != "cuda":
        record.needs_gpu("predicted", "H100 SXM")
    else:
        major, minor = torch.cuda.get_device_capability(device)
        record.measure("predicted", f"sm_{major}{minor}", lambda: predicted(10 * major + minor))


def copied(pairs: int, side: int, device: torch.device) -> dict[str, Any]:
    """Times a copy of as many float32 numbers as the pairs have."""
    source = torch.randn(pairs, 4, side, side, device=device)
    target = torch.empty_like(source)
    return {"bytes": 2 * source.nbytes, "seconds": summary(of_kernels(lambda: target.copy_(source), device))}


def drawn(pairs: int, side: int, device: torch.device) -> Pairs:
    """Makes the pairs of one latent."""
    return Pairs(
        x0=torch.randn(1, 4, side, side, device=device),
        table=torch.rand(1000, 5, device=device) + 0.5,
        timesteps=torch.randint(0, 1000, (1, pairs), device=device),
        image_ids=torch.zeros(1, dtype=torch.int64, device=device),
        seed=1,
        step=torch.zeros((), dtype=torch.int64, device=device),
    )


def noised(backend: Any, op: str, dtype: torch.dtype, gradient: bool, pairs: int, side: int, device: torch.device) -> dict[str, Any]:
    """Times a noise kernel. The bytes are those of the result, or of the prediction and its gradient, and those of x0 once."""
    given = drawn(pairs, side, device)
    elements = pairs * given.x0.numel()
    work: Callable[[], Any]
    if op == "add_noise":
        work = lambda: backend.add_noise(given, dtype)  # noqa: E731
        moved = elements * dtype.itemsize
    else:
        prediction = torch.randn(pairs, 4, side, side, device=device).to(dtype)
        upstream = torch.full((1, pairs), 1 / pairs, device=device) if gradient else None
        work = lambda: backend.denoising_loss(prediction, given, False, upstream)  # noqa: E731
        moved = (1 + gradient) * elements * dtype.itemsize
    return {"pairs": pairs, "side": side, "bytes": moved + given.x0.nbytes, "seconds": summary(of_kernels(work, device))}


def dispatched(pairs: int, side: int, device: torch.device) -> dict[str, Any]:
    """Times an op through the dispatcher. If the kernel takes less time than the host, this measures the host."""
    given = drawn(pairs, side, device)
    return {"seconds": summary(of_kernels(lambda: add_noise(given, torch.bfloat16), device))}


def mixed(form: str, images: int, device: torch.device) -> dict[str, Any]:
    """Times mix_condition, or plain torch, forward and backward. The bytes are those of the table, once in each direction."""
    logits = torch.randn(images, CLASSES, device=device, requires_grad=True)
    table, upstream = torch.randn(CLASSES, NUMBERS, device=device), torch.randn(images, NUMBERS, device=device)

    def work() -> Tensor:
        found = mix_condition(logits, table) if form == "op" else logits.softmax(1) @ table
        return torch.autograd.grad(found, logits, upstream)[0]

    return {"form": form, "images": images, "bytes": 2 * table.nbytes, "seconds": summary(of_kernels(work, device))}


def predicted(arch: int) -> dict[str, Any]:
    """Predicts the seconds of each variant from machine code compiled here, for the GPUs of this architecture in kernels/compile.py."""
    from triton.backends.compiler import GPUTarget

    from dtta_fast.kernels import compile as machine

    names = {name for name, *_ in NOISE}
    chosen = [variant for variant in machine.variants() if variant.name in names]
    found = machine.reports([GPUTarget("cuda", arch, 32)], chosen)
    return {
        report.variant.name: {gpu: {"seconds": seconds, "bound": bound} for gpu, (seconds, bound) in report.times.items()}
        for report in found
    }
