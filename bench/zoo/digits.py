"""Trains the digits zoo, a timm ConvNeXt and a pixel DiT, on the train split only.

    python bench/zoo/digits.py [--only classifier|denoiser] [--out FOLDER]

Training uses a fixed seed and takes about 25 minutes on 2 cores. The accuracy on the validation split is printed, but nothing is chosen by
it. Weights are stored in float16, to keep the package small, and load as float32.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from timm.models import save_for_hf
from torch import Tensor, nn

from dtta_fast.core.calibrate import calibrate
from dtta_fast.data.digits import load_digits
from dtta_fast.denoisers.dit import DiT
from dtta_fast.denoisers.dit_network import DiTNetwork
from dtta_fast.denoisers.noise_process import NOISE, SIGNAL, TARGET_NOISE, TARGET_SIGNAL, NoiseProcess

CLASSIFIER = {
    "depths": (1, 1, 2, 1),
    "dims": (32, 64, 128, 256),
    "patch_size": 2,
    "ls_init_value": 1.0,
    "conv_mlp": False,
    "num_classes": 10,
}
PREPROCESSING = {
    "input_size": (3, 32, 32),
    "test_input_size": None,
    "mean": (0.5,) * 3,
    "std": (0.5,) * 3,
    "crop_pct": 1.0,
    "interpolation": "bicubic",
    "tag": "digits",
}
DENOISER = {
    "input_size": 32,
    "patch_size": 8,
    "in_channels": 3,
    "hidden_size": 192,
    "depth": 4,
    "num_heads": 6,
    "num_classes": 10,
    "learn_sigma": False,
}


def augment(images: Tensor) -> Tensor:
    """Rotates (10 degrees), scales (10 %), shifts (2 pixels) and lowers the contrast (30 %) of images [N, 3, 32, 32] in [0, 1] at random.

    There are only about a thousand digits to train on. Both models see the same augmentation.
    """
    n = len(images)
    angle = (torch.rand(n) * 2 - 1) * math.radians(10)
    scale = 1 + (torch.rand(n) * 2 - 1) * 0.1
    shift = (torch.rand(n, 2) * 2 - 1) * (2 / 16)
    rows = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(n, 2, 2) * scale[:, None, None]
    grid = F.affine_grid(torch.cat([rows, shift[:, :, None]], dim=2), list(images.shape), align_corners=False)
    contrast = 1 - 0.3 * torch.rand(n, 1, 1, 1)
    brightness = (1 - contrast) * torch.rand(n, 1, 1, 1)
    return F.grid_sample(images, grid, align_corners=False) * contrast + brightness


def train_classifier(images: Tensor, labels: Tensor, iterations: int = 1200) -> nn.Module:
    """Trains the ConvNeXt on `images` in [0, 1]."""
    model = timm.create_model("convnext_atto", pretrained=False, pretrained_cfg_overlay=PREPROCESSING, **CLASSIFIER)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, iterations)
    for _ in range(iterations):
        rows = torch.randint(len(images), (64,))
        loss = F.cross_entropy(model(augment(images[rows]) * 2 - 1), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def classes_or_null(labels: Tensor) -> Tensor:
    """Replaces one label in ten by the DiT's null class."""
    return torch.where(torch.rand(len(labels)) < 0.1, DENOISER["num_classes"], labels)


def dit_batches(network: DiTNetwork, images: Tensor, labels: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """Returns a function that draws 128 images in [-1, 1] and their conditions from `images` in [0, 1]."""

    def draw() -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(images), (128,))
        return augment(images[rows]) * 2 - 1, network.y_embedder.embedding_table(classes_or_null(labels[rows]))

    return draw


def train_denoiser(
    network: nn.Module, draw: Callable[[], tuple[Tensor, Tensor]], process: NoiseProcess, minutes: float, iterations: int
) -> nn.Module:
    """Trains network(x_t, time, condition) on x0 and conditions from `draw`, and returns the moving average of its weights.

    Raises:
        TimeoutError: the iterations take longer than `minutes`.
    """
    average = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, iterations, pct_start=0.05)
    compiled = torch.compile(network)
    start, running = time.monotonic(), 0.0
    for iteration in range(iterations):
        x0, condition = draw()
        t = torch.randint(len(process), (len(x0),))
        coefficients = process.table[t][:, :, None, None, None]
        noise = torch.randn_like(x0)
        x_t = coefficients[:, SIGNAL] * x0 + coefficients[:, NOISE] * noise
        target = coefficients[:, TARGET_SIGNAL] * x0 + coefficients[:, TARGET_NOISE] * noise
        loss = F.mse_loss(compiled(x_t, process.model_time[t], condition), target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(0.999, (iteration + 1) / (iteration + 10))
        torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)
        running += loss.item()
        if (iteration + 1) % 250 == 0:
            print(f"{iteration + 1} loss {running / 250:.4f} {time.monotonic() - start:.0f} s", flush=True)
            running = 0.0
        if time.monotonic() - start > minutes * 60:
            raise TimeoutError(f"{iteration + 1} of {iterations} iterations took {minutes} minutes")
    return average.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["classifier", "denoiser"])
    parser.add_argument("--iterations", type=int, default=8000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "dtta_fast" / "zoo" / "digits")
    args = parser.parse_args()
    images, labels = load_digits("train")
    if args.only != "denoiser":
        torch.manual_seed(0)
        model = train_classifier(images, labels)
        held_out, truth = load_digits("validation")
        print(f"classifier, validation: {(model(held_out * 2 - 1).argmax(1) == truth).float().mean():.3f}")
        save_for_hf(model.half(), args.out / "classifier", model_args=CLASSIFIER, safe_serialization=True)
    if args.only != "classifier":
        torch.manual_seed(0)
        scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", prediction_type="sample")
        network = DiTNetwork(**DENOISER)
        draw = dit_batches(network, images, labels)
        network = train_denoiser(network, draw, NoiseProcess.from_scheduler(scheduler), 29, args.iterations)
        denoiser = DiT(network.half(), NoiseProcess.from_scheduler(scheduler))
        denoiser.calibration = calibrate(denoiser.float(), images, labels)
        denoiser.half().save_pretrained(args.out / "denoiser", scheduler)


if __name__ == "__main__":
    main()
