"""What a package says of itself, and whether it fits a machine and an adapter."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dtta_fast.config import AdaptConfig
from dtta_fast.engine import Engine

FORMAT = 1  # of the functions in a package and of its manifest; session.cpp reads the same
CAPABILITIES = ("DEFAULT", "NO AVX", "AVX2", "AVX512")  # of processors, each with what those before it have
KEEPER = "decide"  # the function whose metadata the manifest is
UNUSED = ("compile", "memory_budget", "chunk")  # settings that do not change what a package computes


@dataclass(frozen=True)
class Manifest:
    """Attributes:
    format: of the package. torch: the version that compiled it. device: "cpu". capability: the processor's vector instructions that
        its code takes. threads: of its generated loops.
    weights: fingerprint of model, denoiser, noise process and calibration. config: the settings, as JSON. task: its class.
    batch, height, width: of the images [batch, 3, height, width] that it takes. outputs: shape of the model's, its sides separated by
        spaces.
    steps, guard: as in the config. evaluations: of a step, an image. online: whether the state goes on from call to call.
    state: names and shapes of the state's tensors, as JSON.
    tolerance: how far outputs may be from the engine's, in the unit of the outputs; measured: how far they were at the export, at most,
        over measured_images images.
    """

    format: int
    torch: str
    device: str
    capability: str
    threads: int
    weights: str
    config: str
    task: str
    batch: int
    height: int
    width: int
    outputs: str
    steps: int
    guard: int
    evaluations: int
    online: bool
    state: str
    tolerance: float = 0.0
    measured: float = 0.0
    measured_images: int = 0

    def to_metadata(self) -> dict[str, str]:
        """As AOTInductor keeps it beside a function."""
        return {field.name: json.dumps(value) if not isinstance(value := getattr(self, field.name), str) else value for field in FIELDS}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], path: str | Path) -> Manifest:
        """What to_metadata() gave.

        Raises:
            ValueError: it is no manifest of this format.
        """
        found = {field.name: metadata.get(field.name) for field in FIELDS}
        if found["format"] != str(FORMAT):
            raise ValueError(f"{path} is of format {found['format'] or 'unknown'}, and this version reads {FORMAT}; export it again")
        try:
            values: Any = {
                field.name: found[field.name] if field.type == "str" else json.loads(found[field.name] or "") for field in FIELDS
            }
            json.loads(values["config"]), json.loads(values["state"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} has a damaged manifest ({error}); export it again") from error
        return cls(**values)

    def misfits(self) -> list[str]:
        """Why this machine cannot run the package, in words; empty where it can."""
        found = []
        here = torch.__version__.partition("+")[0]
        if self.torch != here:
            found.append(f"it was compiled by torch {self.torch}, and this is {here}")
        if self.device != "cpu":
            found.append(f"it is for device {self.device!r}, and packages run on 'cpu'")
        capability = torch.backends.cpu.get_cpu_capability()
        if rank(self.capability) > rank(capability):
            found.append(f"its code takes {self.capability}, and this processor has {capability}")
        return found

    def differences(self, engine: Engine) -> list[str]:
        """What is other in an adapter's engine, in words; empty where it computes the same."""
        found = []
        theirs, ours = json.loads(self.config), comparable(engine.config)
        for name in sorted({*theirs, *ours}):
            if theirs.get(name) != ours.get(name):
                found.append(f"{name} is {theirs.get(name)!r} in it, and {ours.get(name)!r} in the adapter")
        if self.task != type(engine.task).__name__:
            found.append(f"its task is {self.task}, and the adapter's {type(engine.task).__name__}")
        weights = fingerprint(engine)
        if self.weights != weights:
            found.append(f"its weights have fingerprint {self.weights}, and the adapter's {weights}")
        return found


FIELDS = dataclasses.fields(Manifest)


def rank(capability: str) -> int:
    """Of a processor's vector instructions: what is not known takes what nobody has."""
    return CAPABILITIES.index(capability) if capability in CAPABILITIES else len(CAPABILITIES)


def comparable(config: AdaptConfig) -> dict[str, Any]:
    """The settings that change what a package computes, as JSON has them."""
    kept = {name: value for name, value in dataclasses.asdict(config).items() if name not in UNUSED}
    found: dict[str, Any] = json.loads(json.dumps(kept))
    return found


@torch.no_grad()
def fingerprint(engine: Engine) -> str:
    """Sixteen hexadecimal digits of all weights and buffers of model and denoiser, bit for bit, the noise process and the calibration."""
    found = hashlib.sha256()
    for module in (engine.model, engine.denoiser):
        for name, tensor in sorted({**dict(module.named_parameters()), **dict(module.named_buffers())}.items()):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    found.update(engine.denoiser.process.table.cpu().numpy().tobytes())
    calibration = engine.denoiser.calibration
    found.update(json.dumps(None if calibration is None else dataclasses.asdict(calibration)).encode())
    return found.hexdigest()[:16]
