"""Refines the depth of generated scenes by score distillation on relit renderings of that depth, as Re-Depth Anything does.

    python bench/quality/relight.py [--images 20] [--steps 300] [--split validation]

The method (Bhattarai & Rhodin 2025, arXiv 2512.17908): the depth's normals are lit from a random direction by Blinn and Phong's model,
the shading is multiplied with the image, and a diffusion model that never saw the depth says how the result should change. The encoder's
features move, and with them the depth; the encoder's weights do not. The paper uses Stable Diffusion 1.5 with a prompt, guidance 50 and
1,000 steps, and lets the decoder learn too, at 1/500 of the features' rate; here the decoder stays.

No text-to-image model of these scenes exists, so the zoo's UNet stands in. It was trained with a map of depth for every image. Under a flat
map it comes nearest to a judge that has not seen the depth, but knows no such map; under the map of the network's first depth it favours
that depth. So a failure here says little about the method with its own diffusion model. Writes bench/results/relight_SPLIT.json.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dtta_fast import zoo
from dtta_fast.commands.demo_digits import CLEAN
from dtta_fast.commands.demo_maps import CORRUPTIONS
from dtta_fast.data.corruptions import corrupt
from dtta_fast.data.scenes import FARTHEST, SIZE, scenes
from dtta_fast.denoisers.base import at_latent_size
from dtta_fast.denoisers.noise_process import NOISE, SIGNAL
from dtta_fast.metrics import bootstrap_interval, depth_errors
from dtta_fast.runtime import environment
from dtta_fast.tasks.dense import resized

RESULTS = Path(__file__).parents[1] / "results"
TIMES = (0.02, 0.60)  # the paper's range of timesteps, as shares of the process
HALF_ANGLE = math.radians(29)  # of the camera; the scenes have 24 to 34 degrees
SMOOTHNESS = 1.0
SHININESS = (4, 128)


class Setting(NamedTuple):
    """The rate of the encoder's features, the map under which the UNet predicts (None: no diffusion model), and the smoothness's weight."""

    lr: float
    map: str | None
    smoothness: float = SMOOTHNESS


SETTINGS = {
    "flat map": Setting(1e-3, "flat"),
    "flat map, a tenth of the smoothness": Setting(1e-3, "flat", 0.1 * SMOOTHNESS),
    "map of the first depth, a tenth of the smoothness": Setting(1e-3, "first", 0.1 * SMOOTHNESS),
    "smoothness alone, a tenth": Setting(1e-3, None, 0.1 * SMOOTHNESS),
}


def normals(depth: Tensor) -> Tensor:
    """Returns unit normals [B, 3, H, W] that face the camera, of depth [B, H, W] in metres along the camera's axis."""
    height, width = depth.shape[-2:]
    down, across = (((torch.arange(n, dtype=depth.dtype) + 0.5) / n * 2 - 1) * math.tan(HALF_ANGLE) for n in (height, width))
    rows, columns = -down[:, None], across * width / height  # through the pixels' centres
    points = torch.stack([columns * depth, rows * depth, depth], dim=-1)
    below, right = torch.gradient(points, dim=(1, 2))
    return F.normalize(torch.linalg.cross(right, below, dim=-1), dim=-1).movedim(-1, 1)


def relit(images: Tensor, depth: Tensor, generator: torch.Generator) -> Tensor:
    """Returns images [B, 3, H, W] in [0, 1], lit from a random direction before the surface that the depth [B, H, W] describes."""
    surface, count = normals(depth), len(images)
    across = 2 * torch.rand(count, 2, generator=generator) - 1
    light = F.normalize(torch.cat([across, -torch.ones(count, 1)], dim=1), dim=1)  # the camera looks along +z
    half = F.normalize(light + torch.tensor([0.0, 0.0, -1.0]), dim=1)
    diffuse, specular = ((surface * way[:, :, None, None]).sum(1, keepdim=True).clamp(min=0) for way in (light, half))
    low, high = map(math.log2, SHININESS)
    shininess = 2 ** (low + (high - low) * torch.rand(count, 1, 1, 1, generator=generator))
    share = torch.rand(count, 1, 1, 1, generator=generator)
    return (share * diffuse * images + (1 - share) * specular.clamp(min=1e-6) ** shininess).clamp(1e-3, 1)


