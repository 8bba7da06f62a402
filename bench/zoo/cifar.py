"""Trains a class-conditional DiT on CIFAR-10's training images (45,000), on a GPU or a CPU.

    python bench/zoo/cifar.py train --root FOLDER --out FOLDER --minutes N [--total N]
    python bench/zoo/cifar.py finish --root FOLDER --out FOLDER --to FOLDER

`train` runs for N minutes and leaves OUT/checkpoint.pt, from which the next run goes on. The learning rate falls to 0 over --total, the
minutes of all runs together. Draws depend on the seed and the iteration alone. It writes the moving average of the weights in bfloat16 to
OUT/weights0.safetensors, weights1.safetensors, .. of 15 MiB at most, and OUT/training.json. `finish` makes of these a folder for
DiT.from_pretrained, with a calibration, and measures the diffusion classifier on validation images.

Only torch, numpy, PIL and safetensors are needed to train.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import source_tree

source_tree.use()

from bench import cifar10  # noqa: E402
from dtta_fast.denoisers.dit import DiT  # noqa: E402
from dtta_fast.denoisers.dit_network import DiTNetwork  # noqa: E402
from dtta_fast.denoisers.noise_process import (  # noqa: E402
    NOISE,
    SIGNAL,
    TARGET_NOISE,
    TARGET_SIGNAL,
    NoiseProcess,
)

# 18.9 M parameters, 38 MB in bfloat16; a CPU takes larger patches, of which there are a quarter as many
SIZES = {"input_size": 32, "in_channels": 3, "hidden_size": 320, "depth": 10, "num_heads": 5, "num_classes": 10, "learn_sigma": False}
PATCH = {"cuda": 2, "cpu": 4}
BATCH = {"cuda": 512, "cpu": 128}
TINY = {"hidden_size": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
LR, WARM_UP, DECAY, UNLABELLED = 1e-3, 500, 0.9995, 0.1
PART = 15 * 2**20  # bytes of a file of weights


def process() -> NoiseProcess:
    """1,000 steps of the cosine schedule (Nichol & Dhariwal 2021, arXiv 2102.09672), and v as the target (Salimans & Ho 2022, 2202.00512):
    v = a·ε − s·x0. The same as diffusers' DDPMScheduler with squaredcos_cap_v2 and v_prediction."""
    bar = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
    betas = torch.tensor([min(1 - bar[t + 1] / bar[t], 0.999) for t in range(1000)], dtype=torch.float64)
    kept = (1 - betas).cumprod(0)
    a, s = kept.sqrt(), (1 - kept).sqrt()
    return NoiseProcess(torch.stack([a, s, -s, a, torch.ones_like(a)], dim=1))


