"""The adaptation step against the naive engine, on the same models and draws; ratios hold within one run.

pytest bench/step --benchmark-json=bench/results/step_cpu.json --benchmark-save-data --benchmark-disable-gc

One image, one step of 30 pairs in chunks of 15: a 30th of the recipe's 5 steps of 180 pairs, whose cost is in proportion. A call is
whole: weights restored, classifier forward and backward, the pairs, the update, the prediction. Weights are random: speed does not
depend on them. extra_info has the evaluations, the floating-point operations of the denoiser (torch's FlopCounter) and what the
machine's matrix products reach in the same run; bench/readme.py divides.
"""

from __future__ import annotations

import time

import pytest
import timm
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch.utils.flop_counter import FlopCounterMode

from bench.naive import Naive
from dtta_fast import AdaptConfig, Adapter
from dtta_fast.denoisers.dit import DiT
from dtta_fast.denoisers.dit_network import DiTNetwork
from dtta_fast.denoisers.noise_process import NoiseProcess
from dtta_fast.runtime.environment import describe

PAIRS, CHUNK = 30, 15
SIZES = {"DiT-S/2": (384, 12, 6), "DiT-B/2": (768, 12, 12)}
CLASSIFIERS = {"ResNet-18": "resnet18", "ViT-S": "vit_small_patch16_224", "ConvNeXt-T": "convnext_tiny"}
FORMS = {
    "naive": None,
    "engine": {},
    "compiled": {"compile": "regional"},
    "bf16": {"precision": "bf16"},
    "bf16, compiled": {"precision": "bf16", "compile": "regional"},
}
CASES = [("DiT-S/2", "ResNet-18", adapting, form) for adapting in ("frozen", "all") for form in FORMS] + [
    ("DiT-S/2", "ViT-S", "frozen", "naive"),
    ("DiT-S/2", "ViT-S", "frozen", "bf16, compiled"),
    ("DiT-S/2", "ConvNeXt-T", "frozen", "naive"),
    ("DiT-S/2", "ConvNeXt-T", "frozen", "bf16, compiled"),
    ("DiT-B/2", "ResNet-18", "frozen", "naive"),
    ("DiT-B/2", "ResNet-18", "frozen", "bf16, compiled"),
]


def models(size: str, classifier: str):
    torch.manual_seed(0)
    hidden, depth, heads = SIZES[size]
    network = DiTNetwork(32, 2, 4, hidden, depth, heads)
    for p in network.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.02)  # adaLN-Zero would have nothing to do
    process = NoiseProcess.from_scheduler(DDPMScheduler(1000, beta_schedule="linear"))
    return timm.create_model(CLASSIFIERS[classifier], num_classes=1000), DiT(network, process)


def peak(dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of some matrix products, the DiT's own shapes among them: the best of 10 rounds."""
    best = 0.0
    for m, k, n in ((2048, 2048, 2048), (3840, 384, 1536), (3840, 1536, 384), (3840, 384, 1152), (3840, 768, 3072)):
        x, weight = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
        for _ in range(10):
            start = time.perf_counter()
            F.linear(x, weight)
            best = max(best, 2 * m * k * n / (time.perf_counter() - start))
    return best


@pytest.mark.parametrize(("size", "classifier", "adapting", "form"), CASES, ids=lambda value: value)
def test_step(benchmark, size, classifier, adapting, form):
    model, denoiser = models(size, classifier)
    config = AdaptConfig(
        steps=1, pairs=PAIRS, chunk=CHUNK, denoiser_parameters=adapting, optimizer="sgd", lr=5e-3, denoiser_lr=5e-3, **(FORMS[form] or {})
    )
    images, latents = torch.rand(1, 3, 224, 224), torch.randn(1, 4, 32, 32)
    timesteps, noise = torch.randint(0, 1000, (1, 1, PAIRS)), torch.randn(1, 1, PAIRS, 4, 32, 32)
    if form == "naive":
        engine = Naive(model, denoiser, config)
        run = lambda: engine.adapt(images, latents, timesteps[0], noise[0])  # noqa: E731
    else:
        adapter = Adapter(model, denoiser, config)
        benchmark.extra_info["warmup"] = adapter.warmup(images, latents=latents, timesteps=timesteps, noise=noise)
        run = lambda: adapter.adapt(images, latents=latents, timesteps=timesteps, noise=noise)  # noqa: E731
    with FlopCounterMode(display=False) as counter:
        condition = torch.randn(1, denoiser.network.y_embedder.embedding_table.weight.shape[1], requires_grad=True)
        denoiser.requires_grad_(adapting == "all")
        prediction = denoiser(latents.expand(CHUNK, -1, -1, -1), timesteps[0, 0, :CHUNK], condition.expand(CHUNK, -1))
        prediction.sum().backward()
    dtype = torch.bfloat16 if "bf16" in form else torch.float32
    benchmark.extra_info.update(
        evaluations=PAIRS,
        flops=counter.get_total_flops() * PAIRS // CHUNK,
        peak=peak(dtype),
        dtype=str(dtype),
        case=[size, classifier, adapting, form],
        environment=describe(),
    )
    benchmark.pedantic(run, rounds=4, iterations=1, warmup_rounds=1)
