"""The GPU kernels' machine code for GPUs that are not here: no stack, no spills, 16-byte accesses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from dtta_fast.kernels import compile as kernels  # noqa: E402

if not (Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump").is_file():
    pytest.skip("this Triton has no NVIDIA tools", allow_module_level=True)

NAMES = {f"{target.backend}-{target.arch}": target for target in kernels.TARGETS}
CONSUMERS = ("cuda-89", "cuda-120")  # GPUs whose code differs little from that for sm_80 and sm_100


def one_of_each() -> list[kernels.Variant]:
    """The first variant of each kernel with the same tensors left out: they differ in dtypes and sizes."""
    found: dict[tuple[object, ...], kernels.Variant] = {}
    for variant in kernels.variants():
        given = frozenset(name for name, kind in variant.types.items() if kind is not None)
        found.setdefault((variant.kernel, given, variant.stores), variant)
    return list(found.values())


@triton.jit
def cosines(x, WIDTH: tl.constexpr):
    here = x + tl.arange(0, WIDTH)
    z = tl.load(here)
    tl.store(here, tl.cos(z) + tl.sin(z))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_code(name: str) -> None:
    """Every kernel, in one compilation each, for CONSUMERS in one dtype; and the noise kernels' streams."""
    wrong = []
    for row in kernels.reports([NAMES[name]], one_of_each() if name in CONSUMERS else None):
        variant, code = row.variant, row.code
        if code.stack or code.spills:
            wrong.append((variant.name, "stack or spills", code))
        if {"normed", "to_normed", "to_modulation"} & set(variant.types):
            # a token's statistics are the only numbers that are read and written by themselves
            narrow = [sum(count for bits, count in counts.items() if bits < 128) for counts in (code.loads, code.stores)]
            statistics = 2 if variant.types.get("mean") else 0
            if narrow[0] > statistics or narrow[1] > statistics or 128 not in code.stores:
                wrong.append((variant.name, "accesses of less than 16 bytes", code))
        if not variant.loads:
            continue
        # 16-byte accesses of a thread; the learned variance's zeros are a second store of the gradient's size
        loads = sum(row.elements * variant.size(stream) // 16 for stream in variant.loads)
        stores = sum(row.elements * variant.size(stream) // 16 * (1 + (stream == "gradient")) for stream in variant.stores)
        gradient = "gradient" in variant.stores
        scalars = 2 + 1 + 2 + 2 * gradient  # two coefficients, timestep, image id, step; with a gradient upstream and the weight
        narrow = sum(count for bits, count in code.loads.items() if bits < 128)
        partial = sum(count for bits, count in code.stores.items() if bits < 128)
        if code.loads.get(128, 0) != loads or narrow > scalars:
            wrong.append((variant.name, f"loads: {loads} of 16 bytes and {scalars} scalars expected", code.loads))
        if code.stores.get(128, 0) != stores or partial != ("partial" in variant.types):
            wrong.append((variant.name, f"stores: {stores} of 16 bytes expected", code.stores))
        if "x_t" in variant.types and code.shared:
            wrong.append((variant.name, "shared memory: a layout conversion", code.shared))
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize("name", ["cuda-80", "cuda-90"])
def test_stack_is_seen(name: str) -> None:
    bad = kernels.Variant("cosines", cosines, {"x": "*fp32"}, {"WIDTH": 1024}, 4)
    assert kernels.report(bad, NAMES[name]).code.stack > 0


def test_interpreter_is_refused() -> None:
    program = "import os; os.environ['TRITON_INTERPRET'] = '1'; from dtta_fast.kernels import compile; compile.main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode != 0
    assert "TRITON_INTERPRET" in done.stderr
