"""Trains the dense zoo on generated scenes: a SegFormer, a GLPN depth network, and for each a UNet that takes its map as input.

    python bench/zoo/dense.py segmenter|depth|segmentation_denoiser|depth_denoiser [--out FOLDER]

Each model trains with a fixed seed on the train split only, in under 30 minutes on 2 cores. Weights are stored in float16.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from digits import train_denoiser
from torch import Tensor, nn
from transformers import (
    GLPNConfig,
    GLPNForDepthEstimation,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
)

from dtta_fast.core.calibrate import calibrate
from dtta_fast.data import scenes as rendering
from dtta_fast.data.scenes import CLASSES, FARTHEST, NEAREST, SIZE, Scenes
from dtta_fast.denoisers.base import at_latent_size
from dtta_fast.denoisers.concat_unet import ConcatUNet
from dtta_fast.denoisers.noise_process import NoiseProcess
from dtta_fast.tasks.dense import resized

OUT = Path(__file__).parents[2] / "dtta_fast" / "zoo"
WIDTHS = {"depths": [1, 1, 2, 1], "hidden_sizes": [24, 48, 96, 128], "num_attention_heads": [1, 2, 4, 4], "sr_ratios": [4, 2, 1, 1]}
# the finest features have half of the image's resolution
FINE = {"patch_sizes": [5, 3, 3, 3], "strides": [2, 2, 2, 2], "mlp_ratios": [2, 2, 2, 2]}
SEGMENTER = SegformerConfig(
    **WIDTHS, **FINE, decoder_hidden_size=64, drop_path_rate=0.0, id2label=dict(enumerate(CLASSES)), semantic_loss_ignore_index=255
)
DEPTH = GLPNConfig(
    **WIDTHS, **(FINE | {"patch_sizes": [7, 3, 3, 3], "strides": [4, 2, 2, 2]}), decoder_hidden_size=48, max_depth=int(FARTHEST)
)
SCENES = 8000
CHANNELS = {"segmentation": 6, "depth": 1}


def training_scenes(count: int) -> Scenes:
    """Renders the scenes, or loads them if an earlier run has: all four models train on the same file."""
    kept = Path(tempfile.gettempdir()) / f"dtta-scenes-{hashlib.sha256(Path(rendering.__file__).read_bytes()).hexdigest()[:8]}-{count}.pt"
    if not kept.is_file():
        with ProcessPoolExecutor() as pool:
            parts = pool.map(rendering.scenes, repeat("train"), repeat(100), range(0, count, 100))
            torch.save([torch.cat(part)[:count] for part in zip(*parts, strict=True)], kept)
    return Scenes(*torch.load(kept))


def unet(channels: int, latent: int = 3, size: int = SIZE // 2) -> UNet2DModel:
    """Builds a UNet of 1.3 million parameters at half the scenes' size, where the corruption of single pixels is no longer visible."""
    return UNet2DModel(
        sample_size=size,
        in_channels=latent + channels,
        out_channels=latent,
        block_out_channels=(32, 48, 80),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        norm_num_groups=8,
    )


def flipped(*maps: Tensor) -> tuple[Tensor, ...]:
    """Mirrors a random half of the images, together with their maps."""
    mirrored = torch.rand(len(maps[0])) < 0.5
    return tuple(torch.where(mirrored.view(-1, *(1,) * (m.ndim - 1)), m.flip(-1), m) for m in maps)


def train_model(model: nn.Module, data: Scenes, loss_of: Callable[[Any, Tensor, Tensor], Tensor], iterations: int) -> nn.Module:
    """Trains a model on normalised images; `loss_of` takes its outputs, labels and depth."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, iterations)
    model.train()
    running = 0.0
    for iteration in range(iterations):
        rows = torch.randint(len(data.images), (32,))
        images, labels, depth = flipped(data.images[rows], data.labels[rows], data.depth[rows])
        loss = loss_of(model(images * 2 - 1), labels, depth)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        running += loss.item()
        if (iteration + 1) % 250 == 0:
            print(f"{iteration + 1} loss {running / 250:.4f}", flush=True)
            running = 0.0
    return model.eval()


def segmentation_loss(outputs: Any, labels: Tensor, depth: Tensor) -> Tensor:
    return F.cross_entropy(resized(outputs.logits, (SIZE, SIZE)), labels)


def depth_loss(outputs: Any, labels: Tensor, depth: Tensor) -> Tensor:
    """Returns the mean absolute difference of the logarithms, which is close to the relative error."""
    return (resized(outputs.predicted_depth[:, None], (SIZE, SIZE))[:, 0].clamp(min=0.1).log() - depth.log()).abs().mean()


class Denoising(nn.Module):
    """A denoiser with the signature that train_denoiser expects."""

    def __init__(self, denoiser: ConcatUNet) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x_t: Tensor, time: Tensor, maps: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):  # 1.3 times as fast
            prediction: Tensor = self.denoiser.unet(torch.cat([x_t, maps], dim=1), time, return_dict=False)[0]
        return prediction.float()


def map_batches(denoiser: ConcatUNet, images: Tensor, maps: Tensor, batch: int = 32) -> Callable[[], tuple[Tensor, Tensor]]:
    """Returns a function that draws x0 and conditions.

    images: in [0, 1]. maps: their labels [N, H, W], int64 (255 means no label), or depth [N, H, W].
    """

    def draw() -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(images), (batch,))
        mine, theirs = flipped(images[rows], maps[rows])
        return denoiser.encode(mine), at_latent_size(ground_truth(denoiser, theirs), denoiser)

    return draw


def ground_truth(denoiser: ConcatUNet, maps: Tensor) -> Tensor:
    """Returns the condition [N, E, H, W] for labels or depth [N, H, W], before resizing."""
    if denoiser.embeddings is None:
        return denoiser.depth_map(maps[:, None])
    known = maps != 255
    return (denoiser.embeddings[maps * known] * known[..., None]).movedim(-1, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["segmenter", "depth", "segmentation_denoiser", "depth_denoiser"])
    parser.add_argument("--iterations", type=int)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    data = training_scenes(SCENES)
    torch.manual_seed(0)
    task = {"segmenter": "segmentation"}.get(args.what, args.what.removesuffix("_denoiser"))
    if args.what == "segmenter":
        model = train_model(SegformerForSemanticSegmentation(SEGMENTER), data, segmentation_loss, args.iterations or 3000)
    elif args.what == "depth":
        model = train_model(GLPNForDepthEstimation(DEPTH), data, depth_loss, args.iterations or 3000)
    else:
        scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", prediction_type="sample")
        process = NoiseProcess.from_scheduler(scheduler)
        own = {"classes": len(CLASSES)} if task == "segmentation" else {"depth_range": (NEAREST, FARTHEST)}
        denoiser = ConcatUNet(unet(CHANNELS[task]), process, **own)
        draw = map_batches(denoiser, data.images, data.labels if task == "segmentation" else data.depth)
        denoiser = train_denoiser(Denoising(denoiser), draw, process, 29, args.iterations or 1800).denoiser
        stored = copy.deepcopy(denoiser.half())
        stored.float().calibration = calibrate(stored, data.images[:1000])
        stored.half().save_pretrained(args.out / task / "denoiser", scheduler)
        return
    model.half().save_pretrained(args.out / task / "model")
    processor = SegformerImageProcessor(size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor.save_pretrained(args.out / task / "model")


if __name__ == "__main__":
    main()
