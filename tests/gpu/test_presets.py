"""Every preset gives the same on the device and on the CPU, with every task that it fits: in float64, and in the precision of users."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from dtta_fast import AdaptConfig, Calibration, adapt, calibrate, presets, zoo
from dtta_fast.denoisers.base import Denoiser
from dtta_fast.denoisers.dit import DiT
from dtta_fast.denoisers.noise_process import NoiseProcess
from dtta_fast.tasks import Classification, Segmentation, Task

pytestmark = pytest.mark.gpu
SIZE = 32  # side in pixels of all images but the classifiers'


class Subject(NamedTuple):
    model: nn.Module
    denoiser: Denoiser
    task: Task
    images: Tensor


def concat_unet(process: NoiseProcess, channels: int, classes: int | None) -> Denoiser:
    diffusers = pytest.importorskip("diffusers")
    from dtta_fast.denoisers import ConcatUNet

    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    sizes = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8}
    unet = diffusers.UNet2DModel(sample_size=SIZE // 2, in_channels=3 + channels, out_channels=3, **blocks, **sizes)
    return ConcatUNet(unet, process, classes=classes, depth_range=None if classes else (0.5, 12.0))


def control_net() -> Denoiser:
    diffusers = pytest.importorskip("diffusers")
    from dtta_fast.denoisers import ControlNet, StableDiffusion

    plain = StableDiffusion.from_pretrained(zoo.folder("open_vocabulary") / "diffusion", calibration=False)
    control = diffusers.ControlNetModel.from_unet(plain.unet, conditioning_embedding_out_channels=(8, 16, 32))
    for part in control.modules():  # its zero convolutions would hide it
        if isinstance(part, nn.Conv2d) and not part.weight.any():
            nn.init.normal_(part.weight, std=0.02)
    return ControlNet(plain.unet, plain.process, plain.vae, *plain.text(), control).with_classes(["sky", "road", "tree", "car"])


@functools.cache
def open_vocabulary() -> tuple[tuple[nn.Module, Denoiser], Task]:
    """CLIP and a Stable Diffusion of the digits, with their own calibration."""
    return zoo.load("open_vocabulary"), zoo.task("open_vocabulary")


@pytest.fixture
def subject(request: pytest.FixtureRequest, process: NoiseProcess) -> Subject:
    """Models with up to three images: matching changes the first two a good deal and the third hardly."""
    kind = request.param
    side = 16 if kind in ("model", "vit") else SIZE
    generator = torch.Generator().manual_seed(2)
    contrast, mean = (torch.tensor(values)[:, None, None, None] for values in ([0.2, 0.1, 1.0], [0.15, 0.9, 0.5]))
    images = (torch.rand(3, 3, side, side, generator=generator) - 0.5) * contrast + mean
    torch.manual_seed(3)
    if side == 16:
        model, denoiser, task = request.getfixturevalue(kind), request.getfixturevalue("denoiser").float(), Classification()
    elif kind == "clip":
        pytest.importorskip("diffusers")
        (model, denoiser), task = open_vocabulary()
    elif kind == "segmentation by ControlNet":
        model, _, task = request.getfixturevalue("segmentation")
        denoiser = control_net()
    else:
        model, denoiser, task = request.getfixturevalue(kind.split(" by ")[0])
        if kind.endswith("ConcatUNet"):
            denoiser = concat_unet(process, *((5, 4) if kind.startswith("segmentation") else (1, None)))
    if denoiser.calibration is None:
        measured = Calibration.measure(denoiser, torch.rand(16, 3, side, side, generator=generator))
        if not denoiser.takes_maps:  # calibrate() takes seconds, and has a test of its own
            measured = dataclasses.replace(measured, signal=(0.1, 0.3, 0.4, 0.2), spread=(0.3, 0.3, 0.3, 0.4))
        denoiser.calibration = measured
    few = 3 if side == 16 or kind.endswith("MapNet") else 2 if kind.endswith("ConcatUNet") else 1  # larger networks get fewer images
    return Subject(model.float().eval(), denoiser.eval(), task, images[:few])


CASES = [(kind, preset) for kind in ("model", "clip") for preset in presets.ALL] + [("vit", "DENSE"), ("vit", "DUSA")]
# maps have no calibrated timesteps and no answers to compare
CASES += [
    (f"{where} by {how}", preset)
    for where in ("segmentation", "depth")
    for how in ("MapNet", "ConcatUNet")
    for preset in ("PAPER", "DENSE")
]
CASES += [("segmentation by ControlNet", "DUSA")]
AS_USERS_RUN = {kind: "DUSA" if "ControlNet" in kind else "FAST" if kind in ("model", "clip") else "DENSE" for kind, _ in CASES}


def small(preset: str, task: Task) -> AdaptConfig:
    """The preset with few pairs, steps so long that answers change, and a guard that lets some of them stand."""
    config = presets.get(preset)
    fewer: dict[str, Any] = {"pairs": min(config.pairs, 2), "guard": min(config.guard, 3), "steps": min(config.steps, 2)}
    if isinstance(task, Segmentation):
        fewer["drawn_classes"] = 0  # segmentation draws no classes
    return config.replace(**fewer, guard_threshold=min(config.guard_threshold, 0.2), lr=30 * config.lr)


@pytest.mark.parametrize(("subject", "preset"), CASES, indirect=["subject"])
def test_presets(subject, preset, moved, device):
    config, task, parts = small(preset, subject.task), subject.task, (subject.model, subject.denoiser, subject.images)
    expected = adapt(*moved("cpu", torch.float64, *parts), config=config.replace(chunk=1), task=task)
    assert bool((expected.outputs != expected.outputs_before).any())
    found = adapt(*moved(device, torch.float64, *parts), config=config, task=task)
    for name in ("outputs_before", "outputs", "loss"):
        own, other = getattr(found, name).cpu(), getattr(expected, name)
        # matching works in float32, whatever the images are in
        torch.testing.assert_close(
            own, other, rtol=1e-4, atol=1e-4, equal_nan=name == "loss", msg=lambda text, name=name: f"{name}: {text}"
        )
    for name in ("accepted", "evaluations"):
        assert torch.equal(getattr(found, name).cpu(), getattr(expected, name)), name


@pytest.mark.parametrize(
    ("subject", "preset"), [(kind, preset) for kind, preset in CASES if preset == AS_USERS_RUN[kind]], indirect=["subject"]
)
def test_presets_in_their_own_precision(subject, preset, moved, device):
    """Under "auto": bfloat16 and TF32 on a GPU. The outputs before and the first loss are of the same weights, which rounding alone tells
    apart: on a CPU, products cut to TF32 changed the outputs by 0.012 at most, and bfloat16 the loss by 0.005. Later steps start from
    other weights."""
    config, task, parts = small(preset, subject.task), subject.task, (subject.model, subject.denoiser, subject.images)
    expected = adapt(*moved("cpu", torch.float32, *parts), config=config.replace(precision="fp32", steps=1), task=task)
    found = adapt(*moved(device, torch.float32, *parts), config=config, task=task)
    assert bool(found.outputs.isfinite().all())
    scale = float(expected.outputs_before.abs().max())
    torch.testing.assert_close(found.outputs_before.cpu(), expected.outputs_before, rtol=0, atol=0.03 * scale)
    torch.testing.assert_close(found.loss[:, 0].cpu(), expected.loss[:, 0], rtol=0.02, atol=0, equal_nan=True)


def test_calibration_on_the_device(random_network, process, moved, device):
    """Statistics, distances, matching, the timesteps that tell classes apart, and the trust."""
    denoiser = DiT(random_network(depth=1), process)
    clean, images = torch.rand(2, 8, 3, 16, 16, generator=torch.Generator().manual_seed(7))
    outputs = torch.randn(8, len(denoiser.class_embeddings({})), generator=torch.Generator().manual_seed(8))
    expected = calibrate(denoiser, clean, outputs)
    there, own_clean, own_images, own_outputs = moved(device, torch.float32, denoiser, clean, images * 0.3, outputs)
    found = calibrate(there, own_clean, own_outputs)
    assert found.fingerprint == expected.fingerprint
    for name in ("typical", "scatter", "limit", "signal", "spread"):
        values = [torch.tensor(getattr(calibration, name)) for calibration in (found, expected)]
        torch.testing.assert_close(*values, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert found.trust == pytest.approx(expected.trust, abs=0.05)
    for measure in (expected.distance, expected.match):
        torch.testing.assert_close(measure(own_images).cpu(), measure(images * 0.3), rtol=1e-3, atol=1e-4)
