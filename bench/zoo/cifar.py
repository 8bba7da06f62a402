"""Trains a class-conditional UNet on CIFAR-10's training images (45,000), on a GPU or a CPU.

    python bench/zoo/cifar.py train --root FOLDER --out FOLDER --minutes N [--total N] [--start FOLDER]
    python bench/zoo/cifar.py finish --root FOLDER --out FOLDER --to FOLDER

`train` runs for N minutes and leaves OUT/checkpoint.pt, from which the next run goes on. The learning rate falls to 0 over --total, the
minutes of all runs together. Draws depend on the seed and the iteration alone. It writes the moving average of the weights in bfloat16 to
OUT/weights0.safetensors, weights1.safetensors, .. of 15 MiB at most, and OUT/training.json. `finish` makes of these a folder for
ClassUNet.from_pretrained, with a calibration, and measures the diffusion classifier on validation images.

The first part of the training minimises the denoising loss alone. From CONTRAST_FROM on, a second term raises the loss under a wrong class
above that under the image's own, on the same pair, as in the hard-negative training of Krojer et al. (2023, arXiv 2305.16397).
With --start, the folder of a finished UNet, the training begins from its weights, and the second term counts from the first iteration.
Images are changed in contrast and brightness by up to 30 % (JITTER), as digits are in the zoo's training.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import source_tree

source_tree.use()

from bench import cifar10  # noqa: E402
from dtta_fast.denoisers.class_unet import ClassUNet  # noqa: E402
from dtta_fast.denoisers.noise_process import (  # noqa: E402
    NOISE,
    SIGNAL,
    TARGET_NOISE,
    TARGET_SIGNAL,
    NoiseProcess,
)

CLASSES, PATCH = 10, 2
# 2.7 M parameters on a CPU; a UNet of this size learned to tell the classes apart faster than a DiT did (docs/log.md)
CHANNELS = {"cpu": (32, 64, 128), "cuda": (96, 192, 384)}
BATCH = {"cpu": 64, "cuda": 512}
TINY = (16, 32)
LR, WARM_UP, DECAY, UNLABELLED = 1e-3, 200, 0.999, 0.1
JITTER = 0.3  # the largest change of an image's contrast (as a factor) and of its brightness (of the distance from grey to white)
CONTRAST_FROM = 0.6  # share of the training after which wrong classes count
CONTRAST, SHARPNESS = 0.02, 200.0  # weight of the logistic loss of a wrong class, and the factor of the difference of the two losses
PART = 15 * 2**20  # bytes of a file of weights


def process() -> NoiseProcess:
    """1,000 steps of the cosine schedule (Nichol & Dhariwal 2021, arXiv 2102.09672), and v as the target (Salimans & Ho 2022, 2202.00512):
    v = a·ε − s·x0. The same as diffusers' DDPMScheduler with squaredcos_cap_v2 and v_prediction."""
    bar = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
    betas = torch.tensor([min(1 - bar[t + 1] / bar[t], 0.999) for t in range(1000)], dtype=torch.float64)
    kept = (1 - betas).cumprod(0)
    a, s = kept.sqrt(), (1 - kept).sqrt()
    return NoiseProcess(torch.stack([a, s, -s, a, torch.ones_like(a)], dim=1))


class Draw(NamedTuple):
    """A batch: x_t and its targets [N, 3, 32, 32], timesteps [N], and the classes [N] of the images and of their rivals. One image in ten
    has the class CLASSES, "no class"."""

    x_t: Tensor
    timesteps: Tensor
    classes: Tensor
    rivals: Tensor
    target: Tensor


def drawn(images: Tensor, labels: Tensor, table: Tensor, batch: int, seed: int) -> Draw:
    """Draws from images [N, 3, 32, 32], uint8; half of them are mirrored, and all are changed in contrast and brightness.

    Timesteps have a logit-normal density (Esser et al. 2024, arXiv 2403.03206), since the middle of the process tells most about the class.
    """
    generator = torch.Generator(images.device).manual_seed(seed)
    rows = torch.randint(len(images), (batch,), generator=generator, device=images.device)
    x0 = images[rows].float() / 127.5 - 1
    mirrored, unlabelled = torch.rand(2, batch, generator=generator, device=images.device)
    x0 = torch.where(mirrored[:, None, None, None] < 0.5, x0.flip(3), x0)
    contrast, brightness = JITTER * (2 * torch.rand(2, batch, 1, 1, 1, generator=generator, device=images.device) - 1)
    mean = x0.mean((1, 2, 3), keepdim=True)
    x0 = ((x0 - mean) * (1 + contrast) + mean + brightness).clamp(-1, 1)
    rivals = (labels[rows] + torch.randint(1, CLASSES, (batch,), generator=generator, device=images.device)) % CLASSES
    classes = torch.where(unlabelled < UNLABELLED, CLASSES, labels[rows])
    timesteps = (torch.randn(batch, generator=generator, device=images.device).sigmoid() * len(table)).long()
    noise = torch.randn(x0.shape, generator=generator, device=images.device)
    coefficients = table[timesteps][:, :, None, None, None]
    x_t = coefficients[:, SIGNAL] * x0 + coefficients[:, NOISE] * noise
    return Draw(x_t, timesteps, classes, rivals, coefficients[:, TARGET_SIGNAL] * x0 + coefficients[:, TARGET_NOISE] * noise)


