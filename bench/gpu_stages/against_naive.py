"""Stage 4: compares the naive engine with ours on the same work, models and draws, by precision."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from bench.gpu_stages import models
from bench.gpu_stages.calls import forget
from bench.gpu_stages.recording import Record, Setting
from bench.gpu_stages.timing import summary, whole_calls
from bench.naive import MICRO_BATCH, Naive
from dtta_fast import AdaptConfig, Adapter, presets
from dtta_fast.config import Precision
from dtta_fast.session.precision import products
from dtta_fast.tasks import Classification

CALLS = 5  # timed calls, at most
RECIPE = AdaptConfig(
    steps=1,
    pairs=presets.PAPER.pairs,
    denoiser_parameters="all",
    optimizer="sgd",
    lr=presets.PAPER.lr,
    denoiser_lr=presets.PAPER.denoiser_lr,
    momentum=presets.PAPER.momentum,
)
STEPS = AdaptConfig(steps=presets.FAST.steps, pairs=presets.FAST.pairs, optimizer="adam", lr=presets.FAST.lr)
# work, engine, precision, images, seconds to measure for; the most informative come first
FORMS: tuple[tuple[str, str, Precision, int, float], ...] = (
    ("recipe", "naive", "fp32", 1, 4.0),
    ("recipe", "engine", "bf16", 1, 2.0),
    ("steps", "naive", "fp32", 1, 2.0),
    ("steps", "engine", "bf16", 1, 2.0),
    ("recipe", "naive", "bf16", 1, 2.0),
    ("recipe", "naive", "tf32", 1, 2.0),
    ("steps", "naive", "bf16", 1, 1.0),
    ("steps", "naive", "tf32", 1, 1.0),
    ("steps", "engine", "bf16", 16, 2.0),
    ("recipe", "engine", "fp32", 1, 4.0),
    ("recipe", "engine", "tf32", 1, 2.0),
    ("steps", "engine", "fp32", 1, 2.0),
    ("steps", "engine", "tf32", 1, 1.0),
)
WHAT = {
    "recipe": f"one of PAPER's {presets.PAPER.steps} steps: {RECIPE.pairs} pairs, SGD, the DiT adapting",
    "steps": f"FAST's {STEPS.steps} steps of {STEPS.pairs} pairs, Adam, the DiT frozen, without guard and matching",
}


def under_autocast(module: nn.Module, device: torch.device) -> None:
    """Makes a module run its forwards under bfloat16 autocast, as a user of the recipe would, and return float32."""
    forward = module.forward

    def cast(*inputs: Any) -> Any:
        with torch.autocast(device.type, torch.bfloat16):
            return forward(*inputs).float()

    module.forward = cast  # type: ignore[method-assign]


class Turns:
    """Runs both engines on the same models, images and draws."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._model, self._denoiser = models.classifier(setting), models.dit(setting)
        self._images = models.images(self._model, max(images for _, _, _, images, _ in FORMS), setting)[0]
        self._config = {"recipe": RECIPE.replace(pairs=2 * MICRO_BATCH) if setting.tiny else RECIPE, "steps": STEPS}

    def measure(self, work: str, engine: str, precision: Precision, images: int, seconds: float) -> dict[str, Any]:
        """Times calls after one warm-up call."""
        setting, config = self._setting, self._config[work]
        model, denoiser = copy.deepcopy(self._model), copy.deepcopy(self._denoiser)  # the naive engine changes them
        generator = torch.Generator(setting.device).manual_seed(4)
        shape = (images, config.steps, config.pairs)
        timesteps = torch.randint(0, len(denoiser.process), shape, generator=generator, device=setting.device)
        noise = torch.randn(*shape, *denoiser.latent_shape, generator=generator, device=setting.device)
        pixels, x0 = self._images[:images], models.latents(images, denoiser, setting)
        if engine == "naive":
            inputs = Classification().normalise(model, pixels)
            if precision == "bf16":
                under_autocast(model, setting.device)
                under_autocast(denoiser, setting.device)
            naive = Naive(model, denoiser, config)

            def call() -> list[float]:
                with products(precision, setting.device):
                    return naive.adapt(inputs, x0, timesteps[0], noise[0])[1]
        else:
            adapter = Adapter(model, denoiser, config.replace(precision=precision))

            def call() -> list[float]:
                found: list[float] = adapter.adapt(pixels, latents=x0, timesteps=timesteps, noise=noise).loss.mean(0).tolist()
                return found

        loss = call()
        samples = whole_calls(call, setting.device, 1 if setting.tiny else CALLS, seconds)
        named = {"work": work, "engine": engine, "precision": precision, "images": images, "evaluations": config.steps * config.pairs}
        return {**named, "seconds": summary(samples), "loss": loss}


def run(setting: Setting, record: Record) -> None:
    """Measures in the order of FORMS. The naive engine takes one image at a time."""
    record.put("models", "work", WHAT)
    record.put(
        "models", "precision", "naive in bf16 is autocast around each forward of the model and the DiT; in tf32 torch's own switches"
    )
    turns = Turns(setting)
    for work, engine, precision, wanted, seconds in FORMS:
        images = min(wanted, 2) if setting.tiny else wanted
        label = f"{work}, {engine}, {precision}, {images} images"
        record.measure("turns", label, lambda given=(work, engine, precision, images, seconds): turns.measure(*given), takes=seconds)
        forget()
