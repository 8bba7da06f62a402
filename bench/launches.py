"""Counts the launches of one FAST image with DiT-XL/2 and ConvNeXt-T at 256 pixels. The CUDA tensors are fake, so you need no GPU.

    python bench/launches.py [--json FILE]

Every operator that is neither a view nor an allocation counts as one launch. On a GPU, one torch operator may run several kernels (a
reduction in two passes) or none (a reshape that copies nothing), so the count only estimates what the host issues; bench/gpu.py measures
it. For the project's own operators the number of kernels is known, and kernels beyond the first are added at the end. The image is adapted
in 3 steps, two answers are compared, and the latents are given.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections import Counter as Tally
from pathlib import Path
from typing import Any

import timm
import torch
from diffusers import DDPMScheduler

from dtta_fast import presets
from dtta_fast.denoisers.dit import DiT
from dtta_fast.denoisers.dit_network import DiTNetwork
from dtta_fast.denoisers.noise_process import NoiseProcess
from dtta_fast.measure.counting import Counter
from dtta_fast.session.engine import Engine
from dtta_fast.tasks import Classification
from dtta_fast.tasks.transforms import timm_transforms

FAKES = Path(__file__).parents[1] / "tests" / "fake" / "fake_cuda.py"
STEPS = 3  # as in FAST
ANSWERS = 2
NO_LAUNCHES = {"prim::device", "aten::promote_types"}  # queries that the fake mode sees as operators
MORE_KERNELS = {"dtta_fast::gated_norm_backward": 1, "dtta_fast::mix_condition_backward": 1}  # beyond the first kernel; see kernels/triton


def parts() -> tuple[torch.nn.Module, DiT]:
    with torch.device("meta"):
        network = DiTNetwork(32, 2, 4, 1152, 28, 16, num_classes=1000, learn_sigma=True)
        model = timm.create_model("convnext_tiny", num_classes=1000).eval()
    return model, DiT(network, NoiseProcess.from_scheduler(DDPMScheduler(1000, beta_schedule="linear")))


def counts() -> dict[str, dict[str, Any]]:
    """Counts the launches of each part of a call, in total and by operator."""
    spec = importlib.util.spec_from_file_location("fake_cuda", FAKES)
    assert spec is not None
    assert spec.loader is not None
    fakes = importlib.util.module_from_spec(spec)
    sys.modules["fake_cuda"] = fakes
    spec.loader.exec_module(fakes)
    config = presets.FAST.replace(timesteps="stratified", match="off", precheck="off")
    model, denoiser = parts()
    timm_transforms(model)  # cached; it reads values, so it has to run before the fake mode
    found: dict[str, dict[str, Any]] = {}
    with fakes.fake_cuda() as mode:
        engine = Engine(fakes.to_cuda(mode, model), fakes.to_cuda(mode, denoiser), Classification(), config)
        images, ids = torch.rand(1, 3, 224, 224, device="cuda"), torch.arange(1, device="cuda")
        latents = torch.rand(1, 4, 32, 32, device="cuda")
        engine.refresh()
        program = engine.program

        def counted(name: str, work: Any, times: int = 1) -> Any:
            with Counter() as counter:
                result = work()
            operators, phases = Tally[str](), Tally[str]()
            for (phase, operator), count in counter.counts.items():
                if operator in NO_LAUNCHES:
                    continue
                operators[operator] += count.calls
                phases[phase] += count.calls
            found[name] = {
                "launches": sum(operators.values()),
                "times": times,
                "phases": dict(phases),
                "operators": dict(operators.most_common()),
            }
            return result

        program.step(*program.begin(images, ids, latents), 0)  # moves constants to the device and runs one-time checks
        with torch.enable_grad(), engine.context():
            state, batch = counted("start", lambda: program.begin(images, ids, latents))
            counted("step", lambda: program.step(state, batch, 0), STEPS)
            answers = counted("finish", lambda: program.finish(state, batch))
            losses = counted("guard", lambda: program.losses(state, batch, answers, [[True], [True], [False]]))
            counted("decide", lambda: program.decide(batch, answers, losses))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = counts()
    total = sum(part["launches"] * part["times"] for part in found.values())
    for name, part in found.items():
        print(f"{name}: {part['launches']} x {part['times']}, {part['phases']}")
        print("   ", ", ".join(f"{operator} {count}" for operator, count in list(part["operators"].items())[:24]))
    more = sum(
        part["times"] * part["operators"].get(operator, 0) * count for part in found.values() for operator, count in MORE_KERNELS.items()
    )
    print(f"total: {total}, plus {more} second kernels of the project's own operators")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"total": total, "second_kernels": more, "parts": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
