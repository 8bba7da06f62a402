"""Cost against the number of classes: adaptation beside the diffusion classifier.

pytest bench/classes --benchmark-json=bench/results/classes_cpu.json --benchmark-save-data --benchmark-disable-gc

Models of the digits zoo's shapes with random weights: labels do not change the cost, but pruning would depend on them, so all classes
are kept. The diffusion classifier looks at every class on 2 pairs, as few as it can do with.

FAST's image is the first of eight that is adapted and whose answer changes, so that the guard runs too: 12 evaluations, and 24 for each of
the answers that are compared, 2 here (3 at most); there is no pre-check to leave it alone. A DiT as it is made answers zeros, whatever the
class, from which no gradient comes and no answer changes: all of its weights are drawn. Most images cost less: those that the pre-check
leaves alone, nothing, and those whose answer stays, 12 evaluations.
"""

from __future__ import annotations

import dataclasses

import pytest
import timm
import torch
from diffusers import DDPMScheduler
from torch import nn

from dtta_fast import Adapter, Calibration, presets
from dtta_fast.denoisers.dit import DiT
from dtta_fast.denoisers.dit_network import DiTNetwork
from dtta_fast.denoisers.noise_process import NoiseProcess
from dtta_fast.runtime.environment import describe

FORMS = {
    "FAST, of an image whose answer changes": presets.FAST.replace(precheck="off"),
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
    for parameter in denoiser.parameters():
        nn.init.normal_(parameter, std=0.05)
    images = torch.rand(8, 3, 32, 32)
    flat = {"signal": (1.0,), "spread": (1.0,)}  # of random weights there is nothing to measure
    denoiser.calibration = dataclasses.replace(Calibration.measure(denoiser, images), **flat)
    adapter = Adapter(model, denoiser, FORMS[form])
    k = 0
    if form != "diffusion classifier":
        found = adapter.adapt(images).evaluations
        wanted = found == presets.FAST.steps * presets.FAST.pairs + 2 * presets.FAST.guard
        assert bool(wanted.any()), f"the guard compares two answers on none of the images: {found.tolist()} evaluations"
        k = int(wanted.int().argmax())
    image, ids = images[k : k + 1], torch.tensor([k])  # an image's result depends on its id, not on those beside it
    adapter.warmup(image, image_ids=ids)
    evaluations = int(adapter.adapt(image, image_ids=ids).evaluations)
    benchmark.extra_info.update(form=form, classes=classes, evaluations=evaluations, environment=describe())
    benchmark.pedantic(lambda: adapter.adapt(image, image_ids=ids), rounds=10, iterations=1, warmup_rounds=1)
