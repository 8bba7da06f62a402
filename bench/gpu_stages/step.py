"""Stage 5, the step: the DiT's forwards by number of rows, the step and the guard as CUDA graphs, and the trace of one image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bench.gpu_stages import models
from bench.gpu_stages.calls import prepared
from bench.gpu_stages.engine import fast
from bench.gpu_stages.recording import NEEDS_GPU, Record, Setting
from bench.gpu_stages.timing import by_events, kernels_of, summary
from bench.gpu_stages.tracing import trace
from dtta_fast import Adapter
from dtta_fast.core.guard import held_out_losses
from dtta_fast.core.step import adaptation_step

ROWS = (4, 72, 48, 24, 64, 16, 8)
WARM_UPS = 3  # runs on a side stream before a capture, as torch requires


def run(setting: Setting, record: Record) -> None:
    """Measures one image under FAST in bfloat16."""
    model, denoiser = models.classifier(setting), models.dit(setting)
    images, _ = models.images(model, 1, setting)
    latents = models.latents(1, denoiser, setting)
    adapter = Adapter(model, denoiser, fast("bf16"))
    adapter.adapt(images, latents=latents)
    flops = record.measure("models", "flops a row", lambda: models.flops_a_row(denoiser, setting)) or {}
    seconds = 0.05 if setting.tiny else 0.5
    with prepared(adapter, images, latents) as (state, batch):
        program, problem = adapter.engine.program, adapter.engine.program.problem
        for rows in ROWS:
            record.measure("rows", str(rows), lambda rows=rows: forwards(problem.denoiser, rows, flops, setting, seconds))

        def step() -> Tensor:
            return adaptation_step(problem, program.schedule, state, batch.inputs, batch.x0, batch.image_ids)

        record.measure("graphs", "step", lambda: graphed(step, state, setting, seconds))
        for answers in (2, 3):
            guard = comparison(program, batch, state.step, answers)
            record.measure("graphs", f"guard of {answers} answers", lambda guard=guard: graphed(guard, (), setting, seconds))
    call = lambda: adapter.adapt(images, latents=latents)  # noqa: E731
    record.measure("trace", "FAST, 1 image", lambda: trace(call, setting.out / "trace_dit.json.gz", setting.device), takes=10.0)


def forwards(denoiser: Any, rows: int, flops: dict[str, int], setting: Setting, seconds: float) -> dict[str, Any]:
    """Times the denoiser on rows of one image, without gradient (as in a guard) and with a backward to the condition (as in a step)."""
    generator = torch.Generator(setting.device).manual_seed(5)
    x_t = torch.randn(rows, *denoiser.latent_shape, generator=generator, device=setting.device).to(denoiser.dtype)
    time = torch.randint(0, len(denoiser.process), (rows,), generator=generator, device=setting.device)
    condition = denoiser.class_embeddings({})[:1].clone()

    def forward() -> None:
        with torch.no_grad():
            denoiser(x_t, time, condition)

    upstream = torch.randn_like(denoiser(x_t, time, condition).detach())

    def both() -> None:
        leaf = condition.detach().requires_grad_()
        torch.autograd.grad(denoiser(x_t, time, leaf), leaf, upstream)

    found = {}
    for name, work, count in (("forward", forward, "forward"), ("forward and backward", both, "to the condition")):
        found[name] = {**summary(by_events(work, setting.device, 30, seconds)), "flops": rows * flops[count] if flops else None}
    return found


def comparison(program: Any, batch: Any, step: Tensor, answers: int) -> Callable[[], Tensor]:
    """Returns a function that runs the guard's forwards for one image under that many answers."""
    conditions = program.problem.denoiser.class_embeddings({})[:answers]
    rows = torch.zeros(answers, dtype=torch.int64, device=batch.x0.device)
    several, named = batch.x0[rows], batch.image_ids[rows]
    return lambda: held_out_losses(program.problem, program.schedule, conditions, several, named, step)


def graphed(work: Callable[[], Tensor], written: Any, setting: Setting, seconds: float) -> dict[str, Any]:
    """Compares eager `work` with a CUDA graph of it: whether it can be captured, whether the results are the same, and the seconds of both.

    The results are what it returns and what it writes, and they are compared bit for bit.

    written: nested tensors that `work` updates in place.
    """
    tensors = [tensor for tensor in pytree.tree_leaves(written) if isinstance(tensor, Tensor)]
    before = [tensor.clone() for tensor in tensors]

    def restore() -> None:
        for tensor, kept in zip(tensors, before, strict=True):
            tensor.copy_(kept)

    def results(run: Callable[[], Tensor]) -> list[Tensor]:
        restore()
        return [run().clone(), *(tensor.clone() for tensor in tensors)]

    found: dict[str, Any] = {"eager": summary(by_events(work, setting.device, 30, seconds))}
    eager = results(work)
    found["eager twice the same"] = all(map(torch.equal, eager, results(work)))
    if setting.device.type != "cuda":
        restore()
        return {**found, "graph": {"left out": NEEDS_GPU}}
    found |= kernels_of(work, setting.device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            work()
    torch.cuda.current_stream().wait_stream(side)
    restore()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            captured = work()
    except Exception as error:
        torch.cuda.synchronize()
        return {**found, "capturable": False, "reason": str(error).strip().splitlines()[0][:400]}

    def replay() -> Tensor:
        graph.replay()
        return captured

    replayed = results(replay)
    pairs = [(one, other) for one, other in zip(eager, replayed, strict=True) if one.is_floating_point() and one.numel()]
    found |= {
        "capturable": True,
        "bit for bit the same": all(map(torch.equal, eager, replayed)),
        "largest difference": max(float((one - other).abs().max()) for one, other in pairs),
        "graph": summary(by_events(replay, setting.device, 30, seconds)),
    }
    restore()
    return found
