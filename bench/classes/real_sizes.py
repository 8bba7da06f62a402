"""ConvNeXt-T with DiT-XL/2 at 256 pixels, random weights: FAST and one step of PAPER on the CPU, and what fits on a card by count.

    python bench/classes/real_sizes.py [--dtype float32]

Runs one adaptation step of one image with 4 pairs, as in FAST, and a forward like the guard's. What FAST and a step of PAPER take follows
from these times. A processor without bfloat16 instructions computes in float32: its times say little about a GPU. Bytes a pair are the
engine's own accounting. Writes bench/results/real_sizes_classes.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
from diffusers import AutoencoderKL, DDPMScheduler
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import source_tree

source_tree.use()

from dtta_fast import AdaptConfig, Adapter, presets  # noqa: E402
from dtta_fast.denoisers import DiT  # noqa: E402
from dtta_fast.denoisers.dit_network import DiTNetwork  # noqa: E402
from dtta_fast.denoisers.noise_process import NoiseProcess  # noqa: E402
from dtta_fast.measure.counting import Counter  # noqa: E402
from dtta_fast.runtime import environment  # noqa: E402
from dtta_fast.session import memory  # noqa: E402

RESULTS = Path(__file__).parents[1] / "results" / "real_sizes_classes.json"
CARDS = (24, 40, 80)  # GB of memory, of which four fifths are used
XL_2: dict[str, Any] = {
    "input_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 1152,
    "depth": 28,
    "num_heads": 16,
    "num_classes": 1000,
}
VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 256,
}
PAPER_PAIRS, FAST_STEPS, FAST_GUARD = presets.PAPER.pairs, presets.FAST.steps, 2 * presets.FAST.guard


def noise(module: nn.Module) -> nn.Module:
    """Fills a module with small random weights, adaLN's zeros too: with those, every class has the same loss."""
    for name, p in module.named_parameters():
        p.data.fill_(1.0) if "norm" in name and name.endswith("weight") else p.data.normal_(std=0.02)
    return module.eval()


def models(dtype: torch.dtype) -> tuple[nn.Module, DiT]:
    torch.manual_seed(0)
    process = NoiseProcess.from_scheduler(DDPMScheduler(1000, beta_schedule="linear"))
    denoiser = DiT(noise(DiTNetwork(**XL_2)), process, vae=noise(AutoencoderKL(**VAE)))
    return noise(timm.create_model("convnext_tiny")), denoiser.to(dtype)


def timed(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(dtype: torch.dtype) -> dict[str, Any]:
    model, denoiser = models(dtype)
    images = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    config = AdaptConfig(steps=1, pairs=presets.FAST.pairs, optimizer="adam", lr=5e-4)
    adapter = Adapter(model, denoiser, config)
    phases = adapter.adapt(images).seconds
    step, encode = phases["adapt"], phases["encode"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # before the counts, which keep a row's activations whole
    x0, condition = torch.randn(1, *denoiser.latent_shape), denoiser.class_embeddings({})[:1]
    denoiser.requires_grad_(False)
    rows = presets.FAST.pairs
    with torch.no_grad():
        forward = timed(
            lambda: denoiser(x0.to(dtype).expand(rows, -1, -1, -1), torch.zeros(rows, dtype=torch.int64), condition.expand(rows, -1))
        )
    leaf = condition.clone().requires_grad_()
    with Counter() as counted:
        denoiser(x0.to(dtype), torch.zeros(1, dtype=torch.int64), leaf).float().square().mean().backward()
    flops = sum(count.flops for count in counted.counts.values())
    in_bf16 = {str(c): memory.row_bytes(denoiser, x0, condition, [], c) * 2 // dtype.itemsize for c in (False, True)}
    weights = {
        "DiT-XL/2": 2 * sum(p.numel() for p in denoiser.network.parameters()),
        "VAE": 2 * sum(p.numel() for p in denoiser.vae.parameters()),
        "ConvNeXt-T": 4 * sum(p.numel() for p in model.parameters()),
    }
    held = sum(weights.values())
    return {
        "dtype": str(dtype),
        "pairs": rows,
        "encode": encode,
        "step": step,
        "forward": forward,
        "FAST": encode + FAST_STEPS * step + FAST_GUARD / rows * forward,
        "step of PAPER": PAPER_PAIRS / rows * step,
        "peak bytes of the process": peak,
        "parameters": sum(p.numel() for p in denoiser.network.parameters()),
        "flops a pair": flops,
        "weights in bf16": weights,
        "bytes a pair in bf16": in_bf16,
        "pairs at once": {
            str(card): {way: max(0, (card * 10**9 * 4 // 5 - held) // one) for way, one in in_bf16.items()} for card in CARDS
        },
        "environment": environment.describe(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    found = measure(getattr(torch, parser.parse_args().dtype))
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print({key: value for key, value in found.items() if key != "environment"})


if __name__ == "__main__":
    main()
