"""Cross-compiles the GPU kernels, without needing the GPUs, and analyses their machine code: python -m dtta_fast.kernels.compile."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dtta_fast.kernels import machine_code
from dtta_fast.kernels.triton import mix, noise, norm, timesteps

TARGETS = (*(GPUTarget("cuda", arch, 32) for arch in (80, 89, 90, 100, 120)), GPUTarget("hip", "gfx942", 64))
PAIRS, ELEMENTS = 180, 4 * 64 * 64  # workload of the predicted time, for one image
SIZE = {"fp32": 4, "bf16": 2, "fp16": 2}
DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DRAWS = {"table": "*fp32", "timesteps": "*i64", "image_ids": "*i64", "step": "*i64", "noise": None, "seed": "i64"}


@dataclass(frozen=True)
class Variant:
    """A kernel with its argument types. Arguments missing from `types` are i32; None marks an omitted argument."""

    name: str
    kernel: Any
    types: dict[str, str | None]
    constants: dict[str, Any]
    warps: int | None
    """None means as many as `threads` take."""
    loads: tuple[str, ...] = ()
    """Tensors read element by element, for the straight-line noise kernels."""
    stores: tuple[str, ...] = ()
    threads: int = noise.THREADS

    def warps_on(self, target: GPUTarget) -> int:
        return self.warps or max(1, self.threads // target.warp_size)

    def size(self, name: str) -> int:
        return SIZE[str(self.types[name]).removeprefix("*")]

    @property
    def bytes_an_element(self) -> float:
        """DRAM traffic in bytes per element; the x0 of an image is read once and then cached."""
        return sum(self.size(name) / (PAIRS if name == "x0" else 1) for name in (*self.loads, *self.stores))


@dataclass(frozen=True)
class Report:
    """The code of a variant for a target."""

    variant: Variant
    target: str
    code: machine_code.Code
    elements: int
    """Elements per thread."""
    instructions: dict[str, float] = field(default_factory=dict)
    """Instructions per element, by pipe; only for noise kernels on NVIDIA."""
    times: dict[str, tuple[float, str]] = field(default_factory=dict)
    """Predicted seconds and the limiting resource, by GPU."""


def _noise_variants() -> list[Variant]:
    found = []

    def constants(dtype: str) -> dict[str, int]:
        return {"WIDTH": noise.WIDTH, "VECTOR": noise._vector(torch.empty(0, dtype=DTYPE[dtype], device="cpu"))}

    for x0, x_t in (("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16")):
        types = {**DRAWS, "x0": f"*{x0}", "x_t": f"*{x_t}"}
        found.append(Variant(f"add_noise {x0} -> {x_t}", noise.add_noise_kernel, types, constants(x_t), None, ("x0",), ("x_t",)))
    pairs = (("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp16"), ("fp16", "fp32"))
    cases = [(*pair, gradient, False) for pair in pairs for gradient in (False, True)]
    for prediction, x0, gradient, l1 in [*cases, ("bf16", "fp32", True, True)]:
        given = f"*{prediction}" if gradient else None
        types = {**DRAWS, "prediction": f"*{prediction}", "x0": f"*{x0}", "partial": "*fp32", "gradient": given}
        types |= {"upstream": "*fp32" if gradient else None, "loss": None}
        name = f"denoising_loss {prediction}, x0 {x0}{', L1' * l1}{', gradient' * gradient}"
        stores = ("gradient",) if gradient else ()
        values = {**constants(prediction), "L1": l1}
        found.append(Variant(name, noise.denoising_loss_kernel, types, values, None, ("prediction", "x0"), stores))
        if x0 == "fp32" and prediction != "fp16":
            whole = {**types, "partial": None, "loss": "*fp32"}
            found.append(Variant(f"{name}, whole row", noise.denoising_loss_kernel, whole, values, None))
    types = {"partial": "*fp32", "table": "*fp32", "timesteps": "*i64", "loss": "*fp32"}
    return [*found, Variant("loss_sum", noise.loss_sum_kernel, types, {"BLOCK": 128}, 1)]


def _mix_variants() -> list[Variant]:
    warps = 4  # Triton's default
    floats = dict.fromkeys(("weights", "to_weights"), "*fp32")
    found = []
    for dtype in ("fp32", "bf16"):
        given: dict[str, str | None] = dict.fromkeys(
            ("logits", "embeddings", "mixed", "upstream", "to_logits", "to_embeddings"), f"*{dtype}"
        )
        for scale, chosen in ((None, None), ("fp32", "*i64")):
            types = {**given, **floats, "logit_scale": scale, "chosen": chosen}
            tail = f"{dtype}{', logit_scale and chosen' if scale else ''}"
            constants = {"PER_IMAGE": False, "ROW": mix.ROW, "CLASSES": mix.CLASSES, "NUMBERS": mix.NUMBERS}
            kernels = (mix.mix_kernel, mix.to_weights_kernel, mix.to_logits_kernel)
            for name, kernel in zip(("mix", "to_weights", "to_logits"), kernels, strict=True):
                found.append(Variant(f"{name} {tail}", kernel, types, constants, warps))
        found.append(Variant(f"to_embeddings {dtype}", mix.to_embeddings_kernel, {**given, **floats}, constants, warps))
    return found


def _timestep_variants() -> list[Variant]:
    types: dict[str, str | None] = {**dict.fromkeys(("image_ids", "step", "timesteps"), "*i64"), "cumulative": None, "seed": "i64"}
    constants = {"STRATIFIED": True, "BITS": 0, "BLOCK": timesteps.BLOCK}
    calibrated = {**types, "cumulative": "*i64"}
    return [
        Variant("draw_timesteps stratified", timesteps.draw_timesteps_kernel, types, constants, 4),
        Variant("draw_timesteps calibrated", timesteps.draw_timesteps_kernel, calibrated, {**constants, "BITS": 10}, 4),
    ]


def _norm_variants() -> list[Variant]:
    found = []
    floats: dict[str, str | None] = {"mean": "*fp32", "rstd": "*fp32", "eps": "fp32"}
    for dtype, numbers, gated in (("bf16", 1152, True), ("bf16", 1152, False), ("bf16", 384, True), ("fp32", 1152, True)):
        streams = dict.fromkeys(("x", "total", "normed", "modulation", "to_total", "to_normed", "to_x", "to_branch"), f"*{dtype}")
        types = {**streams, **floats, "branch": f"*{dtype}", "partial": "*fp32"}
        if not gated:
            types |= {"branch": None, "to_branch": None}
        constants = {"BLOCK": norm.width(numbers)}
        threads, tail = norm.threads(numbers), f"{dtype}, {numbers} numbers{'' if gated else ', without a branch'}"
        forward = types if gated else {**types, "total": None}
        found.append(Variant(f"gated_norm {tail}", norm.gated_norm_kernel, forward, constants, None, threads=threads))
        without = {**forward, "mean": None, "rstd": None}
        found.append(Variant(f"gated_norm {tail}, no gradient", norm.gated_norm_kernel, without, constants, None, threads=threads))
        found.append(Variant(f"gated_norm_backward {tail}", norm.gated_norm_backward_kernel, types, constants, None, threads=threads))
    types, constants = {"partial": "*fp32", "to_modulation": "*bf16"}, {"PARTS": norm.PARTS, "WIDTH": norm.WIDTH}
    return [*found, Variant("modulation_sum", norm.modulation_sum_kernel, types, constants, None, threads=norm.WIDTH // norm.THREAD)]


def variants() -> list[Variant]:
    """Returns every kernel in the variants that the launchers use.

    Raises:
        RuntimeError: TRITON_INTERPRET=1 is set, so there is nothing to compile.
    """
    if not isinstance(noise.add_noise_kernel, triton.runtime.JITFunction):
        raise RuntimeError("TRITON_INTERPRET is set, so the kernels are not compiled; unset it")
    return [*_noise_variants(), *_mix_variants(), *_timestep_variants(), *_norm_variants()]


def build(variant: Variant, target: GPUTarget) -> Any:
    """Compiles a kernel with the alignments that the JIT infers for aligned tensors and sizes divisible by 16."""
    signature, constants, aligned = {}, {}, {}
    for index, parameter in enumerate(variant.kernel.params):
        name = parameter.name
        kind = "constexpr" if parameter.is_constexpr else variant.types.get(name, "i32")
        signature[name] = kind or "constexpr"
        if signature[name] == "constexpr":
            constants[name] = None if kind is None else variant.constants[name]
        elif kind != "fp32" and not parameter.do_not_specialize:
            aligned[(index,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(variant.kernel, signature, constants, aligned), target=target, options={"num_warps": variant.warps_on(target)}
    )


def report(variant: Variant, target: GPUTarget) -> Report:
    compiled = build(variant, target)
    nvidia = target.backend == "cuda"
    code = machine_code.cuda(compiled.asm["cubin"]) if nvidia else machine_code.amd(compiled.asm["amdgcn"])
    code = replace(code, shared=compiled.metadata.shared)  # AMD sets it at launch, so it is not in the assembly
    name = f"sm_{target.arch}" if nvidia else str(target.arch)
    if not variant.loads:
        return Report(variant, name, code, 0)
    elements = variant.constants["WIDTH"] // (variant.warps_on(target) * target.warp_size)
    instructions = {pipe: count / elements for pipe, count in code.pipes.items()}
    times = {
        gpu.name: machine_code.roofline(gpu, PAIRS * ELEMENTS, variant.bytes_an_element, instructions)
        for gpu in machine_code.GPUS
        if nvidia and gpu.arch == target.arch
    }
    return Report(variant, name, code, elements, instructions, times)


def reports(targets: Sequence[GPUTarget] = TARGETS, chosen: Sequence[Variant] | None = None) -> list[Report]:
    """Reports on variants and targets. Raises FileNotFoundError if the tools for reading a cubin are missing; else as variants()."""
    return [report(variant, target) for variant in (variants() if chosen is None else chosen) for target in targets]


def _widths(counts: dict[int, int]) -> str:
    return " ".join(f"{count}x{bits // 8}" for bits, count in sorted(counts.items(), reverse=True)) or "-"


def _print(found: list[Report]) -> None:
    table = Table(title=f"Kernels; µs predicted for {PAIRS} pairs of 4x64x64")
    for head in ("kernel", "target"):
        table.add_column(head, no_wrap=True)
    for head in ("regs", "stack", "spill", "shared", "loads", "stores", "B/elem", *machine_code.PIPES, "µs"):
        table.add_column(head, justify="right", no_wrap=True)
    last = ""
    for row in found:
        code, variant = row.code, row.variant
        pipes = [f"{row.instructions[pipe]:.1f}" if row.instructions else "" for pipe in machine_code.PIPES]
        time = "".join(f"{1e6 * seconds:.1f} ({bound})" for seconds, bound in row.times.values())
        counts = (code.registers, code.stack, code.spills, code.shared, _widths(code.loads), _widths(code.stores))
        width = f"{variant.bytes_an_element:.2f}" if variant.loads else ""
        table.add_row("" if variant.name == last else variant.name, row.target, *map(str, counts), width, *pipes, time)
        last = variant.name
    console = Console(width=None if sys.stdout.isatty() else 210)
    console.print(table)
    console.print("Loads and stores are count x bytes; B/elem is DRAM traffic; the pipes are instructions an element of a thread.")
    for gpu in machine_code.GPUS:
        rates = f"{gpu.bandwidth / 1e9:.0f} GB/s, {gpu.sms} SMs at {gpu.clock / 1e9:.2f} GHz"
        lanes = ", ".join(f"{pipe} {gpu.lanes(pipe)}" for pipe in machine_code.PIPES[:-1])
        console.print(f"{gpu.name} (sm_{gpu.arch}): {rates}; lanes a clock of an SM: {lanes}, issue {machine_code.ISSUE}.")
    console.print(machine_code.SOURCE)


def _row(row: Report) -> dict[str, Any]:
    times = {gpu: {"seconds": seconds, "bound": bound} for gpu, (seconds, bound) in row.times.items()}
    code = asdict(row.code)
    return {"kernel": row.variant.name, "target": row.target, **code, "instructions_per_element": row.instructions, "times": times}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dtta_fast.kernels.compile", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    path = parser.parse_args().json
    try:
        found = reports()
    except (RuntimeError, OSError) as error:
        sys.exit(f"compile: {error}")
    _print(found)
    if path is not None:
        path.write_text(json.dumps([_row(row) for row in found], indent=2) + "\n")


if __name__ == "__main__":
    main()
