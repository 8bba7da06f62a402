"""Describes a package and checks whether it fits a machine and an adapter."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dtta_fast.config import AdaptConfig
from dtta_fast.session.engine import Engine

FORMAT = 2  # format of the functions in a package and of its manifest; session.cpp reads the same format
CAPABILITIES = ("DEFAULT", "NO AVX", "AVX2", "AVX512")  # of processors; each includes all the previous ones
EXTENSIONS = ("avx", "amx", "bmi", "f16c", "fma", "gfni", "sha", "sse", "vaes", "vpclmul", "adx", "popcnt", "movbe")
KEEPER = "decide"  # the function whose metadata stores the manifest
MOST_VALUES = 2**30  # maximum number of values in a batch of images and in outputs
UNUSED = ("compile", "memory_budget", "chunk")  # settings that do not change what a package computes


@dataclass(frozen=True)
class Manifest:
    """Attributes:
    format: package format. torch: version that compiled the package. device: "cpu". capability: torch's name for the processor's vector
        instructions. instructions: those that the code may use, by their Linux names, separated by spaces.
    weights: fingerprint of model, denoiser, noise process and calibration. config: the settings, as JSON. task: class of the task, and a
        fingerprint of its normalisation and of how it interprets outputs.
    batch, height, width: shape of the input images [batch, 3, height, width]. outputs: shape of the model's outputs, as sizes separated
        by spaces.
    steps, guard: as in the config. evaluations: per step and image. online: whether the state persists between calls.
    state: dtypes and shapes of the state tensors, as JSON.
    tolerance: maximum allowed difference of outputs from the engine's, in the unit of the outputs. measured: the largest difference
        measured at export, over measured_images images.
    """

    format: int
    torch: str
    device: str
    capability: str
    instructions: str
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
        """Returns the manifest in the form in which AOTInductor stores the metadata of a function."""
        return {field.name: json.dumps(value) if not isinstance(value := getattr(self, field.name), str) else value for field in FIELDS}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], path: str | Path) -> Manifest:
        """Restores a manifest from the result of to_metadata().

        Raises:
            ValueError: the metadata is not a manifest of this format.
        """
        found = {field.name: metadata.get(field.name) for field in FIELDS}
        if found["format"] != str(FORMAT):
            raise ValueError(f"{path} is of format {found['format'] or 'unknown'}, and this version reads {FORMAT}; export it again")
        try:
            values: Any = {
                field.name: found[field.name] if field.type == "str" else json.loads(found[field.name] or "") for field in FIELDS
            }
            _check(values)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} has a damaged manifest ({error}); export it again") from error
        return cls(**values)

    def misfits(self) -> list[str]:
        """Returns the reasons why this machine cannot run the package; empty if it can."""
        found = []
        here = torch_version()
        if self.torch != here:
            found.append(f"it was compiled by torch {self.torch}, and this is {here}")
        if self.device != "cpu":
            found.append(f"it is for device {self.device!r}, and packages run on 'cpu'")
        capability = torch.backends.cpu.get_cpu_capability()
        if rank(self.capability) > rank(capability):
            found.append(f"its code takes {self.capability}, and this processor has {capability}")
        lacking = set(self.instructions.split()) - instructions() if instructions() else set()
        if lacking:
            found.append(f"its code may take {', '.join(sorted(lacking))}, which this processor does not have")
        return found

    def differences(self, engine: Engine) -> list[str]:
        """Describes how an adapter's engine differs from the package; empty if both compute the same."""
        found = []
        theirs, ours = json.loads(self.config), comparable(engine.config)
        for name in sorted({*theirs, *ours}):
            if theirs.get(name) != ours.get(name):
                found.append(f"{name} is {theirs.get(name)!r} in it, and {ours.get(name)!r} in the adapter")
        task = task_of(engine, [self.batch, 3, self.height, self.width], [int(side) for side in self.outputs.split()])
        if self.task != task:
            found.append(f"its task is {self.task}, and the adapter's {task}")
        weights = weights_digest(engine)
        if self.weights != weights:
            found.append(f"its weights have fingerprint {self.weights}, and the adapter's {weights}")
        return found


