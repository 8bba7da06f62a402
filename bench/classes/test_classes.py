"""Cost against the number of classes: adaptation beside the diffusion classifier.

pytest bench/classes --benchmark-json=bench/results/classes_cpu.json --benchmark-save-data --benchmark-disable-gc

Models of the digits zoo's shapes with random weights: labels do not change the cost, but pruning would depend on them, so all classes
are kept. FAST adapts on its own settings; the diffusion classifier looks at every class on 2 pairs, as few as it can do with.
"""

from __future__ import annotations

import dataclasses

import pytest
import timm
import torch
from diffusers import DDPMScheduler

from dtta_fast import Adapter, Calibration, presets
from dtta_fast.denoisers.dit import DiT
from dtta_fast.denoisers.dit_network import DiTNetwork
from dtta_fast.environment import describe
from dtta_fast.process import NoiseProcess

FORMS = {
    "FAST, of an image that is adapted": presets.FAST.replace(precheck="off"),
    "diffusion classifier": presets.FAST.replace(
        method="diffusion_classifier", steps=1, pairs=2, precheck="off", guard=0, guard_threshold=0.0
    ),
}
SIZES = {"depths": (1, 1, 2, 1), "dims": (32, 64, 128, 256), "patch_size": 2, "ls_init_value": 1.0, "conv_mlp": False}
PREPROCESSING = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}


@pytest.mark.parametrize("classes", [10, 30, 100, 300, 1000])
@pytest.mark.parametrize("form", FORMS)
def test_classes(benchmark, form, classes):
    torch.manual_seed(0)
    model = timm.create_model("convnext_atto", num_classes=classes, pretrained_cfg_overlay=PREPROCESSING, **SIZES)
    process = NoiseProcess.from_scheduler(DDPMScheduler(1000, beta_schedule="linear", prediction_type="sample"))
    denoiser = DiT(DiTNetwork(32, 8, 3, 192, 4, 6, num_classes=classes), process)
    images = torch.rand(8, 3, 32, 32)
    flat = {"signal": (1.0,), "spread": (1.0,)}  # of random weights there is nothing to measure
    denoiser.calibration = dataclasses.replace(Calibration.measure(denoiser, images), **flat)
    adapter = Adapter(model, denoiser, FORMS[form])
    adapter.warmup(images[:1])
    evaluations = int(adapter.adapt(images[:1]).evaluations)
    benchmark.extra_info.update(form=form, classes=classes, evaluations=evaluations, environment=describe())
    benchmark.pedantic(lambda: adapter.adapt(images[:1]), rounds=10, iterations=1, warmup_rounds=1)
