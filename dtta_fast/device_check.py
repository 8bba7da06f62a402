"""One adaptation on each device of this machine: whether it works there, how long it takes, and what serves it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dtta_fast import presets, zoo
from dtta_fast.adapter import Adapter
from dtta_fast.environment import device_name
from dtta_fast.kernels import backends
from dtta_fast.runtime.precision import denoiser_dtype

CONFIG = presets.FAST.replace(precheck="off")  # so that every step runs
MOST_DIFFERENCE = 0.02  # in the probability of a class; bfloat16 stays well below


@dataclass(frozen=True)
class Found:
    """What one device did.

    Attributes:
        device: "cpu", "cuda:0", ...
        name: the processor's or the GPU's name.
        error: why the adaptation failed, or None.
        milliseconds: of the second call for one image, guard included; the first one warms up.
        steps, evaluations: updates made, and forwards of the denoiser for one (timestep, noise, condition).
        precision: the dtype of the denoiser.
        ops: the backend of the ops, and why it is that one.
        difference: the largest difference of a class's probability from the CPU's answer; None on the CPU.
    """

    device: str
    name: str
    error: str | None = None
    milliseconds: float | None = None
    steps: int | None = None
    evaluations: int | None = None
    precision: str | None = None
    ops: str | None = None
    difference: float | None = None

    def __str__(self) -> str:
        """Says it all in one line."""
        if self.error is not None:
            return f"{self.device} FAILS on {self.name}: {self.error}"
        work = f"{self.steps} steps and a guard, {self.evaluations} evaluations, in {self.milliseconds:.0f} ms"
        close = "" if self.difference is None else f", within {self.difference:.1e} of the CPU's answer"
        return f"{self.device} works: {work}; {self.precision}, ops by {self.ops}{close}; {self.name}"


def devices() -> list[torch.device]:
    """The CPU, and every CUDA or ROCm GPU that torch sees."""
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def check(found: Sequence[torch.device] | None = None) -> list[Found]:
    """Adapts the digits zoo to one image on each device. The CPU comes first, and the answers of the others are compared with its answer.

    Raises:
        FileNotFoundError: the zoo's weights are missing.
    """
    zoo.folder("digits")
    results: list[Found] = []
    expected: torch.Tensor | None = None
    for device in devices() if found is None else found:
        try:
            result, probabilities = _on(device, expected)
        except Exception as error:  # whatever it is, it is what the user has to see
            first = (str(error).strip() or "without a message").splitlines()[0]
            result, probabilities = Found(str(device), device_name(device), error=f"{type(error).__name__}: {first}"), None
        results.append(result)
        expected = probabilities if expected is None else expected
    return results


def _on(device: torch.device, expected: torch.Tensor | None) -> tuple[Found, torch.Tensor]:
    model, denoiser = zoo.load("digits")
    image = torch.rand(1, 3, 8, 8, dtype=torch.float32, device="cpu", generator=torch.Generator("cpu").manual_seed(0))
    image = torch.nn.functional.interpolate(image, size=32, mode="bilinear")
    adapter = Adapter(model.to(device), denoiser.to(device), CONFIG)
    milliseconds = 1000 * adapter.warmup(image.to(device))["warm"]
    result = adapter.adapt(image.to(device))
    probabilities = result.outputs.float().softmax(1).cpu()
    difference = None if expected is None else float((probabilities - expected).abs().max())
    error = None
    if torch.equal(result.outputs, result.outputs_before) and bool(result.accepted):
        error = "the adaptation changed nothing"
    elif difference is not None and not difference <= MOST_DIFFERENCE:
        error = f"a class's probability differs by {difference:.2g} from the CPU's answer; at most {MOST_DIFFERENCE} is expected"
    return Found(
        str(device),
        device_name(device),
        error,
        milliseconds,
        result.steps_run,
        int(result.evaluations),
        str(denoiser_dtype(CONFIG.precision, denoiser.dtype, device)).removeprefix("torch."),
        "{} ({})".format(*backends.serving(device.type)),
        difference,
    ), probabilities