def roughness(depth: Tensor, images: Tensor) -> Tensor:
    """Returns the edge-aware smoothness [B] of Godard et al. (2017, arXiv 1609.03677) for disparity of mean 1."""
    disparity = 1 / depth
    disparity = disparity / disparity.mean((1, 2), keepdim=True)
    total = torch.zeros(len(depth))
    for dim in (-1, -2):
        edges = images.diff(dim=dim).abs().mean(1)
        total = total + (disparity.diff(dim=dim).abs() * (-edges).exp()).mean((1, 2))
    return total


def refine(model: Any, denoiser: Any, images: Tensor, setting: Setting, steps: int, seed: int) -> Tensor:
    """Returns the refined depth [B, H, W] of images [B, 3, H, W] in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        first = list(model.glpn(images * 2 - 1, output_hidden_states=True).hidden_states)
        condition = at_latent_size(denoiser.depth_map(model.head(model.decoder(first))[:, None]), denoiser)
        if setting.map == "flat":
            condition = condition.mean((1, 2, 3), keepdim=True).expand_as(condition)
    features = [feature.clone().requires_grad_() for feature in first]
    optimizer = torch.optim.AdamW(features, lr=setting.lr, weight_decay=0.0)

    def depth_of() -> Tensor:
        depth = model.head(model.decoder(features))
        return resized(depth[:, None], (SIZE, SIZE))[:, 0].clamp(0.1, FARTHEST)

    table = denoiser.process.table
    low, high = (int(share * len(table)) for share in TIMES)
    for _ in range(steps):
        depth = depth_of()
        loss = setting.smoothness * roughness(depth, images).sum()
        if setting.map is not None:
            x0 = 2 * F.interpolate(relit(images, depth, generator), denoiser.latent_shape[1:], mode="area") - 1
            t = torch.randint(low, high + 1, (len(images),), generator=generator)
            noise = torch.randn(x0.shape, generator=generator)
            a, s = (table[t, column, None, None, None] for column in (SIGNAL, NOISE))
            with torch.no_grad():
                wanted = denoiser(a * x0 + s * noise, t, condition)  # the UNet predicts x0
                change = a / s * (x0 - wanted)  # the predicted noise less the noise
            loss = loss + (change * x0).sum() / x0[0].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return depth_of().detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--split", choices=["validation", "test"], default="validation")
    args = parser.parse_args()
    model, denoiser = zoo.load("depth")
    for part in (model, denoiser):
        part.float().requires_grad_(False)
    data = scenes(args.split, args.images)
    streams = {CLEAN: data.images, **{name: corrupt(data.images, name, severity) for name, severity in CORRUPTIONS["depth"].items()}}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=RESULTS, check=False).stdout.strip()
    records: dict[str, Any] = {"images": args.images, "steps": args.steps, "split": args.split, "commit": commit}
    records |= {"environment": environment.describe(), "settings": {}}
    for name, setting in SETTINGS.items():
        rows, started = {}, time.perf_counter()
        for stream, images in streams.items():
            with torch.no_grad():
                before = depth_errors(resized(model(images * 2 - 1).predicted_depth[:, None], (SIZE, SIZE))[:, 0], data.depth)
            after = depth_errors(refine(model, denoiser, images, setting, args.steps, 0), data.depth)
            rows[stream] = {"before": before["abs_rel"].tolist(), "after": after["abs_rel"].tolist()}
        seconds = (time.perf_counter() - started) / (len(streams) * args.images)
        changes = {stream: torch.tensor(row["after"]) - torch.tensor(row["before"]) for stream, row in rows.items()}
        corrupted = torch.stack([change for stream, change in changes.items() if stream != CLEAN]).mean(0)
        low, high = bootstrap_interval(corrupted)
        found = {"change": float(corrupted.mean()), "interval": [low, high], "clean_change": float(changes[CLEAN].mean())}
        records["settings"][name] = {**setting._asdict(), **found, "seconds": seconds, "rows": rows}
        print(
            f"{name:52} {found['change']:+.4f} ({low:+.4f} .. {high:+.4f}) clean {found['clean_change']:+.4f} {seconds:.2f} s", flush=True
        )
        (RESULTS / f"relight_{args.split}.json").write_text(json.dumps(records) + "\n")


if __name__ == "__main__":
    main()
