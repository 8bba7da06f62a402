"""One adaptation on each device of this machine: whether it works there, how long it takes, and which backend runs the ops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dtta_fast import presets, zoo
from dtta_fast.config import AdaptConfig
from dtta_fast.kernels import backends
from dtta_fast.runtime.environment import device_name
from dtta_fast.session.adapter import Adapter
from dtta_fast.session.precision import denoiser_dtype

TIMED = presets.FAST.replace(precheck="off")  # so that every step runs
COMPARED = TIMED.replace(precision="fp32", guard=0)  # rounding stays small, and no guard takes the update back
MOST_DIFFERENCE = 1e-3  # in the probability of a class


@dataclass(frozen=True)
class Found:
    """The result of the check on one device.

    Attributes:
        device: "cpu", "cuda:0", ...
        name: the processor's or the GPU's name.
        error: why the adaptation failed, or None.
        milliseconds: the time of the second call for one image, guard included; the first one warms up.
        steps, evaluations: updates made, and forwards of the denoiser for one (timestep, noise, condition).
        precision: the dtype of the denoiser.
        ops: the backend of the ops, and why it is that one.
        difference: how far the probability of any class is from the CPU's, both in float32; None on the CPU.
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
        """Returns a one-line summary."""
        if self.error is not None:
            return f"{self.device} FAILS on {self.name}: {self.error}"
        work = f"{self.steps} steps and a guard, {self.evaluations} evaluations, in {self.milliseconds:.0f} ms"
        close = "" if self.difference is None else f", within {self.difference:.1e} of the CPU in float32"
        return f"{self.device} works: {work}; {self.precision}, ops by {self.ops}{close}; {self.name}"


def devices() -> list[torch.device]:
    """The CPU, and every CUDA or ROCm GPU that torch sees."""
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def check(found: Sequence[torch.device] | None = None) -> list[Found]:
    """Adapts the digits zoo to one image on each device. Other devices are compared with the CPU, where that worked before them.

    Raises:
        FileNotFoundError: the zoo's weights are missing.
    """
    zoo.folder("digits")
    results: list[Found] = []
    expected: Tensor | None = None
    for device in devices() if found is None else found:
        try:
            probabilities = _compared(device)
            timed = _timed(device)
            if expected is not None:
                difference = float((probabilities - expected).abs().max())
                timed = replace(timed, difference=difference)
                if not difference <= MOST_DIFFERENCE:
                    far = f"the probability of a class is {difference:.2g} from the CPU's; at most {MOST_DIFFERENCE} is expected"
                    timed = replace(timed, error=far)
            elif device.type == "cpu":
                expected = probabilities
        except Exception as error:  # whatever it is, it is what the user has to see
            first = (str(error).strip() or "without a message").splitlines()[0]
            timed = Found(str(device), device_name(device), error=f"{type(error).__name__}: {first}")
        results.append(timed)
    return results


def _adapter(device: torch.device, config: AdaptConfig) -> tuple[Adapter, Tensor]:
    """An adapter of the digits zoo on the device, and an image for it."""
    model, denoiser = zoo.load("digits")
    image = torch.rand(1, 3, 8, 8, dtype=torch.float32, device="cpu", generator=torch.Generator("cpu").manual_seed(0))
    image = torch.nn.functional.interpolate(image, size=32, mode="bilinear")
    return Adapter(model.to(device), denoiser.to(device), config), image.to(device)


def _compared(device: torch.device) -> Tensor:
    """The probabilities of the classes after an adaptation in float32.

    Raises:
        RuntimeError: they are those from before it.
    """
    adapter, image = _adapter(device, COMPARED)
    result = adapter.adapt(image)
    if torch.equal(result.outputs, result.outputs_before):
        raise RuntimeError("the adaptation changed nothing")
    return result.outputs.double().softmax(1).cpu()


def _timed(device: torch.device) -> Found:
    adapter, image = _adapter(device, TIMED)
    milliseconds = 1000 * adapter.warmup(image)["warm"]
    result = adapter.adapt(image)
    dtype = denoiser_dtype(TIMED.precision, torch.float32, device)
    return Found(
        str(device),
        device_name(device),
        None,
        milliseconds,
        result.steps_run,
        int(result.evaluations),
        str(dtype).removeprefix("torch."),
        "{} ({})".format(*backends.serving(device.type)),
    )