def drawn(images: Tensor, labels: Tensor, table: Tensor, batch: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns x_t, timesteps, classes (one in ten the null class) and targets of images [N, 3, 32, 32], uint8, half of them mirrored."""
    generator = torch.Generator(images.device).manual_seed(seed)
    rows = torch.randint(len(images), (batch,), generator=generator, device=images.device)
    x0 = images[rows].float() / 127.5 - 1
    mirrored, unlabelled = torch.rand(2, batch, generator=generator, device=images.device)
    x0 = torch.where(mirrored[:, None, None, None] < 0.5, x0.flip(3), x0)
    classes = torch.where(unlabelled < UNLABELLED, SIZES["num_classes"], labels[rows])
    timesteps = torch.randint(len(table), (batch,), generator=generator, device=images.device)
    noise = torch.randn(x0.shape, generator=generator, device=images.device)
    coefficients = table[timesteps][:, :, None, None, None]
    x_t = coefficients[:, SIGNAL] * x0 + coefficients[:, NOISE] * noise
    return x_t, timesteps, classes, coefficients[:, TARGET_SIGNAL] * x0 + coefficients[:, TARGET_NOISE] * noise


class Training:
    """A network with its optimizer and moving average, and how far they are."""

    def __init__(self, sizes: dict[str, Any], device: torch.device, seed: int) -> None:
        torch.manual_seed(seed)
        self.sizes, self.seed, self.device = sizes, seed, device
        self.network = DiTNetwork(**sizes).to(device)
        self.average = copy.deepcopy(self.network).requires_grad_(False)
        fused = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=LR, weight_decay=0.01, betas=(0.9, 0.99), fused=fused)
        self.process = process().to(device)
        self.iteration, self.seconds = 0, 0.0
        self.losses: list[tuple[int, float]] = []

    def compile(self) -> None:
        """Compiles the blocks on a GPU: one block's code serves all."""
        if self.device.type == "cuda":
            for block in self.network.blocks:
                block.compile(dynamic=False)

    def step(self, images: Tensor, labels: Tensor, batch: int, share: float) -> Tensor:
        """Makes one iteration, when a share of all the time has passed; returns its loss."""
        x_t, timesteps, classes, target = drawn(images, labels, self.process.table, batch, (self.seed << 32) + self.iteration)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            condition = self.network.y_embedder.embedding_table(classes)
            predicted = self.network(x_t, self.process.model_time[timesteps], condition)
        loss = F.mse_loss(predicted.float(), target)
        for group in self.optimizer.param_groups:
            group["lr"] = LR * min((self.iteration + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * min(1.0, share)))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        decay = min(DECAY, (self.iteration + 1) / (self.iteration + 10))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.network.parameters()), 1 - decay)
        self.iteration += 1
        return loss.detach()

    def save(self, folder: Path) -> None:
        """Writes checkpoint.pt, the parts of the moving average's weights, and training.json; each appears whole or not at all."""
        state = {name: getattr(self, name) for name in ("sizes", "seed", "iteration", "seconds", "losses")}
        modules = {name: getattr(self, name).state_dict() for name in ("network", "average", "optimizer")}
        torch.save({**state, **modules}, folder / "checkpoint.tmp")
        (folder / "checkpoint.tmp").replace(folder / "checkpoint.pt")
        parts: list[dict[str, Tensor]] = [{}]
        for name, value in self.average.state_dict().items():
            small = value.detach().bfloat16().cpu().contiguous()
            if sum(tensor.nbytes for tensor in parts[-1].values()) + small.nbytes > PART:
                parts.append({})
            parts[-1][name] = small
        for i, part in enumerate(parts):
            save_file(part, folder / f"weights{i}.safetensors")
        about = {**state, "parts": len(parts), "device": str(self.device), "torch": torch.__version__}
        (folder / "training.json").write_text(json.dumps(about, indent=2) + "\n")

    def load(self, path: Path) -> None:
        """Goes on from a checkpoint of the same sizes and seed."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        if (state["sizes"], state["seed"]) != (self.sizes, self.seed):
            raise ValueError(f"{path} holds a training of {state['sizes']} with seed {state['seed']}; choose another --out")
        for name in ("network", "average", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        for name in ("iteration", "seconds", "losses"):
            setattr(self, name, state[name])


def train(args: argparse.Namespace) -> None:
    started, device = time.monotonic(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.out.mkdir(parents=True, exist_ok=True)
    sizes = {**SIZES, "patch_size": PATCH[device.type], **(TINY if args.tiny else {})}
    training = Training(sizes, device, args.seed)
    if (args.out / "checkpoint.pt").exists():
        training.load(args.out / "checkpoint.pt")
    images, labels = (part.to(device) for part in cifar10.load(args.root, "train"))
    batch, total = 16 if args.tiny else BATCH[device.type], 60 * (args.total or args.minutes)
    before, running = training.seconds, list[Tensor]()
    training.compile()
    print(f"{len(images)} images, {sum(p.numel() for p in training.network.parameters()) / 1e6:.1f} M parameters, {device}", flush=True)
    while (elapsed := time.monotonic() - started) < 60 * args.minutes:
        running.append(training.step(images, labels, batch, (before + elapsed) / total))
        if len(running) == 250:  # reading them waits for the device
            training.losses.append((training.iteration, round(torch.stack(running).mean().item(), 5)))
            running.clear()
            training.seconds = before + time.monotonic() - started
            print(f"{training.iteration} loss {training.losses[-1][1]:.4f} {training.seconds:.0f} s", flush=True)
            if training.iteration % 5000 == 0:
                training.save(args.out)
    training.seconds = before + time.monotonic() - started
    training.save(args.out)
    print(f"stopped after {training.iteration} iterations and {training.seconds:.0f} s of {total:.0f}", flush=True)


def finish(args: argparse.Namespace) -> None:
    from diffusers import DDPMScheduler

    from dtta_fast import AdaptConfig, Adapter
    from dtta_fast.core.calibrate import calibrate

    about = json.loads((args.out / "training.json").read_text())
    network = DiTNetwork(**about["sizes"])
    parts = [load_file(args.out / f"weights{i}.safetensors") for i in range(about["parts"])]
    network.load_state_dict({name: value.float() for part in parts for name, value in part.items()})
    scheduler = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    denoiser = DiT(network.eval(), NoiseProcess.from_scheduler(scheduler))
    torch.testing.assert_close(denoiser.process.table, process().table, rtol=1e-4, atol=1e-5)  # as in training
    images, labels = cifar10.load(args.root, "validation")
    images, labels = images[: args.images].float() / 255, labels[: args.images]
    denoiser.calibration = calibrate(denoiser, images[:256], labels[:256])
    denoiser.bfloat16().save_pretrained(args.to, scheduler)
    denoiser.float()

    # a classifier has to be there, and has no say
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, SIZES["num_classes"]))
    config = AdaptConfig(method="diffusion_classifier", steps=1, pairs=args.pairs, timesteps="calibrated")
    session, right = Adapter(model, denoiser, config), 0
    for rows in torch.arange(len(images)).split(16):
        right += int((session.adapt(images[rows], image_ids=rows).predictions == labels[rows]).sum())
    figures = {"images": len(images), "pairs": args.pairs, "right": right / len(images), **about}
    (args.to / "training.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(f"diffusion classifier, validation: {right / len(images):.3f} of {len(images)} images, {args.pairs} pairs a class", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "finish"])
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--total", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="a network of no use, to test this program")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent / "cifar_weights" / "denoiser")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=32)
    args = parser.parse_args()
    {"train": train, "finish": finish}[args.what](args)


if __name__ == "__main__":
    main()