FIELDS = dataclasses.fields(Manifest)


def _check(values: Mapping[str, Any]) -> None:
    """Raises ValueError if a value has the wrong type or range, or if sizes are larger than any memory."""
    for field in FIELDS:
        value = values[field.name]
        if field.type == "int" and not (type(value) is int and 0 <= value < 2**31):
            raise ValueError(f"{field.name} is {str(value)[:40]}, no whole number from 0 to 2^31")
        if field.type == "bool" and not isinstance(value, bool):
            raise ValueError(f"{field.name} is {str(value)[:40]}, not true or false")
        if field.type == "float" and not (type(value) in (int, float) and 0 <= value < math.inf):
            raise ValueError(f"{field.name} is {str(value)[:40]}, no number of 0 or more")
        if field.type == "str" and not isinstance(value, str):
            raise ValueError(f"{field.name} is missing")
    if not isinstance(json.loads(values["config"]), dict) or not isinstance(json.loads(values["state"]), list):
        raise ValueError("config is not an object, or state is not a list")
    outputs = values["outputs"].split()
    if not outputs or not all(re.fullmatch("[0-9]{1,10}", side) for side in outputs):
        raise ValueError(f"outputs is {values['outputs'][:40]!r}, not the sides of a shape")
    for shape in ([values["batch"], 3, values["height"], values["width"]], list(map(int, outputs))):
        if not 0 < math.prod(shape) < MOST_VALUES:
            raise ValueError(f"it is for tensors of shape {shape}; they have 1 to {MOST_VALUES} values")
    if values["steps"] < 1:
        raise ValueError("steps is 0")


def rank(capability: str) -> int:
    """Returns the rank of a vector instruction level; an unknown level ranks above all known ones."""
    return CAPABILITIES.index(capability) if capability in CAPABILITIES else len(CAPABILITIES)


def torch_version() -> str:
    """Returns major.minor.patch, the part of the version that C++ knows."""
    found = re.match(r"\d+\.\d+\.\d+", torch.__version__)
    return found[0] if found else torch.__version__


def instructions() -> set[str]:
    """Returns the extensions of this processor that compilers use, by their Linux names; empty if the system does not list them."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.is_file() else []
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return {flag for flag in flags if flag.startswith(EXTENSIONS)}


@torch.no_grad()
def task_of(engine: Engine, crop: list[int], outputs: list[int]) -> str:
    """Returns a task's class and eight hex digits of its results for a crop and outputs of these shapes: transforms, classes, sizes."""
    task, found = engine.task, hashlib.sha256()
    images, given = (
        (torch.arange(math.prod(shape), dtype=torch.float32, device="cpu") * 0.37).sin().reshape(shape) / 2 + 0.5
        for shape in (crop, outputs)
    )
    for tensor in (task.normalise(engine.program.problem.model, images), task.decision(given, engine.program.problem.denoiser)):
        found.update((tensor.double() * 1e4).round().to(torch.int64).numpy().tobytes())
    return f"{type(task).__name__} {found.hexdigest()[:8]}"


def comparable(config: AdaptConfig) -> dict[str, Any]:
    """Returns the settings that change what a package computes, as JSON values."""
    kept = {name: value for name, value in dataclasses.asdict(config).items() if name not in UNUSED}
    found: dict[str, Any] = json.loads(json.dumps(kept))
    return found


@torch.no_grad()
def weights_digest(engine: Engine) -> str:
    """Hashes all weights and buffers of model and denoiser bitwise, the noise process and the calibration to sixteen hex digits."""
    found = hashlib.sha256()
    for module in (engine.model, engine.denoiser):
        for name, tensor in sorted({**dict(module.named_parameters()), **dict(module.named_buffers())}.items()):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    found.update(engine.denoiser.process.table.cpu().numpy().tobytes())
    calibration = engine.denoiser.calibration
    found.update(json.dumps(None if calibration is None else dataclasses.asdict(calibration)).encode())
    return found.hexdigest()[:16]