def cpu_flags() -> str:
    """Returns the processor's features as Linux lists them; empty elsewhere. bfloat16 pays only where the processor multiplies in it."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.is_file() else ""


def network(channels: Sequence[int]) -> UNet2DModel:
    """Returns an untrained UNet with three resolutions at most, on squares of 2 x 2 pixels, for ten classes and "no class"."""
    inner = 3 * PATCH**2
    return UNet2DModel(
        sample_size=32 // PATCH,
        in_channels=inner,
        out_channels=inner,
        layers_per_block=1,
        block_out_channels=tuple(channels),
        down_block_types=("DownBlock2D",) * len(channels),
        up_block_types=("UpBlock2D",) * len(channels),
        num_class_embeds=CLASSES + 1,
        resnet_time_scale_shift="scale_shift",
        norm_num_groups=16,
        attention_head_dim=32 if min(channels) >= 32 else 16,
    )


class Training:
    """A network with its optimizer and moving average, and how far they are."""

    def __init__(self, channels: Sequence[int], device: torch.device, seed: int) -> None:
        torch.manual_seed(seed)
        self.channels, self.seed, self.device = list(channels), seed, device
        self.process = process().to(device)
        self.network = ClassUNet(network(channels), self.process, patch_size=PATCH, null_class=True).to(device)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
        self.average = copy.deepcopy(self.network).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=LR, weight_decay=0.01, betas=(0.9, 0.99), fused=True)
        self.autocast = device.type == "cuda" or "avx512_bf16" in cpu_flags()
        self.iteration, self.seconds, self.contrast_from = 0, 0.0, CONTRAST_FROM
        self.before: dict[str, Any] = {}  # how the weights were trained that this training began from
        self.losses: list[tuple[int, float, float]] = []

    def pair_losses(self, draw: Draw, classes: Tensor) -> Tensor:
        """Returns each image's loss [N] under the classes [N]."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            predicted = self.network(draw.x_t, draw.timesteps, self.network.unet.class_embedding.weight[classes])
        return (predicted.float() - draw.target).square().mean((1, 2, 3))

    def step(self, images: Tensor, labels: Tensor, batch: int, share: float) -> Tensor:
        """Makes one iteration, when a share of all the time has passed; returns the denoising loss and how many wrong classes had more."""
        draw = drawn(images, labels, self.process.table, batch, (self.seed << 32) + self.iteration)
        if share < self.contrast_from:
            own = self.pair_losses(draw, draw.classes)
            loss, found = own.mean(), torch.zeros((), device=self.device)
        else:
            twice = Draw(*(torch.cat([part, part]) for part in draw))
            own, rival = self.pair_losses(twice, torch.cat([draw.classes, draw.rivals])).chunk(2)
            labelled = draw.classes < CLASSES
            told = (F.softplus(SHARPNESS * (own - rival)) * labelled).mean()
            loss, found = own.mean() + CONTRAST * told, (own < rival)[labelled].float().mean()
        for group in self.optimizer.param_groups:
            group["lr"] = LR * min((self.iteration + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * min(1.0, share)))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        decay = min(DECAY, (self.iteration + 1) / (self.iteration + 10))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.network.parameters()), 1 - decay)
        self.iteration += 1
        return torch.stack([own.mean(), found]).detach()

    def save(self, folder: Path) -> None:
        """Writes checkpoint.pt, the parts of the moving average's weights, and training.json; each appears whole or not at all."""
        state = {name: getattr(self, name) for name in ("channels", "seed", "iteration", "seconds", "contrast_from", "before", "losses")}
        modules = {name: getattr(self, name).state_dict() for name in ("network", "average", "optimizer")}
        torch.save({**state, **modules}, folder / "checkpoint.tmp")
        (folder / "checkpoint.tmp").replace(folder / "checkpoint.pt")
        parts: list[dict[str, Tensor]] = [{}]
        for name, value in self.average.unet.state_dict().items():
            small = value.detach().bfloat16().cpu().contiguous()
            if sum(tensor.nbytes for tensor in parts[-1].values()) + small.nbytes > PART:
                parts.append({})
            parts[-1][name] = small
        for i, part in enumerate(parts):
            save_file(part, folder / f"weights{i}.safetensors")
        about = {**state, "jitter": JITTER, "parts": len(parts), "device": str(self.device), "torch": torch.__version__}
        (folder / "training.json").write_text(json.dumps(about, indent=2) + "\n")

    def start(self, folder: Path) -> None:
        """Begins from the weights of a finished UNet of the same sizes, wrong classes counting from the first iteration."""
        weights = ClassUNet.from_pretrained(folder).unet.state_dict()
        self.before = json.loads((folder / "training.json").read_text())
        for network in (self.network, self.average):
            network.unet.load_state_dict({name: value.float() for name, value in weights.items()})
        self.contrast_from = 0.0

    def load(self, path: Path) -> None:
        """Goes on from a checkpoint of the same sizes and seed."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        if (state["channels"], state["seed"]) != (self.channels, self.seed):
            raise ValueError(f"{path} holds a training of {state['channels']} channels with seed {state['seed']}; choose another --out")
        for name in ("network", "average", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        for name in ("iteration", "seconds", "contrast_from", "before", "losses"):
            setattr(self, name, state[name])


def train(args: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.out.mkdir(parents=True, exist_ok=True)
    training = Training(TINY if args.tiny else CHANNELS[device.type], device, args.seed)
    if (args.out / "checkpoint.pt").exists():
        if args.start:
            raise SystemExit(f"{args.out} holds a checkpoint, from which the training goes on; leave --start out, or choose another --out")
        training.load(args.out / "checkpoint.pt")
    elif args.start:
        training.start(args.start)
    images, labels = (part.to(device) for part in cifar10.load(args.root, "train"))
    batch, total = 16 if args.tiny else BATCH[device.type], 60 * (args.total or args.minutes)
    before, running, started = training.seconds, list[Tensor](), time.monotonic()
    if not args.tiny:
        training.network.unet.compile(dynamic=False)
    print(f"{len(images)} images, {sum(p.numel() for p in training.network.parameters()) / 1e6:.1f} M parameters, {device}", flush=True)
    while (elapsed := time.monotonic() - started) < 60 * args.minutes:
        running.append(training.step(images, labels, batch, (before + elapsed) / total))
        if len(running) == 250:  # reading them waits for the device
            denoising, found = torch.stack(running).mean(0).tolist()
            training.losses.append((training.iteration, round(denoising, 5), round(found, 4)))
            running.clear()
            training.seconds = before + time.monotonic() - started
            print(f"{training.iteration} loss {denoising:.4f} own class lower {found:.3f} {training.seconds:.0f} s", flush=True)
            if training.iteration % 1000 == 0:
                training.save(args.out)
    training.seconds = before + time.monotonic() - started
    training.save(args.out)
    print(f"stopped after {training.iteration} iterations and {training.seconds:.0f} s of {total:.0f}", flush=True)


def finish(args: argparse.Namespace) -> None:
    from diffusers import DDPMScheduler

    from dtta_fast import AdaptConfig, Adapter
    from dtta_fast.core.calibrate import calibrate

    about = json.loads((args.out / "training.json").read_text())
    unet = network(about["channels"])
    parts = [load_file(args.out / f"weights{i}.safetensors") for i in range(about["parts"])]
    unet.load_state_dict({name: value.float() for part in parts for name, value in part.items()})
    scheduler = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    denoiser = ClassUNet(unet, NoiseProcess.from_scheduler(scheduler), patch_size=PATCH, null_class=True).eval()
    torch.testing.assert_close(denoiser.process.table, process().table, rtol=1e-4, atol=1e-5)  # as in training
    images, labels = cifar10.load(args.root, "validation")
    images, labels = images[: args.images].float() / 255, labels[: args.images]
    denoiser.calibration = calibrate(denoiser, images[:256], labels[:256])
    denoiser.bfloat16().save_pretrained(args.to, scheduler)
    denoiser.float()

    # a classifier has to be there, and has no say
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, CLASSES))
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
    parser.add_argument("--start", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="a network of no use, to test this program")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent / "cifar_weights" / "denoiser")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=32)
    args = parser.parse_args()
    {"train": train, "finish": finish}[args.what](args)


if __name__ == "__main__":
    main()
