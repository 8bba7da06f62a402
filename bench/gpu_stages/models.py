"""Makes DiT-XL/2 at 256 pixels and a timm ConvNeXt-T with random weights, and images for which FAST has to compare answers."""

from __future__ import annotations

import math
from typing import Any

import timm
import torch
from torch import Tensor, nn

from bench.gpu_stages.recording import Setting
from dtta_fast import Calibration
from dtta_fast.denoisers.dit import DiT
from dtta_fast.denoisers.dit_network import DiTNetwork
from dtta_fast.denoisers.noise_process import NoiseProcess
from dtta_fast.measure.counting import Counter
from dtta_fast.tasks import Classification

CLASSES = 1000
DIT_XL: dict[str, int] = {"input_size": 32, "patch_size": 2, "in_channels": 4, "hidden_size": 1152, "depth": 28, "num_heads": 16}
DIT_TINY: dict[str, int] = {**DIT_XL, "input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2}
POOL, AT_ONCE = 512, 16  # images to search for ones that get another answer when matched, and how many to try at once


def process(device: torch.device) -> NoiseProcess:
    """Returns DDPM's linear schedule with noise prediction, as in the original DiT."""
    alphas_cumprod = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    a, s = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    return NoiseProcess(torch.stack([a, s, torch.zeros_like(a), torch.ones_like(a), torch.ones_like(a)], dim=1)).to(device)


def dit(setting: Setting) -> DiT:
    """Makes a DiT in float32, with a deviation of 0.02 for every parameter.

    This includes adaLN's parameters: with their usual initialisation, no gradient would reach the condition.
    """
    torch.manual_seed(0)
    with torch.device(setting.device):
        network = DiTNetwork(**(DIT_TINY if setting.tiny else DIT_XL), num_classes=CLASSES)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.02)
    denoiser = DiT(network, process(setting.device)).eval()
    denoiser.calibration = calibration()
    return denoiser


def calibration() -> Calibration:
    """Returns rough statistics of photographs: power falls with the square of the frequency. All timesteps are rated the same."""
    power = [math.log(0.05 / cycles**2) for cycles in range(1, 113)]
    scatter = (0.15, 0.4, *(0.6,) * len(power))
    return Calibration("random weights", (0.45, math.log(0.25), *power), scatter, limit=2.0, signal=(1.0,) * 10, spread=(1.0,) * 10)


def classifier(setting: Setting) -> nn.Module:
    """Makes a ConvNeXt in float32, with layer scales of 1.

    At their usual initial value of 1e-6, a block does nothing, and half of the gradients would be denormal.
    """
    torch.manual_seed(1)
    name = "test_convnext" if setting.tiny else "convnext_tiny"
    with torch.device(setting.device):
        model: Any = timm.create_model(name, num_classes=CLASSES, ls_init_value=1.0)
    nn.init.normal_(model.get_classifier().weight, std=0.1)
    found: nn.Module = model.eval()
    return found


@torch.no_grad()
def images(model: nn.Module, count: int, setting: Setting) -> tuple[Tensor, int]:
    """Returns images [count, 3, H, W] of random shapes under noise, and how many of them get another answer when matched.

    Those images pass FAST's pre-check and make its guard run. If there are too few of them, other images fill up the batch.
    """
    task, known = Classification(), calibration()
    side = model.pretrained_cfg["input_size"][-1]  # type: ignore[union-attr, index]
    generator = torch.Generator(setting.device).manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=setting.device)

    asked: list[Tensor] = []
    others: list[Tensor] = []
    for _ in range(POOL // AT_ONCE):
        shapes = torch.nn.functional.interpolate(normal(AT_ONCE, 3, 7, 7), (side, side), mode="bicubic")
        strength = normal(AT_ONCE, 1, 1, 1).exp()
        drawn = (shapes + 0.3 * strength * normal(AT_ONCE, 3, side, side)).sigmoid()
        answers = [task.predict(model(task.normalise(model, seen)), (0, 0)) for seen in (drawn, known.match(drawn))]
        differ = answers[0] != answers[1]
        asked.append(drawn[differ])
        others.append(drawn[~differ])
        if sum(map(len, asked)) >= count:
            break
    found = min(count, sum(map(len, asked)))
    return torch.cat([*asked, *others])[:count].contiguous(), found


def latents(count: int, denoiser: Any, setting: Setting) -> Tensor:
    """Draws latents [count, C, h, w] with a deviation of 1, as an autoencoder would give them."""
    generator = torch.Generator(setting.device).manual_seed(3)
    return torch.randn(count, *denoiser.latent_shape, generator=generator, device=setting.device)


def flops_a_row(denoiser: DiT, setting: Setting) -> dict[str, int]:
    """Counts the denoiser's FLOPs for one row: forward only, with the backward to the condition, and with that to the weights too."""
    x_t, time = latents(1, denoiser, setting), torch.full((1,), 500, device=setting.device)
    condition = denoiser.class_embeddings({})[:1].clone()
    found = {}
    for name, to_condition, to_weights in (("forward", False, False), ("to the condition", True, False), ("to the weights", True, True)):
        denoiser.requires_grad_(to_weights)
        with torch.set_grad_enabled(to_condition), Counter() as counter:
            prediction = denoiser(x_t, time, condition.detach().requires_grad_(to_condition))
            if to_condition:
                prediction.sum().backward()
        found[name] = sum(count.flops for count in counter.counts.values())
        denoiser.zero_grad(set_to_none=True)
    denoiser.requires_grad_(True)
    return found
