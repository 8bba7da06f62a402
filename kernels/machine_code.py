"""Analyses the machine code of a compiled kernel: registers, stack, vector widths, instructions per pipe and predicted time."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

PIPES = ("FP32", "INT", "MUFU", "conversion", "memory", "other")
FAMILIES = {
    "FP32": ("FFMA", "FADD", "FMUL", "FSEL", "FSETP", "FMNMX", "FSET", "FCHK", "FFMA2", "FADD2", "FMUL2"),
    "INT": ("IMAD", "IADD", "LOP3", "SHF", "ISETP", "SEL", "LEA", "IABS", "IMNMX", "VIADD", "PRMT", "IMUL", "PLOP3"),
    "MUFU": ("MUFU", "I2F", "F2I", "F2F"),  # the conversions that run on the special function unit
    "conversion": ("I2FP", "F2FP"),
    "memory": ("LDG", "STG", "LDS", "STS", "LDL", "STL", "ATOM", "RED", "LDSM"),
}
PIPE = {name: pipe for pipe, names in FAMILIES.items() for name in names}
AMD_BITS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "short": 16, "ushort": 16, "sshort": 16, "byte": 8, "ubyte": 8}


@dataclass(frozen=True)
class Gpu:
    """Throughput figures of a GPU; lanes are results per clock per SM."""

    name: str
    arch: int
    """Architecture of the code that it runs."""
    bandwidth: float
    """DRAM bandwidth in bytes/s."""
    sms: int
    clock: float
    """Boost clock in Hz."""
    fp32: int
    int32: int

    def lanes(self, pipe: str) -> int:
        return {"FP32": self.fp32, "INT": self.int32, "MUFU": 16, "conversion": 64, "memory": 32}[pipe]


GPUS = (
    Gpu("A100 SXM 80GB", 80, 2039e9, 108, 1.410e9, 64, 64),
    Gpu("H100 SXM", 90, 3350e9, 132, 1.980e9, 128, 64),
    Gpu("RTX 4090", 89, 1008e9, 128, 2.520e9, 128, 64),
)
ISSUE = 128  # lanes: 4 schedulers per SM, each issuing one warp instruction per clock
SOURCE = (
    "Bandwidth, SMs, boost clock and FP32 lanes: NVIDIA A100 datasheet and GA100 whitepaper, H100 datasheet and GH100 whitepaper, "
    "Ada GPU architecture whitepaper. INT, MUFU 16 lanes, conversions 64: CUDA C++ Programming Guide, throughput of native arithmetic "
    "instructions. Assumed, not in that table: I2F, F2I and F2F share the MUFU pipe, I2FP and F2FP do not; memory 32 lanes (LD/ST units)."
)


@dataclass(frozen=True)
class Code:
    """Static figures for one thread: each instruction counts once, whether or not its branch or predicate is taken."""

    registers: int
    stack: int
    """Bytes."""
    spills: int
    """Bytes on NVIDIA (4 or more per LDL or STL), registers on AMD."""
    shared: int
    """Bytes."""
    loads: dict[int, int] = field(default_factory=dict)
    """Number of global loads by width in bits."""
    stores: dict[int, int] = field(default_factory=dict)
    pipes: dict[str, int] = field(default_factory=dict)
    """Instructions by pipe; empty on AMD."""


def _bits(modifiers: str) -> int:
    for part in modifiers.split("."):
        if part in ("256", "128", "64"):
            return int(part)
        if part in ("U8", "S8"):
            return 8
        if part in ("U16", "S16"):
            return 16
    return 32


def cuda(cubin: bytes, tool: Path | str | None = None) -> Code:
    """Reads a cubin with cuobjdump and nvdisasm, which ship inside Triton.

    Raises:
        FileNotFoundError: Triton does not include these tools. ValueError: the input is not a valid cubin.
    """
    if tool is None:
        import triton

        folder = Path(triton.__file__).parent / "backends/nvidia/bin"
        missing = [name for name in ("cuobjdump", "nvdisasm") if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{' and '.join(missing)} not in {folder}; install a Triton wheel with the NVIDIA backend")
        tool = folder / "cuobjdump"
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [tool, "--dump-resource-usage", "--dump-sass", path]
        try:
            sass = subprocess.run(command, capture_output=True, text=True, errors="replace", check=True, timeout=60).stdout
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            raise ValueError(f"cubin of {len(cubin)} bytes is none that cuobjdump reads: {error}; compile the kernel again") from error
    found = re.search(r"REG:(\d{1,9}) STACK:(\d{1,9}) SHARED:(\d{1,9}) LOCAL:(\d{1,9})\b", sass)
    if found is None:
        raise ValueError(f"cuobjdump printed no resource usage: {sass[:200]!r}")
    registers, stack, shared, local = (int(number) for number in found.groups())
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    pipes: Counter[str] = Counter()
    spills = 0
    for name, modifiers in re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)((?:\.\w+)*)", sass, re.M):
        if name == "NOP":  # padding
            continue
        stem = re.sub(r"(?<=IADD)3$", "", name)
        pipes[PIPE.get(stem, "other")] += 1
        if name == "LDG":
            loads[_bits(modifiers)] += 1
        elif name == "STG":
            stores[_bits(modifiers)] += 1
        elif name in ("LDL", "STL"):
            spills += _bits(modifiers) // 8
    return Code(registers, stack + local, spills, shared, dict(loads), dict(stores), {pipe: pipes[pipe] for pipe in PIPES})


def amd(assembly: str) -> Code:
    """Parses amdgcn assembly.

    Raises:
        ValueError: a count is missing, or a memory access has an unknown width.
    """

    def value(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d{{1,9}})\b", assembly)
        if found is None:
            raise ValueError(f"the assembly has no .{name}")
        return int(found[1])

    counts: dict[str, Counter[int]] = {"load": Counter(), "store": Counter()}
    for kind, width in re.findall(r"^\s+(?:global|buffer|flat)_(load|store)_(\w+)", assembly, re.M):
        bits = AMD_BITS.get(width.removesuffix("_d16_hi").removesuffix("_d16").split("_")[0])
        if bits is None:
            raise ValueError(f"the assembly has {kind}_{width[:40]}, whose width is unknown; there are {', '.join(AMD_BITS)}")
        counts[kind][bits] += 1
    spills = value("vgpr_spill_count") + value("sgpr_spill_count")
    return Code(
        value("vgpr_count"),
        value("private_segment_fixed_size"),
        spills,
        value("group_segment_fixed_size"),
        dict(counts["load"]),
        dict(counts["store"]),
    )


def roofline(gpu: Gpu, elements: int, bytes_an_element: float, instructions: dict[str, float]) -> tuple[float, str]:
    """Predicts seconds and the bottleneck from `instructions` per element by pipe, assuming perfect overlap, occupancy and caching."""
    rate = gpu.sms * gpu.clock
    times = {pipe: elements * count / (rate * gpu.lanes(pipe)) for pipe, count in instructions.items() if pipe != "other"}
    times["issue"] = elements * sum(instructions.values()) / (rate * ISSUE)
    times["DRAM"] = elements * bytes_an_element / gpu.bandwidth
    bound = max(times, key=lambda name: times[name])
    return times[bound], bound
