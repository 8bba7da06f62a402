"""Stage 3, the engine: measures FAST and PAPER with DiT-XL/2 and ConvNeXt-T, by precision and number of images."""

from __future__ import annotations

from typing import Any

import torch

from bench.gpu_stages import models
from bench.gpu_stages.calls import forget, measured
from bench.gpu_stages.recording import Record, Setting
from dtta_fast import AdaptConfig, Adapter, presets
from dtta_fast.config import Precision
from dtta_fast.measure.roofline import measured_peak
from dtta_fast.session.precision import products

LATENCY = 100  # timed calls, at most; enough for a p99
# precision, images, seconds to measure for; the most informative come first
FORMS: tuple[tuple[Precision, int, float], ...] = (
    ("bf16", 1, 12.0),
    ("bf16", 16, 5.0),
    ("tf32", 1, 5.0),
    ("fp32", 1, 6.0),
    ("bf16", 64, 5.0),
    ("tf32", 16, 4.0),
    ("tf32", 64, 5.0),
    ("fp32", 16, 6.0),
    ("fp32", 64, 10.0),
)
DTYPES = {"bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}


def fast(precision: Precision, compile: Any = "off") -> AdaptConfig:
    """Returns FAST without its pre-check, so that it adapts every image."""
    return presets.FAST.replace(precision=precision, compile=compile, precheck="off")


class Calls:
    """Measures calls on the same models and images, with a new session for each measurement."""

    def __init__(self, setting: Setting, record: Record, most: int) -> None:
        self._setting, self._record = setting, record
        self._model, self.denoiser = models.classifier(setting), models.dit(setting)
        self._images, differing = models.images(self._model, most, setting)
        self._latents = models.latents(most, self.denoiser, setting)
        record.put("models", "denoiser", self.denoiser.network.sizes)
        self.flops = record.measure("models", "flops a row", lambda: models.flops_a_row(self.denoiser, setting)) or {}
        record.put("models", "classifier", type(self._model).__name__)
        record.put("models", "images", {"images": most, "answered otherwise when matched": differing})

    def measure(self, preset: str, config: AdaptConfig, images: int, most: int, seconds: float, takes: float = 0.0) -> float:
        """Records calls under a label for their form; returns the median seconds per image, or 0 if there are none."""

        def work() -> dict[str, Any]:
            adapter = Adapter(self._model, self.denoiser, config)
            found = measured(adapter, self._images[:images], self._latents[:images], self._setting, most, seconds)
            return {"preset": preset, **found, "flops": self._flops(config, images * found["of steps"], sum(found["evaluations"]))}

        compiled = "" if config.compile == "off" else f", compile {config.compile}"
        found = self._record.measure("calls", f"{preset}, {images} images, {config.precision}{compiled}", work, takes)
        forget()
        return found["seconds"]["median"] / images if found else 0.0

    def _flops(self, config: AdaptConfig, of_steps: int, evaluations: int) -> int | None:
        """Returns the denoiser's FLOPs in a call. Steps run forward and backward, and the guard's evaluations only forward."""
        if not self.flops:
            return None
        a_step = self.flops["to the weights" if config.denoiser_parameters == "all" else "to the condition"]
        return of_steps * a_step + (evaluations - of_steps) * self.flops["forward"]

    def peak(self, precision: Precision) -> None:
        """Records the peak rates of matrix products in that precision and of a copy."""
        device = self._setting.device

        def work() -> dict[str, Any]:
            with products(precision, device):
                found = measured_peak(device, DTYPES[precision], seconds=0.1 if self._setting.tiny else 0.5)
            return {"flops": found.flops, "bytes": found.bytes}

        self._record.measure("peak", precision, work)


def run(setting: Setting, record: Record) -> None:
    """Measures in the order of FORMS, with PAPER after the first two, and the peak before the first form of each precision."""
    forms = [(precision, min(images, 2), 0.1) for precision, images, _ in FORMS[:4]] if setting.tiny else FORMS
    calls = Calls(setting, record, max(images for _, images, _ in forms))
    per_image: dict[Precision, float] = {}
    for i, (precision, images, seconds) in enumerate(forms):
        if precision not in per_image:
            calls.peak(precision)
        takes = 4.5 * images * per_image.get(precision, 0.0)  # two warm-up calls, a timed one, steps, a profiled call
        found = calls.measure("FAST", fast(precision), images, LATENCY, seconds, takes)
        per_image[precision] = found or per_image.get(precision, 0.0)
        if i == 1:
            config = presets.PAPER.replace(precision=precision)
            if setting.tiny:
                config = config.replace(steps=1, pairs=8)
            calls.measure("PAPER", config, 1, 5, 6.0, takes=0.0 if setting.tiny else 8.0)
